"""Recorded passes: the same bits as passes that run, in each layout and after every change."""

from __future__ import annotations

import copy
import gc
import re
import sys
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import svf_fast
from svf_fast.layers.factored import svf_layers
from svf_fast.ops import program
from svf_fast.ops.program import Programs
from tests.svf_fast.fusion.test_block_on_gpu import BLOCKS as ON_GPU
from tests.svf_fast.fusion.test_block_on_gpu import converted
from tests.svf_fast.gpu_path import interpreted, on_gpu
from tests.svf_fast.ops.test_block import BLOCKS, as_reference, frozen, fused, step


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """A letter for each pass: r for one that was recorded, p for a program."""
    found: list[str] = []
    record, call = program._record, program._Program.__call__

    def recorded(*arguments):
        found.append("r")
        return record(*arguments)

    def called(self, *inputs):
        found.append("p")
        return call(self, *inputs)

    monkeypatch.setattr(program, "_record", recorded)
    monkeypatch.setattr(program._Program, "__call__", called)
    return found


def image(model: nn.Module, dtype=torch.float32, size=(9, 7), last=False) -> torch.Tensor:
    channels = next(iter(svf_layers(model).values())).in_channels
    x = torch.randn(2, channels, *size, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def move(model: nn.Module) -> None:
    """As an optimizer does: S is another one, its guarded directions are not."""
    with torch.no_grad():
        for layer in svf_layers(model).values():
            change = 0.02 * torch.rand_like(layer.S)
            layer.S.mul_(1 + change) if layer.trains == "S" else layer.log_scale.add_(change)


def assert_same(model: nn.Module, x: torch.Tensor) -> None:
    """The bits of a copy, which has run no pass before."""
    grad = torch.randn_like(copy.deepcopy(model)(x))
    expected_values = step(copy.deepcopy(model), x, grad)
    for got, expected in zip(step(model, x, grad), expected_values, strict=True):
        assert torch.equal(got, expected) and got.stride() == expected.stride()


RUNS = ("", "rr", "pp", "pp")  # forward and back; the first time nothing is noted


@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("recompute", (False, True), ids=("keep", "recompute"))
@pytest.mark.parametrize("strategy", ("auto", "gram", "chain", "fold"))
@pytest.mark.parametrize("name", BLOCKS)
def test_programs_compute_what_passes_compute(
    name, strategy, recompute, last, ran, poisoned_memory
):
    model = fused(name, strategy, recompute)
    for expected in RUNS:
        ran.clear()
        assert_same(model, image(model, last=last))
        assert "".join(ran) == expected
        move(model)


@pytest.mark.parametrize("strategy", ("gram", "chain"))
def test_programs_where_log_scale_trains(strategy, ran, poisoned_memory):
    block = nn.Sequential(frozen(BLOCKS["bottleneck downsample"]()))
    model = svf_fast.convert(block, None, strategy, trains="log_scale")
    for expected in RUNS:
        ran.clear()
        assert_same(model, image(model))
        assert "".join(ran) == expected
        move(model)


@pytest.mark.parametrize("strategy", ("auto", "chain"))
@pytest.mark.parametrize("name", ON_GPU)
def test_programs_launch_kernels_themselves(name, strategy, ran, monkeypatch, poisoned_memory):
    """On the GPU's path they do not call the functions in Python that serve ops there."""
    model = converted(name, strategy)
    kernels = interpreted()
    with on_gpu(kernels) as calls:
        served = {f"svf_fast::{op}": kernel for op, kernel in kernels.items()}
        monkeypatch.setattr(program, "python_kernel", lambda op, _: served.get(op._schema.name))
        for expected in RUNS:
            x = image(model, last=True)
            grad = torch.randn_like(copy.deepcopy(model)(x))
            exact = step(copy.deepcopy(model), x, grad)
            calls.clear()
            assert all(map(torch.equal, step(model, x, grad), exact))
            move(model)
            if expected == "pp":  # of the block; another one composes W
                assert "".join(ran[-2:]) == "pp" and not calls.keys() - {"compose", "compose_all"}


CHANGES: dict[str, Callable[[nn.Module], torch.Tensor]] = {
    "size": lambda model: image(model, size=(5, 8)),
    "layout": lambda model: image(model, last=True),
    "address": lambda model: torch.cat([torch.zeros(1), image(model).flatten()])[1:].view(
        image(model).shape
    ),
    "strides": lambda model: image(model, size=(18, 7))[:, :, ::2],
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_layout_is_another_program(change, ran):
    model = fused("bottleneck downsample")
    for _ in range(3):
        step(model, image(model))
    ran.clear()
    for _ in RUNS:
        x = CHANGES[change](model)
        assert torch.equal(model(x), copy.deepcopy(model)(x))
    assert "".join(ran) == "rpp"
    ran.clear()
    assert_same(model, image(model))
    assert "".join(ran) == "pp"


def test_gradients_of_another_layout_and_of_x_alone(ran):
    model = fused("bottleneck")
    x = image(model)
    for _ in range(3):
        step(model, x)
    ran.clear()
    for _ in range(3):
        y = model(x.requires_grad_(False))
        y.sum().backward()  # an expanded one: no stride
    assert "".join(ran) == "p" + "pr" + "pp"


def test_other_guarded_directions_are_other_constants(ran):
    """A backward pass uses those of its own forward pass, whatever has come since."""
    model = fused("bottleneck", "gram")
    layer = next(iter(svf_layers(model).values()))
    x = image(model).requires_grad_()
    for _ in range(3):
        step(model, x)
    before = copy.deepcopy(model)
    y = model(x)
    values = layer.S.detach().clone()
    plan = layer.current_plan()
    layer.S.data[-1] = 1e-6
    assert_same(model, x)
    assert layer.current_plan() is not plan
    with torch.no_grad():
        layer.S.data.copy_(values)
    (got,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(before(x).sum(), x)
    assert torch.equal(got, expected)


def test_backward_twice_and_saved_tensors_that_were_moved(ran):
    model = fused("bottleneck downsample")
    x = image(model, last=True).requires_grad_()
    for _ in range(3):
        step(model, x)
    y = model(x)
    once, twice = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)

    def contiguous(saved: torch.Tensor) -> torch.Tensor:  # as what was moved away comes back
        return saved.detach().clone(memory_format=torch.contiguous_format)

    with torch.autograd.graph.saved_tensors_hooks(contiguous, lambda kept: kept):
        for _ in range(3):
            (got,) = torch.autograd.grad(model(x).sum(), x)
            torch.testing.assert_close(got, once)


def test_replaced_parts_are_seen(ran):
    model = fused("bottleneck")
    for _ in range(3):
        step(model, image(model))
    block, layer = model[0], next(iter(svf_layers(model).values()))
    for change in (
        lambda: block.bn1.running_mean.add_(1),
        lambda: setattr(block.bn2, "eps", 1e-2),
        lambda: setattr(layer, "S", nn.Parameter(layer.S.detach() * 1.5)),
        lambda: layer.U.mul_(1.1),
        lambda: layer.S.requires_grad_(False),
        lambda: setattr(block, "recompute", True),
        lambda: setattr(layer, "strategy", "chain"),
    ):
        with torch.no_grad():
            change()
        for _ in range(3):
            assert_same(model, image(model))


def test_inputs_that_are_one_tensor_and_later_are_not(ran):
    """S of two layers, and a gradient that is x itself."""
    model = fused("basic", "gram")
    block, x = model[0], image(model)
    own = nn.Parameter(block.conv2.S.detach() * 1.3)
    block.conv2.S = block.conv1.S
    for _ in range(3):
        step(model, x)
    block.conv2.S = own
    assert_same(model, x)
    for strategy in ("fold", "auto"):
        model = fused("basic", strategy)
        for _ in range(3):
            x = image(model).requires_grad_()
            torch.autograd.grad(model(x), [x, *svf_fast.svf_parameters(model)], x)
        assert_same(model, image(model))


class Sub(torch.Tensor):
    """As libraries of pictures have them: what is computed of one is one."""


def fake(x: torch.Tensor) -> torch.Tensor:
    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x)


@pytest.mark.parametrize("kind", (fake, lambda x: x.as_subclass(Sub)), ids=("fake", "subclass"))
def test_tensors_of_another_kind_run_as_ever(kind, ran):
    model = fused("bottleneck")
    x = image(model)
    expected = [model(x) for _ in range(3)][-1]
    ran.clear()
    for _ in range(3):
        y = model(kind(x))
        assert y.shape == x.shape and (kind is fake or torch.equal(y, expected))
    assert not ran


def test_records_go_with_their_model():
    """Without waiting for the garbage collector, which does not know how large tensors are."""
    model = fused("bottleneck")
    for _ in range(3):
        step(model, image(model))
    gc.collect()
    factors = [weakref.ref(layer.U) for layer in svf_layers(model).values()]
    gc.disable()
    try:
        del model
        assert not any(ref() is not None for ref in factors)
    finally:
        gc.enable()


def test_a_hook_that_moves_s_within_a_sequence(ran):
    model = frozen(nn.Sequential(nn.Identity(), nn.Conv2d(6, 9, 3), nn.BatchNorm2d(9), nn.ReLU()))
    model = svf_fast.convert(model, None, strategy="gram")
    (layer,) = svf_layers(model).values()
    x = image(model)

    def change(*_) -> None:
        with torch.no_grad():
            layer.S.mul_(1.5)

    for _ in range(3):
        step(model, x)
    handle = model[0].register_forward_hook(change)
    got = model(x)
    handle.remove()
    assert torch.equal(got, copy.deepcopy(model)(x))


def test_threads_whose_first_pass_meets_other_guarded_directions():
    """All plan at once; none computes, or leaves for later, with half of the old plan."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        model = fused("bottleneck", "gram")
        x, layers = image(model), list(svf_layers(model).values())
        for number in range(40):
            with torch.no_grad():
                for layer in layers:
                    layer.S[-1] = 1e-6 if number % 2 else 0.3
            expected = step(copy.deepcopy(model), x)
            found: list[list[torch.Tensor]] = []
            barrier = threading.Barrier(3)

            def run(found=found, barrier=barrier) -> None:
                barrier.wait()
                found.append(step(model, x))

            threads = [threading.Thread(target=run) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found.append(step(model, x))
            assert len(found) == 4
            for got in found:
                for mine, other in zip(got, expected, strict=True):
                    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    finally:
        sys.setswitchinterval(interval)


def test_what_watches_ops_sees_them(ran):
    class Ops(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    model = fused("bottleneck")
    x = image(model)
    for _ in range(3):
        step(model, x)
    ran.clear()
    with Ops() as ops:
        model(x)
    assert not ran and any(name.startswith("svf_fast::") for name in ops.names)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_under_autocast(dtype, ran):
    model = fused("bottleneck")
    for expected in RUNS:
        ran.clear()
        with torch.autocast("cpu", dtype):
            assert_same(model, image(model))
        assert "".join(ran) == expected
        move(model)


def test_sizes_that_never_return_are_not_recorded(ran):
    model = fused("unit")
    for width in range(3, 3 + 3 * program._MOST):
        model(image(model, size=(4, width)))
    assert not ran
    (reading,) = (m._reading for m in model.modules() if "_reading" in m.__dict__)
    (chain,) = reading._chains.values()
    assert len(chain._known[1]._known) <= program._MOST


def test_programs_are_made_of_names_and_numbers(monkeypatch):
    """They are executed, so nothing else may get into them."""
    sources: list[str] = []
    original = program.Recorder.source

    def source(self, *arguments):
        sources.append(original(self, *arguments))
        return sources[-1]

    monkeypatch.setattr(program.Recorder, "source", source)
    for name in BLOCKS:
        model = fused(name)
        for _ in range(2):
            step(model, image(model, last=True))
    assert len(sources) == 2 * len(BLOCKS)
    value = r"([txc]\d+|-?\d+|None|True|False|_|memory_format=c\d+|dtype=c\d+)"
    line = rf"(return |del )?[\[(]?{value}?([,;=()\[\] ]+(del )?{value}?)*"
    for text in sources:
        head, *body = text.rstrip("\n").split("\n")
        assert re.fullmatch(r"def program\((x\d+(, )?)+\):", head)
        assert all(re.fullmatch(line, one.strip()) for one in body), text


def test_threads(ran):
    """A thread that records does not note what another one computes."""
    model = fused("bottleneck")
    x = [image(model, size=(40, 40)) for _ in range(4)]
    expected = [step(copy.deepcopy(model), one) for one in x]
    found: dict[int, list] = {}

    def run(index: int) -> None:
        for _ in range(6):
            found[index] = step(model, x[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert all(map(torch.equal, found[index], expected[index]))


def record(run, inputs, constants=()) -> Programs:
    programs = Programs()
    for _ in range(2):
        programs.run(None, run, inputs, lambda: constants)
    return programs


def test_a_tensor_from_elsewhere_is_an_error():
    x, other = torch.ones(3), torch.ones(3)
    with pytest.raises(AssertionError, match="neither an input nor a constant"):
        record(lambda: ([x + other], None), [x])
    record(lambda: ([x + other], None), [x], [other])


def test_a_value_that_decides_is_an_error():
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="read a value"):
        record(lambda: ([x if x.sum() > 0 else -x], None), [x])


def test_results_lists_in_place_and_nothing():
    """What ops return: several tensors, lists, their own argument, None."""
    x = torch.arange(6.0)

    def run():
        y = x * 2
        parts = y.split([2, 4])
        y.add_(1)
        (alone,) = y.split(6)
        values, _ = torch.sort(x, descending=True)
        return [parts[1], None, alone.detach(), torch.cat([values, x]), x], "rest"

    programs = record(run, [x])
    expected = [None if t is None else t.clone() for t in run()[0]]
    found, rest = programs.run(None, run, [x], tuple)
    assert rest == "rest" and found[1] is None and found[4] is x
    assert all(torch.equal(found[i], expected[i]) for i in (0, 2, 3))


def test_what_is_not_read_any_more_is_freed_and_constants_are_not_kept_for_nothing():
    """Neither a record nor a run of it keeps maps; a constant that no line reads is not kept."""
    x, constants = torch.ones(1000), [torch.ones(2, 2)]
    alive: list[weakref.ref] = []
    library = torch.library.Library("program_test", "FRAGMENT")
    library.define("watched(Tensor x) -> Tensor")

    def watched(tensor):
        assert sum(ref() is not None for ref in alive) <= 1  # what this one is made of
        result = tensor + 1
        alive.append(weakref.ref(result))
        return result

    library.impl("watched", watched, "CPU")
    try:

        def run():
            y = x
            for _ in range(5):
                y = torch.ops.program_test.watched(y)
            constants[0].t()
            return [y], None

        programs = Programs()
        for _ in range(3):
            alive.clear()
            programs.run(None, run, [x], lambda: constants)
        assert len(alive) == 5
        kept = weakref.ref(constants.pop())
        assert kept() is None
    finally:
        library._destroy()


def test_programs_of_a_network_agree_with_the_papers_layers():
    model = nn.Sequential(*(fused(name)[0] for name in ("bottleneck", "bottleneck"))).double()
    reference = as_reference(model)
    for _ in range(4):
        x = image(model, torch.float64)
        for got, expected in zip(step(model, x), step(reference, x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            one.data.mul_(1.01), other.data.copy_(one.data)
