"""What a launch costs, by hand: bytes, what comes again from L2, FLOPs, and the time of it."""

from __future__ import annotations

import costs
import gpu_tables
import launches
import predictions
import pytest
import roofline
import torch
from absent_gpu import absent_gpu
from levels import Settings

from svf_fast.ops.gram import activation_grams, gram
from svf_fast.ops.pointwise import pointwise

SETTINGS = Settings(size=641, batch=6, width=16, dtype="bfloat16", channels_last=True)
RATES = {"memory": 100.0, "l2": 1000.0, "bfloat16": 10.0, "tf32": 5.0, "float32": 1.0}


def test_a_pointwise_product_by_hand():
    images, side, K, D = 6, 81, 128, 512
    with absent_gpu() as gpu:
        x = gpu.maps((images, K, side, side), torch.bfloat16, True)
        weight = torch.zeros(D, K, dtype=torch.bfloat16).to("cuda")
        scale = torch.zeros(D).to("cuda")
        gpu.take()
        pointwise(x, weight, scale=scale, shift=scale, relu=True)
        (launch,) = gpu.take()
    P, found = images * side * side, costs.cost(launch)
    assert found.flops == 2 * P * K * D and found.engine == "bfloat16"
    assert found.bytes == 2 * (P * K + D * K + P * D) + 2 * 4 * D
    rows, columns = launch.options["BLOCK_P"], launch.options["BLOCK_D"]
    tiles = -(-P // rows), D // columns
    again = 2 * (P * K * (tiles[1] - 1) + D * K * (tiles[0] - 1))
    assert found.l2 - found.bytes == again > 0


@pytest.mark.parametrize("before, after", ((1, 1), (1, 0), (0, 1)))
def test_grams_of_an_activation_by_hand(before, after):
    """Rows of y (of grad and y for the matrix before) and columns of the other map a tile."""
    images, side, C = 2, 81, 512
    with absent_gpu() as gpu:
        grad, y = (gpu.maps((images, C, side, side), torch.bfloat16, True) for _ in range(2))
        scale = torch.ones(C).to("cuda")
        gpu.take()
        activation_grams(grad, y, scale, scale, before, after)
        launch = next(x for x in gpu.take() if "names" in x.options)
    found, numbers = costs.cost(launch), launch.options
    P, sides = images * side * side, before + after
    tiles = (C // numbers["BLOCK_A"]) * (C // numbers["BLOCK_B"])
    splits = numbers["grid"][0] // (sides * tiles)
    matrices = 4 * sides * splits * C * C
    assert found.flops == 2 * P * C * C * sides
    assert found.bytes == 2 * 3 * P * C + 2 * 4 * C + matrices
    of_a_tile = before * (2 * numbers["BLOCK_A"] + numbers["BLOCK_B"])
    of_a_tile += after * (numbers["BLOCK_A"] + numbers["BLOCK_B"])
    assert found.l2 == 2 * P * of_a_tile * tiles + 2 * P * C + 2 * 4 * C + matrices


def test_a_gram_matrix_by_hand():
    images, side, a, b = 2, 81, 256, 512
    with absent_gpu() as gpu:
        left = gpu.maps((images, a, side, side), torch.bfloat16, True)
        right = gpu.maps((images, b, side, side), torch.bfloat16, True)
        gram(left, right)
        launch = next(x for x in gpu.take() if "names" in x.options)
    found, numbers = costs.cost(launch), launch.options
    P, rows, columns = images * side * side, numbers["BLOCK_A"], numbers["BLOCK_B"]
    partial = numbers["grid"][0] // ((a // rows) * (b // columns)) * a * b * 4
    assert found.flops == 2 * P * a * b
    assert found.bytes == 2 * P * (a + b) + partial
    assert found.l2 == 2 * P * (a // rows) * (b // columns) * (rows + columns) + partial


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
    assert ours["in a graph"]["launches"] < ours["eager"]["launches"]
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
