"""pytest-benchmark's suite times what is exact only, and its JSON has a group a case."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import bench_svf
from benchmarks.race.levels import LEVELS, Settings

LAYER = "layer2 conv1 256→128 1×1"


def test_its_json_has_a_group_for_each_case_and_pass(root, tmp_path):
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib"]
    command += ["benchmarks/bench_svf.py", "--benchmark-only", "--size", "33", "-k"]
    command += ["layer2 and (conv1 or block) or prior", "-p", "no:cacheprovider"]
    command += ["--benchmark-max-time", "0.001", f"--benchmark-json={tmp_path / 'bench.json'}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    content = json.loads((tmp_path / "bench.json").read_text())
    groups: dict[str, set[str]] = {}
    for row in content["benchmarks"]:
        groups.setdefault(row["group"], set()).add(row["name"])
        assert row["stats"]["min"] > 0 and row["extra_info"]["settings"]["size"] == 33
    peers = {f"layer: {LAYER}": set(bench_svf.NAMES), "block: layer2": set(bench_svf.NAMES)}
    peers["prior: cosine_max"] = {"official", "svf_fast"}
    passes = ("forward", "forward and backward")
    assert groups == {f"{case}, {p}": names for case, names in peers.items() for p in passes}
    assert content["machine_info"]["torch"] and content["machine_info"]["threads"]


def test_what_is_not_exact_is_not_timed(monkeypatch):
    peers, tiny = LEVELS["layer"].peers, Settings(size=33, batch=1)
    monkeypatch.setitem(peers, "svf_fast", peers["frozen bound"]._replace(trains="S"))
    bench_svf.checked.cache_clear()
    with pytest.raises(AssertionError, match="no speed: .*no gradient for"):
        bench_svf.test_speed(None, tiny, "layer", LAYER, "svf_fast", True)
    bench_svf.checked.cache_clear()
