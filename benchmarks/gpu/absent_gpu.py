"""A GPU that is not here: its tensors have shapes and a device, its kernels are noted, not run.

Code that asks a tensor where it is takes the way of a GPU, down to the launches of Triton kernels,
with the block sizes of that architecture. Parameters keep their values, so that what depends on the
values of S is decided; maps have none, so that a step at full size costs nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import math
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._dynamo  # it looks torch's functions up when it is imported: not those of a GPU here
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import svf_fast.triton
from svf_fast import _library
from svf_fast.triton import tuning

for _module in pkgutil.iter_modules(svf_fast.triton.__path__):  # kernels are as they are defined
    importlib.import_module(f"svf_fast.triton.{_module.name}")

DEVICE = torch.device("cuda", 0)
TO_HOST, TO_DEVICE = "copy to the host", "copy to the device"
LAYOUT_COPY = "layout copy"
# launches of ops that are more than one kernel, or none; all others that write anything are one
COMPILED = {  # of csrc/cuda
    "affine_act": 1,
    "affine_act_": 1,
    "affine_act_backward": 1,
    "affine_act_backward_": 1,
    "channel_dot": 2,  # partial sums, and their sum
    "channel_dot_scale_": 2,
    "guards_hold": 1,
}
ATEN = {
    "native_batch_norm": 3,  # copy of the mean, 1/σ, the map: ATen/native/cuda/Normalization.cu
    "scatter": 2,  # a copy of what is not scattered to comes first
    "addmm": 2,  # as is here: of what is added
    "index_put": 2,
}
NOTHING = {
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_reshape_alias",
    "lift_fresh",
    "set_",
}
FACTORIES = ("arange", "empty", "eye", "empty_strided", "full", "ones", "tensor", "zeros")
# of a kernel over lists of tensors, ATen/native/cuda/MultiTensorApply.cuh: tensors by lists, chunks
LISTED = {1: 110, 2: 64, 3: 48, 4: 36}
CHUNKS, CHUNK = 320, 65536


class Operand(NamedTuple):
    """A tensor that a kernel reads or writes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    @property
    def bytes(self) -> int:
        """Return the bytes in memory; an expanded dimension counts once."""
        there = (n for n, stride in zip(self.shape, self.strides, strict=True) if stride)
        return math.prod(there) * self.dtype.itemsize


class Launch(NamedTuple):
    """A kernel of a GPU, or a copy from or to it: what it reads and writes.

    options: of a Triton kernel its numbers and constants and ``grid``, of other ops their arguments
    that are no tensors. callers: functions of this project that led here, the innermost first.
    within: arguments of the op of this project that launched it, where its Python did.
    """

    kernel: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    options: dict[str, Any]
    callers: tuple[str, ...]
    within: tuple[Any, ...] = ()

    @property
    def is_copy_between(self) -> bool:
        """Return whether it is a copy between host and GPU."""
        return self.kernel in (TO_HOST, TO_DEVICE)

    @property
    def bytes(self) -> int:
        """Return the bytes read and written, each operand once."""
        return sum(operand.bytes for operand in (*self.inputs, *self.outputs))


class OnGPU(Tensor):
    """A tensor of the GPU that is not here; ``inner`` has its shape, and values or none."""

    inner: Tensor
    has_values = True  # as svf_fast asks: on the host
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def data_ptr(self) -> int:
        """Return the address of its values; without values, an aligned one, as of an allocator."""
        return 4096 if self.inner.is_meta else self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: a tensor of an absent GPU outside `absent_gpu`")


