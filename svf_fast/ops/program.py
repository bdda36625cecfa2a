"""What a pass calls, as straight-line code: Python's decisions are made once for a layout.

From one step to the next the same ops run on maps of the same layout; only their values change.
Choosing them in Python takes several times as long as calling them. So the second pass with a
layout is recorded, and from the third on the record runs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

from svf_fast import _library

Tensors = Sequence[Tensor | None]
Pass = Callable[[], tuple[list[Tensor | None], Any]]

_aten = torch.ops.aten
_FACTORIES = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_BINDINGS = {  # faster than the ops themselves
    _aten.as_strided.default: torch.as_strided,
    _aten.convolution.default: torch.convolution,
    _aten.sum.dim_IntList: torch.sum,
}
_MOST = 32


class Programs:
    """The records of passes that read the same constants, by the layout of all else.

    A pass launches and returns tensors, and what depends on no values. It reads no other tensors
    than the ``inputs`` and ``constants`` that come with it, and decides by their layout, not by
    their values.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, _Program | None] = {}

    def run(
        self, key: Hashable, run_pass: Pass, inputs: Tensors, constants: Callable[[], Tensors]
    ) -> tuple[Sequence[Tensor | None], Any]:
        """Return what the pass does. key: of all that it depends on besides the tensors."""
        if not all(map(_is_plain, map(type, inputs))):
            return run_pass()
        at = key, _twins(inputs), *[x if x is None else _layout(x) for x in inputs]
        program = self._known.get(at, self)
        if isinstance(program, _Program):
            return program(*inputs), program.rest
        if program is None:
            results, rest, self._known[at] = _record(run_pass, inputs, constants())
            return results, rest
        if len(self._known) >= _MOST:  # maps of ever other sizes
            self._known.clear()
        self._known[at] = None
        return run_pass()


def runs_programs() -> bool:
    """Tell whether ops run as they are called: nothing traces, compiles or watches them."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and _compiler() is None
    )


# what torch.compile has called for each function in Python, as between two graphs of a model
_compiler = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)


@functools.cache
def _is_plain(kind: type) -> bool:
    """Tell whether ops on tensors of a type return plain tensors; None is no tensor."""
    return (
        kind is type(None)
        or kind is Tensor
        or (
            issubclass(kind, Tensor)
            and kind.__torch_function__ is torch._C._disabled_torch_function_impl
            and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
        )
    )


def _twins(inputs: Tensors) -> tuple[int, ...]:
    """Return for each input the place of the first that is the same tensor; () if all differ."""
    there = [id(x) for x in inputs if x is not None]
    if len(set(there)) == len(there):
        return ()
    return tuple(there.index(one) for one in there)


def python_kernel(op: Any, arguments: Sequence[Any]) -> Callable | None:
    """Return the function in Python that serves an op of these arguments, if it is one."""
    first = arguments[0] if arguments else None
    if not isinstance(first, Tensor) or not first.is_cuda:
        return None
    return _library.gpu_kernels.get(op._schema.name)


def _layout(x: Tensor) -> tuple:
    """Return what ops and kernels decide by; Triton's also by whether 16 divides an address."""
    return x.shape, x.stride(), x.dtype, x.data_ptr() & 15


class _Program(NamedTuple):
    """A recorded pass as code.

    code: from the inputs to the results. rest: what the pass returns besides them.

    device: the number of the GPU that kernels are to be launched on, None on the CPU.
    """

    code: Callable[..., list[Tensor | None]]
    rest: Any
    device: int | None

    def __call__(self, *inputs: Tensor | None) -> list[Tensor | None]:
        if self.device is None or self.device == torch.cuda.current_device():
            return self.code(*inputs)
        with torch.cuda.device(self.device):
            return self.code(*inputs)


class _Call(NamedTuple):
    """A line of a program: ``targets = function(text)``; read, written: names of tensors.

    pure: it only makes what it returns, so nothing is lost without it.
    """

    targets: str
    function: str
    text: str
    read: tuple[str, ...]
    written: tuple[str, ...]
    pure: bool


def _record(
    run_pass: Pass, inputs: Tensors, constants: Tensors
) -> tuple[list[Tensor | None], Any, _Program]:
    recorder = Recorder(inputs, constants)
    with recorder:
        results, rest = run_pass()
    device = next((x.device for x in results if x is not None and x.is_cuda), None)
    code = recorder.compiled(len(inputs), results)
    return results, rest, _Program(code, rest, None if device is None else device.index)


