"""Launches counted without a GPU: the count of single ops by hand, and of a step against bounds."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch.nn import functional
from triton import knobs

from benchmarks.gpu import launches
from benchmarks.gpu.absent_gpu import LAYOUT_COPY, TO_DEVICE, TO_HOST, AbsentGPU, absent_gpu
from benchmarks.race.levels import Settings
from svf_fast.layers.factored import svf_layers

EAGER, IN_A_GRAPH = 350, 250  # launches of a step of svf_fast, at most
SETTINGS = Settings(size=33, batch=2, width=16, dtype="bfloat16", channels_last=True)


def kernels(gpu: AbsentGPU) -> list[str]:
    return [launch.kernel for launch in gpu.take()]


@pytest.fixture(scope="module")
def plain() -> torch.nn.Module:
    return launches.network("svf_fast", SETTINGS)


@pytest.fixture(scope="module")
def guarded(shared, tmp_path_factory) -> tuple[torch.nn.Module, Settings]:
    """Return layers 2-4 with the ImageNet weights, of which some singular values are small."""
    weights = shared / "weights" / "resnet50_imagenet.safetensors"
    if not weights.is_file():
        pytest.skip(f"no ImageNet weights here: {weights} is no file")
    settings = Settings(
        size=33, weights=str(weights), stride_on="conv1", dtype="bfloat16", channels_last=True
    )
    model = launches.network("svf_fast", settings, tmp_path_factory.mktemp("svd"))
    planned = [layer.plan for layer in svf_layers(model).values()]
    assert any(plan.host_tail is not None for plan in planned)
    return model, settings


def test_a_step_of_ours_is_within_its_bounds(plain):
    assert launches.launches(launches.record(plain, SETTINGS)) <= EAGER
    assert launches.launches(launches.record(plain, SETTINGS, graph=True)) <= IN_A_GRAPH


def test_a_step_with_guarded_directions_is_within_its_bounds(guarded):
    model, settings = guarded
    assert launches.launches(launches.record(model, settings)) <= EAGER
    assert launches.launches(launches.record(model, settings, graph=True)) <= IN_A_GRAPH


def test_values_come_to_the_host_in_one_copy_a_step(plain):
    """S of all layers at once; nothing that waits, and nothing from the host."""
    found = launches.counted(launches.record(plain, SETTINGS))
    assert found[TO_HOST] == {"what follows from S": 1} and TO_DEVICE not in found


def test_guarded_directions_are_compared_on_the_host(guarded):
    """One copy a step, not one a guarded layer: none is kept on the GPU to be compared with."""
    model, settings = guarded
    found = launches.counted(launches.record(model, settings))
    assert found[TO_HOST] == {"what follows from S": 1} and TO_DEVICE not in found
    assert launches.copies(launches.record(model, settings, graph=True)) == 0


def test_nothing_comes_to_the_host_in_a_graph(plain):
    assert launches.copies(launches.record(plain, SETTINGS, graph=True)) == 0


def test_size_and_architecture_change_no_count(plain):
    """A product may be this kernel or that one, but it is one."""
    large = Settings(size=641, batch=6, width=16, dtype="bfloat16", channels_last=True)
    small, other = launches.record(plain, SETTINGS), launches.record(plain, large, arch=80)
    assert {p: len(found) for p, found in small.items()} == {p: len(f) for p, f in other.items()}


def test_the_frozen_bound_by_hand():
    """42 convolutions with a bias, 39 ReLUs, 13 sums; forward and back."""
    step = launches.record(launches.network("frozen bound", SETTINGS), SETTINGS)
    found = {kernel: sum(phases.values()) for kernel, phases in launches.counted(step).items()}
    casts = found.pop("_to_copy")
    assert casts == 42 + 42 + 1 + 1  # weights, biases, what enters, and the gradient of that
    assert found == {
        "convolution": 42,
        "bias": 42,
        "input gradient": 42,
        "relu_": 39,
        "threshold_backward": 39,
        "add": 26,
    }
    assert len(step["accumulation"]) == 13
    assert launches.launches(step) == casts + 42 * 3 + 39 * 2 + 26


def test_the_products_of_a_step_of_ours_by_hand(plain):
    """A product forward and one back for 26 of the 1×1 convolutions, a shortcut's is a third."""
    step = launches.record(plain, SETTINGS)
    forward = launches.counted({phase: step[phase] for phase in ("forward",)})
    assert forward["pointwise_kernel"] == {"forward": 26}
    assert forward["convolution"] == {"forward": 13 + 3}
    assert not step["guards"] and not step["accumulation"]