def _factory(gpu: AbsentGPU, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a function that makes tensors, on the GPU if asked to; pinned memory is plain."""

    def make(*arguments: Any, device: Any = None, pin_memory: bool = False, **options: Any):
        if not _is_gpu(device):
            return function(*arguments, device=device, **options)
        with gpu.making():
            return function(*arguments, device="cpu", **options)

    return make


def _mover(gpu: AbsentGPU, name: str) -> Callable[..., Tensor]:
    """Wrap ``Tensor.NAME``, which may move a tensor to the GPU or back."""
    function = getattr(Tensor, name)

    def move(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        given = {"device": options.pop("device")} if "device" in options else {}
        named = [value for value in (*given.values(), *arguments) if _is_device(value)]
        target = named[0] if named else None if name == "to" else name
        if target is None or not (_is_gpu(target) or isinstance(tensor, OnGPU)):
            return function(tensor, *arguments, **options, **given)
        if _is_gpu(target) != isinstance(tensor, OnGPU):
            tensor = gpu.upload(tensor) if _is_gpu(target) else gpu.download(tensor)
        rest = [value for value in arguments if isinstance(value, torch.dtype | Tensor)]
        if name != "to" or not (rest or options.keys() - {"non_blocking", "copy"}):
            return tensor
        return function(tensor, *rest, **options)

    return move


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device | str)


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Driver:
    """What Triton asks about the GPU: kernels are compiled for it, their launchers do nothing."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        return object(), 0, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: Any) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Event:
    """A CUDA event: what it marks has happened."""

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


class AbsentGPU(TorchDispatchMode):
    """The GPU within :func:`absent_gpu`; ``launches`` since the last :meth:`take`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.capturing = False
        self._making = False
        self._within: tuple[Any, ...] = ()

    def take(self) -> list[Launch]:
        """Return the launches so far and start a new list."""
        found, self.launches = self.launches, []
        return found

    def maps(self, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
        """Make a map without values."""
        last = torch.channels_last if channels_last else torch.contiguous_format
        return OnGPU(torch.empty(shape, dtype=dtype, device="meta", memory_format=last))

    def placed(self, network: nn.Module) -> nn.Module:
        """Copy a network to this GPU."""
        return copy.deepcopy(network).to(DEVICE)

    @contextlib.contextmanager
    def autocast(self, dtype: str) -> Iterator[None]:
        """Autocast to a 16-bit dtype, none for others; to ATen the tensors are on the CPU."""
        low = getattr(torch, dtype)
        if low.itemsize > 2:
            yield
            return
        for device in ("cpu", "cuda"):
            torch.set_autocast_dtype(device, low)
            torch.set_autocast_enabled(device, True)
        try:
            yield
        finally:
            for device in ("cpu", "cuda"):
                torch.set_autocast_enabled(device, False)
            torch.clear_autocast_cache()

    def upload(self, tensor: Tensor) -> Tensor:
        with torch.no_grad():
            found = OnGPU(tensor.detach().clone())
        self.note(TO_DEVICE, [tensor], [found])
        return found.requires_grad_(tensor.requires_grad)

    def download(self, tensor: Tensor) -> Tensor:
        inner = tensor.inner  # type: ignore[attr-defined]
        if inner.is_meta:
            raise RuntimeError("values of a map are asked for: an absent GPU has none")
        self.note(TO_HOST, [tensor], [inner])
        return inner.detach().clone()

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """Put tensors that are made inside on the GPU."""
        before, self._making = self._making, True
        try:
            yield
        finally:
            self._making = before

    def note(self, kernel: str, inputs, outputs, **options: Any) -> None:
        """Record a launch."""
        of = Operand.of
        reads, writes = tuple(map(of, inputs)), tuple(map(of, outputs))
        self.launches.append(Launch(kernel, reads, writes, options, _callers(), self._within))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        ours = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
        if not ours and not self._making:
            return func(*args, **kwargs)
        own, composite, name = _kind(func)
        if own:
            return self._own(func, name, args, kwargs, ours)
        if composite:  # as where no gradient is asked for
            with self:
                return func.decompose(*args, **kwargs)
        if name in ("_local_scalar_dense", "equal"):
            self.note(TO_HOST, ours, [])
            return func(*_inner(args, ours), **_inner(kwargs, ours))
        if name == "copy_" and len(ours) < len(tensors):
            to, source = args[:2]
            self.note(TO_DEVICE if isinstance(to, OnGPU) else TO_HOST, [source], [to])
            inner_to, inner_source = _inner((to, source), ours)
            inner_to.copy_(inner_source)
            return to
        if name in ("convolution", "convolution_backward"):
            return self._convolution(name, args, ours)
        inner_args, inner_kwargs = _inner(args, ours), _inner(kwargs, ours)
        if inner_kwargs.get("device") is not None:  # where ATen takes the tensors to be
            inner_kwargs["device"] = "meta" if _without_values(ours) else "cpu"
        with torch._C._DisableAutocast():
            found = func(*inner_args, **inner_kwargs)
        if name == "native_batch_norm_backward" and not args[7]:
            # ATen/native/cuda/Normalization.cu, batch_norm_elementwise_backward_eval
            found = (found[0].contiguous(), *found[1:])
        known = {id(tensor.inner): tensor for tensor in ours}
        found = _map(lambda t: known[id(t)] if id(t) in known else OnGPU(t), found, Tensor)
        written = _tensors(found)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and not written:
                written += _tensors(value)
        self._note_all(_launches(func, name, args, written), name, ours, written)
        return found

    def _note_all(self, count: int, kernel: str, inputs, outputs) -> None:
        """Record the launches of an op: the first one moves its maps, others are small."""
        for number in range(count):
            self.note(kernel, [] if number else inputs, [] if number else outputs)

    def _own(self, func, name: str, args, kwargs, ours: list[OnGPU]):
        """Run an op of svf_fast: its Python for GPUs, or the kernels of its CUDA code."""
        if name not in COMPILED:
            before, self._within = self._within, _map(Operand.of, (*args, *kwargs.values()), Tensor)
            try:
                with self:
                    return self._python(func, name)(*args, **kwargs)
            finally:
                self._within = before
        found = func(*_inner(args, ours, True), **_inner(kwargs, ours, True))
        made = _map(OnGPU, found, Tensor)
        self._bring_together([tensor for tensor in ours if tensor.shape == ours[0].shape])
        written = _tensors(made) if made is not None else ours[:1]
        self._note_all(COMPILED[name], name, ours, written)
        return made

    def _python(self, func, name: str) -> Callable[..., Any]:
        """Return the Python code registered for GPUs, or else for every device."""
        for key in ("CUDA", "CompositeExplicitAutograd"):
            if torch._C._dispatch_has_kernel_for_dispatch_key(func._schema.name, key):
                return functools.partial(func._op_dk, getattr(torch._C.DispatchKey, key))
        raise KeyError(f"{name}: neither in Python nor in COMPILED, which counts launches of csrc")

    def _bring_together(self, maps: Sequence[OnGPU]) -> None:
        """Record the copies of csrc/maps.h: a dense map, and the others in its strides."""
        first = maps[0].inner
        strides = (first if _is_dense(first) else first.contiguous()).stride()
        for x in maps:
            if x.stride() != strides:
                self.note(LAYOUT_COPY, [x], [x])

    def _convolution(self, name: str, args, ours: list[OnGPU]) -> Any:
        """Record cuDNN's launch and ATen's copies that bring operands into one memory format.

        ATen/native/Convolution.cpp and cudnn/ConvShared.cpp: channels_last where one of the two
        operands of a product is; the backward first brings the gradient to the format of the input.
        """
        if name == "convolution":
            x, weight, bias = args[:3]
            form = _format(x, weight)
            self._into(form, x), self._into(form, weight)
            shape = torch.ops.aten.convolution(*_inner(args, ours, True)).shape
            y = self._map(shape, x, form)
            self.note(name, [x, weight], [y], stride=args[3], groups=args[8])
            if bias is not None:
                self.note("bias", [y, bias], [y])
            return y
        grad, x, weight = args[:3]
        groups, wanted = args[9], args[10]
        both = _format(x, weight)
        self._into(both, weight)
        if wanted[1]:
            self._into(both, x)
        own = torch._prims_common.suggest_memory_format(x)
        self._into(own, grad)
        at_hand = self._map(grad.shape, grad, own)
        results: list[Tensor | None] = [None, None, None]
        if wanted[0]:
            form = _format(at_hand, weight)
            self._into(form, at_hand)
            results[0] = self._map(x.shape, grad, form)
            self.note("input gradient", [grad, weight], [results[0]], groups=groups)
        if wanted[1]:
            form = _format(x, at_hand)
            self._into(form, at_hand)
            results[1] = self._map(weight.shape, weight, form)
            self.note("weight gradient", [grad, x], [results[1]], groups=groups)
        if wanted[2]:
            results[2] = OnGPU(torch.empty(weight.shape[:1], dtype=grad.dtype, device="meta"))
            self.note("sum", [grad], [results[2]])
        return tuple(results)

    def _into(self, form: torch.memory_format, x: Tensor) -> None:
        if not x.is_contiguous(memory_format=form):
            self.note(LAYOUT_COPY, [x], [x])

    def _map(self, shape, like: Tensor, form: torch.memory_format) -> Tensor:
        return OnGPU(torch.empty(shape, dtype=like.dtype, device="meta", memory_format=form))

    def launched(self, kernel, arguments, grid, options) -> None:
        """Record a Triton kernel; all its tensors count as inputs, named by ``names``."""
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        size = grid(named) if callable(grid) else grid
        tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
        numbers = {k: v for k, v in named.items() if not isinstance(v, Tensor)}
        numbers["names"] = tuple(tensors)
        self.note(kernel.fn.__name__, tensors.values(), [], grid=tuple(size), **numbers)


def _map(change: Callable[[Any], Any], tree: Any, kind: type) -> Any:
    """Apply a change to values of one type among arguments or results, also inside lists."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(_map(change, value, kind) for value in tree)
    if isinstance(tree, dict):
        return {key: _map(change, value, kind) for key, value in tree.items()}
    return tree


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(found.append, tree, Tensor)
    return found


def _inner(tree: Any, ours: Sequence[OnGPU], meta: bool = False) -> Any:
    """Return the arguments with the inner tensors; no values where one of them has none."""
    meta = meta or _without_values(ours)

    def unwrap(tensor: OnGPU) -> Tensor:
        inner = tensor.inner
        return inner.to("meta") if meta and not inner.is_meta else inner

    return _map(unwrap, tree, OnGPU)


def _without_values(ours: Sequence[OnGPU]) -> bool:
    return any(tensor.inner.is_meta for tensor in ours)


@functools.cache
def _kind(func: Any) -> tuple[bool, bool, str]:
    """Return whether an op is svf_fast's, whether it is made of others, and its name."""
    namespace, name = func._schema.name.split("::")
    key = "CompositeImplicitAutograd"
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
    return namespace == "svf_fast", composite, name


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def _format(*operands: Tensor) -> torch.memory_format:
    suggest = torch._prims_common.suggest_memory_format
    last = any(suggest(x) == torch.channels_last for x in operands)
    return torch.channels_last if last else torch.contiguous_format


def _launches(func, name: str, args, written: list[Tensor]) -> int:
    if name == "_assert_async":
        return 1
    if name in NOTHING or func.is_view or not any(t.numel() for t in written):
        return 0
    if name.startswith("_foreach"):
        lists = [a for a in args if isinstance(a, list | tuple) and isinstance(a[0], Tensor)]
        count = len(lists) + (0 if name.endswith("_") else 1)
        chunks = sum(math.ceil(x.numel() / CHUNK) for x in lists[0])
        return max(math.ceil(len(lists[0]) / LISTED[min(count, 4)]), math.ceil(chunks / CHUNKS))
    return ATEN.get(name, 1)


def _callers() -> tuple[str, ...]:
    """List svf_fast's functions on the stack as ``folder/file.function``; "" for autograd."""
    found, frame = [], sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "svf_fast" in path:
            at = path[path.rindex("svf_fast") + len("svf_fast") + 1 :].removesuffix(".py")
            found.append(f"{at}.{frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


@contextlib.contextmanager
def absent_gpu(arch: int = 90) -> Iterator[AbsentGPU]:
    """Make "cuda" a GPU of sm_``arch`` that does not exist, within the context."""
    gpu = AbsentGPU()

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        gpu.launched(self, arguments, grid, options)

    before, overwrite = driver._active, torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))  # a knob that is set goes there and stays
        for owner, name, value in (
            (JITFunction, "run", run),
            (InterpretedFunction, "run", run),
            (_library, "cuda_missing", ""),
            (torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing),
            (torch.cuda, "Event", Event),
            (torch.cuda, "current_stream", lambda device=None: None),
            (knobs.runtime, "interpret", False),
            (tuning, "INTERPRETED", False),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        for name in FACTORIES:
            made = _factory(gpu, getattr(torch, name))
            stack.enter_context(mock.patch.object(torch, name, made))
        for name in ("to", "cpu", "cuda"):
            stack.enter_context(mock.patch.object(Tensor, name, _mover(gpu, name)))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor))
        driver.set_active(Driver(arch))  # type: ignore[arg-type]
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        stack.callback(setattr, driver, "_active", before)
        stack.enter_context(gpu)
        yield gpu
