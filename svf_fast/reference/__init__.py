"""Every op in plain PyTorch: specification, test oracle, fallback and baseline."""
