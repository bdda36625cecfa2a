"""What a launch costs, by hand: bytes, what comes again from L2, FLOPs, and the time of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch

from benchmarks.files import RESULTS
from benchmarks.gpu import costs, launches, predictions, roofline, tables
from benchmarks.gpu.absent_gpu import LAYOUT_COPY, Launch, Operand, absent_gpu
from benchmarks.race.levels import Settings

SETTINGS = Settings(size=641, batch=6, width=16, dtype="bfloat16", channels_last=True)
RATES = {"memory": 100.0, "l2": 1000.0, "bfloat16": 10.0, "tf32": 5.0, "float32": 1.0}
RATES |= {"processors": 4, "issue": 1.0}


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[Launch]]:
    """Return the kernels of a step of ours with maps of 64 to 1024 channels, by name."""
    settings = dataclasses.replace(SETTINGS, width=32)
    step = launches.record(launches.network("svf_fast", settings), settings)
    found: dict[str, list[Launch]] = {}
    for launch in itertools.chain.from_iterable(step.values()):
        found.setdefault(launch.kernel, []).append(launch)
    return found


def operands(launch: Launch) -> dict[str, Operand]:
    return dict(zip(launch.options["names"], launch.inputs, strict=True))


def test_pointwise_products_by_hand(kernels):
    """Rows of x and of its mask come again for each tile across, the weight for each down."""
    masked = 0
    for launch in kernels["pointwise_kernel"]:
        found, given, numbers = costs.cost(launch), operands(launch), launch.options
        (D, K), P = given["weight"].shape, math.prod(given["x"].shape) // given["weight"].shape[1]
        assert found.flops == 2 * P * K * D and found.engine == "bfloat16"
        vectors = [name for name in ("in_scale", "in_shift") if name in given]
        outer = [n for n in ("scale", "shift", "residual_scale") if n in given]
        maps = [name for name in ("residual", "out", "y") if name in given]
        bits = [given[name].bytes for name in ("in_mask", "residual_mask", "mask") if name in given]
        assert found.bytes == 2 * (P * K + D * K + len(maps) * P * D) + sum(bits) + 4 * (
            len(vectors) * K + len(outer) * D + (64 if "numbers" in given else 0)
        )
        across, down = -(-D // numbers["BLOCK_D"]), -(-P // numbers["BLOCK_P"])
        rows = 2 * P * K + (P * K // 8 if "in_mask" in given else 0)
        slack = 16 * across  # a mask has bytes that hold no element
        assert abs(found.l2 - found.bytes - rows * (across - 1) - 2 * D * K * (down - 1)) <= slack
        masked += "in_mask" in given
    assert masked == 13 + 3  # what a last ReLU's gradient goes to: conv3, shortcuts


def test_grams_of_activations_by_hand(kernels):
    """Rows of y (of grad and y for the matrix before) and columns of the other map a tile."""
    seen = set()
    for launch in kernels["activation_grams_partial_kernel"]:
        found, numbers, y = costs.cost(launch), launch.options, operands(launch)["y"]
        P, C, sides = (
            math.prod(y.shape) // numbers["channels"],
            numbers["channels"],
            numbers["sides"],
        )
        before, after = sides == 2 or numbers["side"] == 0, sides == 2 or numbers["side"] == 1
        a, b = numbers["BLOCK_A"], numbers["BLOCK_B"]
        tiles = (C // a) * (C // b)
        matrices = 4 * numbers["grid"][0] // tiles * C * C
        assert found.flops == 2 * P * C * C * sides
        assert found.bytes == 2 * 3 * P * C + 2 * 4 * C + matrices
        columns = 0 if numbers["ONE_TILE"] else b  # one tile has loaded them as its rows
        of_a_tile = before * (2 * a + columns) + after * (a + columns)
        assert found.l2 == 2 * P * of_a_tile * tiles + 2 * P * C + 2 * 4 * C + matrices
        seen.add((C, sides))
    assert {C for C, _ in seen} == {64, 128, 256} and {sides for _, sides in seen} == {1, 2}


def test_gram_matrices_by_hand(kernels):
    for launch in kernels["gram_partial_kernel"]:
        found, numbers, given = costs.cost(launch), launch.options, operands(launch)
        P, rows, columns = numbers["positions"], numbers["BLOCK_A"], numbers["BLOCK_B"]
        P *= given["a"].shape[0]
        width_a, width_b = numbers["width_a"], numbers["width_b"]
        tiles = -(-width_a // rows) * -(-width_b // columns)
        partial = numbers["grid"][0] // tiles * width_a * width_b * 4
        assert found.flops == 2 * P * width_a * width_b
        assert found.bytes == 2 * P * (width_a + width_b) + partial
        read = -(-width_b // columns) * width_a + -(-width_a // rows) * width_b
        assert found.l2 == 2 * P * read + partial


def test_convolutions_and_products_by_hand():
    with absent_gpu() as gpu:
        x = gpu.maps((2, 16, 9, 9), torch.bfloat16, True)
        weight = torch.zeros(8, 16, 3, 3, dtype=torch.bfloat16).to("cuda")
        weight = weight.contiguous(memory_format=torch.channels_last)
        gpu.take()
        y = torch.conv2d(x, weight)
        a, b = (torch.zeros(3, 4, 5).to("cuda") for _ in range(2))
        torch.bmm(a, b.mT)
        found = [costs.cost(launch) for launch in gpu.take() if not launch.is_copy_between]
    assert y.shape == (2, 8, 7, 7)
    assert found[0] == (
        2 * (2 * 16 * 81 + 8 * 16 * 9 + 2 * 8 * 49),
        0,
        2 * 2 * 49 * 8 * 144,
        "bfloat16",
        "library",
        math.inf,
    )
    bmm = (4 * (60 + 60 + 48), 0, 2 * 3 * 4 * 4 * 5, "float32", "library", math.inf)
    assert found[1] == bmm


def test_s_gradients_read_off_by_hand(kernels):
    """A matrix once, its rows of ``left`` and columns of ``right`` again for each tile."""
    seen = set()
    for launch in kernels["read_off_kernel"]:
        found, numbers, given = costs.cost(launch), launch.options, operands(launch)
        splits, matrices, rows, columns = given["partial"].shape
        down, across = -(-rows // numbers["BLOCK_A"]), -(-columns // numbers["BLOCK_B"])
        sides = [numbers["rank"], *([numbers["rank_after"]] if numbers["rank_after"] else [])]
        assert matrices == len(sides) and found.programs == down * across * matrices
        moved = 4 * splits * matrices * rows * columns + 4 * down * across * sum(sides)
        moved += sum(4 * rank * (rows + columns + 1) for rank in sides)
        again = sum(4 * rank * (rows * (across - 1) + columns * (down - 1)) for rank in sides)
        assert found.bytes == moved and found.l2 == moved + again
        assert found.flops == sum(2 * rank * rows * columns for rank in sides)
        seen.add(len(sides))
    assert seen == {1, 2}


def test_time_is_the_longest_of_three(monkeypatch):
    monkeypatch.setitem(costs.KINDS, "elementwise", costs.Kind(1.0))
    assert costs.Cost(500.0, 100.0, 7.0).seconds(RATES) == 1 + 5
    assert costs.Cost(500.0, 7000.0, 7.0).seconds(RATES) == 1 + 7
    assert costs.Cost(500.0, 0.0, 70.0).seconds(RATES) == 1 + 7
    assert costs.Cost(0.0, 0.0, 7.0, "float32").seconds(RATES) == 1 + 7


def test_time_of_kinds_and_of_few_programs(monkeypatch):
    monkeypatch.setitem(costs.KINDS, "slow", costs.Kind(0.0, memory=50.0, l2=0.5, products=0.25))
    assert costs.Cost(500.0, kind="slow").seconds(RATES) == 10
    assert costs.Cost(500.0, kind="slow").seconds(RATES | {"issue": 0.5}) == 20
    assert costs.Cost(0.0, 1000.0, kind="slow", programs=4).seconds(RATES) == 2
    assert costs.Cost(0.0, 1000.0, kind="slow", programs=1).seconds(RATES) == 8
    assert costs.Cost(0.0, 0.0, 10.0, kind="slow", programs=2).seconds(RATES) == 8


def test_how_kernels_go_through_their_maps():
    with absent_gpu() as gpu:
        x = gpu.maps((2, 8, 5, 5), torch.bfloat16, True)
        scale, bias = (torch.ones(1, 8, 1, 1).to("cuda") for _ in range(2))
        weight = torch.zeros(4, 8, 1, 1, dtype=torch.bfloat16).to("cuda")
        gpu.take()
        (x + x), x * 2.0, (x * scale), torch.conv2d(x, weight, weight[:, 0, 0, 0])
        x.contiguous(), x.sum((0, 2, 3), True), torch.cat([bias.flatten(), scale.flatten()])
        found = {launch.kernel: costs.cost(launch).kind for launch in gpu.take()}
    assert found == {
        "add": "elementwise",
        "mul": "broadcast",
        "convolution": "library",
        "bias": "broadcast",
        "clone": "transposing",
        "sum": "sum over positions",
        "cat": "elementwise",
    }


def test_batch_norm_leaves_channels_last_on_the_way_back():
    """As ATen does in evaluation mode, so the convolution before it begins with a copy."""
    with absent_gpu() as gpu:
        x = gpu.maps((2, 8, 5, 5), torch.float32, True).requires_grad_()
        weight = torch.zeros(8, 8, 1, 1).to("cuda").contiguous(memory_format=torch.channels_last)
        norm = torch.nn.BatchNorm2d(8).to("cuda").eval().requires_grad_(False)
        y = norm(torch.conv2d(x, weight))
        gpu.take()
        y.backward(gpu.maps((2, 8, 5, 5), torch.float32, True))
        found = [(launch.kernel, costs.cost(launch).kind) for launch in gpu.take()]
    assert found[:3] == [
        ("native_batch_norm_backward", "transposing"),
        (LAYOUT_COPY, "transposing"),
        ("input gradient", "library"),
    ]


@pytest.mark.parametrize("name", ["official", "frozen bound"])
def test_kernels_take_what_was_measured(name):
    """Peers whose code is PyTorch's own: within 8 % of the profile of an H200."""
    rates = costs.MEASURED["H200"]
    profile = json.loads((RESULTS / "profile.json").read_text())
    full = dataclasses.replace(SETTINGS, width=64, stride_on=profile["settings"]["stride_on"])
    plain = launches.network(name, full)
    for group in profile["groups"]:
        (row,) = (row for row in group["rows"] if row["peer"] == name)
        step = launches.record(plain, dataclasses.replace(full, batch=group["batch"]))
        taken = costs.seconds(itertools.chain.from_iterable(step.values()), rates)
        taken -= costs.GAP * launches.launches(step)
        assert taken == pytest.approx(row["kernel_seconds"], rel=0.08)