class Recorder(TorchDispatchMode):
    """Notes the calls of a pass while they run. Keeps none of its tensors alive."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Dynamo does not run here: `runs_programs`; to load it takes a second

    def __init__(self, inputs: Tensors, constants: Tensors) -> None:
        super().__init__()
        self._names = WeakTensorKeyDictionary()
        self._bases = WeakTensorKeyDictionary()  # names of what begins where a view of it begins
        self._bound: dict[str, tuple[Hashable, Any]] = {}  # what the code reads, by its name
        self._calls: list[_Call] = []
        self._count = 0
        self._constants = WeakTensorKeyDictionary()
        for x in constants:
            if x is not None:
                self._constants[x] = True
        for number, x in enumerate(inputs):
            if x is not None:
                self._names.setdefault(x, f"x{number}")

    @staticmethod
    def listening() -> Recorder | None:
        """Return the recorder of the pass that runs, if it is recorded."""
        mode = _get_current_dispatch_mode()
        return mode if isinstance(mode, Recorder) else None

    def launched(self, launch: Callable[..., None], arguments: Sequence[Any]) -> None:
        """Note the launch of a kernel, to which a tensor is the address where it begins."""
        read: list[str] = []
        given = [self._text(x, read, address=True) for x in arguments]
        self._calls.append(_Call("", self._bind(launch), ", ".join(given), tuple(read), (), False))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kernel = python_kernel(func, args)
        if kernel is not None:
            with self:  # its launches are noted, not its call
                return kernel(*args)
        result = func(*args, **kwargs)
        returns = func._schema.returns
        if returns and not any("Tensor" in str(one.type) for one in returns):  # of shapes, dtypes
            assert func is not _aten._local_scalar_dense.default, "a recorded pass read a value"
            return result
        if func is _aten.detach.default:  # without gradients it is the tensor itself
            self._names[result] = self._name(args[0])
        elif func in _FACTORIES:
            make = functools.partial(torch.empty_strided, dtype=result.dtype, device=result.device)
            at = "empty", result.dtype, result.device
            text = f"{tuple(result.shape)}, {result.stride()}"
            self._add(self._bind(make, at), text, [], result, True)
        else:
            read: list[str] = []
            given = [self._text(x, read) for x in args]
            given += [f"{name}={self._text(x, read)}" for name, x in kwargs.items()]
            call = self._bind(_BINDINGS.get(func, func._op))
            self._add(call, ", ".join(given), read, result, not func._schema.is_mutable)
        begins = func.is_view and isinstance(result, Tensor) and result.numel() > 0
        if begins and result.data_ptr() == args[0].data_ptr():
            self._bases[result] = self._bases.get(args[0], self._name(args[0]))
        return result

    def _add(self, function: str, text: str, read: list[str], result: Any, pure: bool) -> None:
        results = result if isinstance(result, tuple | list) else [result]
        names = ["_" if x is None else self._written(x) for x in results]
        targets = ", ".join(names) + ("," if len(names) == 1 and results is result else "")
        written = tuple(name for name in names if name != "_")
        self._calls.append(_Call(targets, function, text, tuple(read), written, pure))

    def _written(self, x: Tensor) -> str:
        """Name what a call returned, perhaps a tensor that it was given."""
        if x not in self._names:
            self._count += 1
            self._names[x] = f"t{self._count}"
        return self._names[x]

    def _name(self, x: Tensor) -> str:
        if x not in self._names:
            if x not in self._constants:
                raise AssertionError(
                    f"a recorded pass read a tensor {list(x.shape)} that is neither an input nor a "
                    "constant of it"
                )
            self._names[x] = self._bind(x)
        return self._names[x]

    def _bind(self, value: Any, at: Hashable = None) -> str:
        """Return the name under which the code reads an object."""
        at = id(value) if at is None else at
        for name, (known, _) in self._bound.items():
            if known == at:
                return name
        name = f"c{len(self._bound)}"
        self._bound[name] = at, value
        return name

    def _text(self, x: Any, read: list[str], address: bool = False) -> str:
        if isinstance(x, Tensor):
            name = self._name(x)
            read.append(name := self._bases.get(x, name) if address else name)
            return name
        if isinstance(x, list | tuple) and any(isinstance(part, Tensor) for part in x):
            return f"[{', '.join(self._text(part, read) for part in x)}]"
        if x is None or isinstance(x, bool | int):
            return repr(x)
        return self._bind(x)

    def compiled(self, count: int, results: Tensors) -> Callable[..., list[Tensor | None]]:
        """Compile the calls to a function of that many inputs; it frees what is not read again."""
        source = self.source(count, results)
        used = set(re.findall(r"\bc\d+\b", source))  # others may be given back
        scope = {name: value for name, (_, value) in self._bound.items() if name in used}
        exec(source, scope)
        return scope.pop("program")  # which holds the scope: no cycle, so it goes with its plan

    def source(self, count: int, results: Tensors) -> str:
        """Write that function out of names given here, names of an op's arguments, and numbers."""
        returned = ["None" if x is None else self._name(x) for x in results]
        needed, lines = set(returned), []
        for call in reversed(self._calls):
            if call.pure and not needed.intersection(call.written):
                continue
            last = {name for name in (*call.read, *call.written) if name not in needed}
            freed = ", ".join(sorted(name for name in last if name[0] == "t"))
            line = f"{call.targets} = {call.function}({call.text})" if call.targets else ""
            lines.append((line or f"{call.function}({call.text})") + (freed and f"; del {freed}"))
            needed |= last
        arguments = ", ".join(f"x{number}" for number in range(count))
        body = "\n    ".join([*reversed(lines), f"return [{', '.join(returned)}]"])
        return f"def program({arguments}):\n    {body}\n"
