"""What a launch costs, by hand: bytes, what comes again from L2, FLOPs, and the time of it."""

from __future__ import annotations

import dataclasses
import itertools
import math

import costs
import gpu_tables
import launches
import predictions
import pytest
import roofline
import torch
from absent_gpu import Launch, Operand, absent_gpu
from levels import Settings

SETTINGS = Settings(size=641, batch=6, width=16, dtype="bfloat16", channels_last=True)
RATES = {"memory": 100.0, "l2": 1000.0, "bfloat16": 10.0, "tf32": 5.0, "float32": 1.0}


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[Launch]]:
    """Of a step of ours with maps of 64 to 1024 channels, by name."""
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
    )
    assert found[1] == (4 * (60 + 60 + 48), 0, 2 * 3 * 4 * 4 * 5, "float32")


def test_time_is_the_longest_of_three():
    assert costs.Cost(500.0, 100.0, 7.0).seconds(RATES) == 5
    assert costs.Cost(500.0, 7000.0, 7.0).seconds(RATES) == 7
    assert costs.Cost(500.0, 0.0, 70.0).seconds(RATES) == pytest.approx(10)
    assert costs.Cost(0.0, 0.0, 7.0, "float32").seconds(RATES) == pytest.approx(10)


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
    result = {"groups": [{"name": "batch 6", "batch": 6, "rows": rows}]}

    class Measured:
        def of(self, level):
            of_peers = [{"peer": n, "changed": True, "median": 1.0} for n in launches.PEERS]
            group = {"path": "GPU path", "what": "layers 2-4", "rows": of_peers}
            return [{"groups": [group]}]

    text = gpu_tables.predictions_table(result, Measured())
    (line,) = (line for line in text.splitlines() if line.startswith("| **svf_fast** |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == f"{ours['eager']['launches']}, {ours['in a graph']['launches']}"
    assert cells[5] == "1000.0" and cells[6] == "1000.0 (1.00)"  # the host is what takes longest
    graph = [row["in a graph"]["device_seconds"]["A100 80GB SXM"] for row in rows]
    assert cells[7] == f"{1e3 * graph[2]:.1f} ({graph[2] / graph[0]:.2f})"
