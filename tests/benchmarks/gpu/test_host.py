"""Host time is measured in turns, and the way of a GPU is taken where it is said to be."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import svf_fast
from benchmarks.gpu import host, tables
from benchmarks.race.levels import LEVELS, Settings, trained
from svf_fast.layers.factored import svf_layers


def test_both_paths_as_they_are_called(root, tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = ["-m", "benchmarks.gpu.host", "--rounds", "2", "--what", "bottleneck"]
    done = subprocess.run(
        [sys.executable, *command, "--results", str(tmp_path)],
        cwd=root, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "host.json").read_text())
    assert [group["path"] for group in result["groups"]] == list(host.PATHS)
    for group in result["groups"]:
        assert {(r["peer"], r["changed"]) for r in group["rows"]} == {
            (name, changed) for name in host.PEERS for changed in (True, False)
        }
        for row in group["rows"]:
            assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
            assert min(row["seconds"]) <= row["low"] <= row["median"] <= row["high"]
    assert tables.host_table(result) in done.stdout


def test_peers_take_turns_and_s_changes_only_where_it_should(monkeypatch):
    level, settings = LEVELS["block"], Settings(size=17, batch=1, width=4)
    network = level.network(settings, "layer2").requires_grad_(False)
    names = ("official", "svf_fast")
    networks = {name: level.convert(copy.deepcopy(network), name, None) for name in names}
    inputs = level.inputs(settings, "layer2")
    parameters = {name: next(iter(trained(n).values())) for name, n in networks.items()}
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(
        host, "step", lambda level, network, inputs, name, _: seen.append((name, version(name)))
    )

    def version(name: str) -> int:
        return parameters[name]._version

    for changed in (True, False):
        start = {name: version(name) for name in networks}
        seen.clear()
        found = host._in_turns(level, networks, inputs, settings, changed, 4)
        assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys(networks, 4)
        turns = [name for name, _ in seen]
        assert all(set(turns[at : at + 2]) == set(networks) for at in range(0, len(turns), 2))
        assert all(a == b for a, b in zip(turns[1::2], turns[2::2], strict=False))  # to and fro
        for name in networks:
            versions = [found - start[name] for seen_name, found in seen if seen_name == name]
            assert versions == [number * changed for number in range(1, len(versions) + 1)]


def test_parameters_say_that_they_are_on_a_gpu():
    model = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    model.requires_grad_(False)
    model = host.placed(svf_fast.convert(model, None, progress=False))
    (layer,) = svf_layers(model).values()
    assert layer.S.is_cuda and layer.U.is_cuda and layer.S.requires_grad
    assert model[1].running_var.device.type == "cuda"
    with host.gpu_path():
        x = torch.randn(1, 8, 3, 3).contiguous(memory_format=torch.channels_last)
        assert layer.S.is_cuda and not layer.is_captured
        assert svf_fast.ops.maps.on_gpu(x)
    assert not svf_fast.ops.maps.on_gpu(x)


def test_quartiles_by_hand():
    assert host.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"low": 2.0, "median": 3.0, "high": 4.0}