def test_all_is_as_it_was_afterwards():
    """Triton's switches among it: one that is set goes into the environment, and stays there."""
    before, interprets = dict(os.environ), knobs.runtime.interpret
    with absent_gpu():
        assert not knobs.runtime.interpret
    assert (dict(os.environ), knobs.runtime.interpret) == (before, interprets)
    assert torch.ones(2).cpu().device.type == "cpu"


def test_single_ops():
    with absent_gpu() as gpu:
        x = torch.ones(4, 6).to("cuda")
        assert x.is_cuda and x.device.type == "cuda"
        assert kernels(gpu) == [TO_DEVICE]
        y = x + 1
        assert kernels(gpu) == ["add"] and y.is_cuda
        y.T[1:].reshape(-1, 4).detach().expand(5, 4)
        torch.empty_like(y), y.new_empty(3), torch.empty(0, device="cuda")
        assert kernels(gpu) == []
        torch.cat([x, y])
        x.scatter(1, torch.zeros(4, 1, dtype=torch.int64).to("cuda"), 1.0)
        assert kernels(gpu) == ["cat", TO_DEVICE, "scatter", "scatter"]
        torch.zeros(3, device="cuda"), y.mul_(x)
        assert kernels(gpu) == ["zeros", "mul_"]
        assert y.sum().item() == 48.0 and y.cpu().device.type == "cpu"
        assert kernels(gpu) == ["sum", TO_HOST, TO_HOST]
        torch.full((2,), 3.0, device="cpu").add(1)
        assert kernels(gpu) == []


def test_a_list_is_one_launch_as_far_as_one_takes_it():
    with absent_gpu() as gpu:
        many = [torch.ones(2).to("cuda") for _ in range(111)]
        gpu.take()
        torch._foreach_mul_(many, 2.0)
        assert kernels(gpu) == ["_foreach_mul_"] * 2
        torch._foreach_add_(many[:64], many[:64])
        assert kernels(gpu) == ["_foreach_add_"]


def test_layout_copies_of_convolutions():
    with absent_gpu() as gpu:
        weight = torch.ones(8, 8, 3, 3).to("cuda")
        last = weight.contiguous(memory_format=torch.channels_last)
        x = gpu.maps((2, 8, 5, 5), torch.float32, True)
        gpu.take()
        y = functional.conv2d(x, last, padding=1)
        assert kernels(gpu) == ["convolution"] and y.stride() == x.stride()
        functional.conv2d(x, weight, padding=1)
        assert kernels(gpu) == [LAYOUT_COPY, "convolution"]

        def backward(stand_in: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.convolution_backward(
                y, stand_in, last, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1,
                (True, False, False),
            )[0]  # fmt: skip

        # its strides say "contiguous": there and back again
        grad = backward(x.new_empty(1).expand(x.shape))
        assert kernels(gpu) == [LAYOUT_COPY, LAYOUT_COPY, "input gradient"]
        assert grad.stride() == x.stride()
        backward(y)
        assert kernels(gpu) == ["input gradient"]


def test_layout_copies_of_compiled_ops():
    with absent_gpu() as gpu:
        a, b = (gpu.maps((2, 8, 5, 5), torch.float32, last) for last in (True, False))
        torch.ops.svf_fast.channel_dot(a, a)
        assert kernels(gpu) == ["channel_dot"] * 2
        torch.ops.svf_fast.channel_dot(a, b)
        assert kernels(gpu) == [LAYOUT_COPY, *["channel_dot"] * 2]


def test_bytes_of_a_launch():
    with absent_gpu() as gpu:
        x = gpu.maps((2, 8, 5, 5), torch.bfloat16, True)
        torch.add(x, x.new_empty(1).expand(x.shape))
        (launch,) = gpu.take()
    assert launch.bytes == 2 * (400 + 1 + 400)


def test_tensors_do_not_leave_it():
    with absent_gpu() as gpu:
        x = torch.ones(2).to("cuda")
        with pytest.raises(RuntimeError, match="values of a map are asked for"):
            gpu.maps((1, 1, 2, 2), torch.float32, True).cpu()
    with pytest.raises(RuntimeError, match="outside"):
        x + 1


def test_the_table_and_the_json_say_the_same(capsys):
    given = ["--peers", "frozen bound", "--width", "16", "--size", "33"]
    assert launches.main(given) == 0
    text = capsys.readouterr().out
    assert launches.main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["peers"]["frozen bound"]["eager"]
    assert f"frozen bound, eager: {found['launches']} launches" in text
    assert f"| {found['launches']} |\n" in text
    assert sum(sum(p.values()) for p in found["by op and phase"].values()) == found["launches"]
