"""One file per op: the compiled op, its shapes for tracing, its gradient, the public function."""