@pytest.mark.parametrize("name", launches.PEERS)
def test_products_are_those_of_the_roofline(name):
    """Two counts of the same step: operands of launches, and shapes of the network."""
    step = launches.record(launches.network(name, SETTINGS), SETTINGS)
    found = [costs.cost(launch) for launches_ in step.values() for launch in launches_]
    expected = sum(p.flops for p in roofline.passes(SETTINGS, name))
    assert sum(c.flops for c in found) == pytest.approx(expected, rel=1e-9)
    least = sum(p.bytes for p in roofline.passes(SETTINGS, name))
    assert least < sum(c.bytes for c in found) < 1.35 * least


def test_predictions_and_their_table():
    rows = []
    for name in launches.PEERS:
        plain = launches.network(name, SETTINGS)
        rows.append({"peer": name, **predictions.predict(plain, SETTINGS)})
    ours = rows[-1]
    for row in rows:
        for mode in launches.MODES:
            assert row[mode]["unknown"] == []
            taken = row[mode]["device_seconds"]
            assert taken["A100 80GB SXM"] > taken["H100 SXM"] >= taken["H200"]
            assert taken["H200"] > row[mode]["launches"] * costs.GAP
    groups = [{"name": "batch 6", "batch": 6, "rows": rows}]
    result = {"settings": {"weights": "none"}, "groups": groups}

    class Measured:
        def of(self, level):
            of_peers = [{"peer": n, "changed": True, "median": 1.0} for n in launches.PEERS]
            group = {"path": "GPU path", "what": "layers 2-4", "rows": of_peers}
            return [{"groups": [group]}]

    text = tables.predictions_table(result, Measured())
    (line,) = (line for line in text.splitlines() if line.startswith("| **svf_fast** |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == f"{ours['eager']['launches']}, {ours['in a graph']['launches']}"
    assert cells[5] == "1000.0" and cells[6] == "1000.0 (1.00)"  # the host is what takes longest
    graph = [row["in a graph"]["device_seconds"]["A100 80GB SXM"] for row in rows]
    assert cells[7] == f"{1e3 * graph[2]:.1f} ({graph[2] / graph[0]:.2f})"
