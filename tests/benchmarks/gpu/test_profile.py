"""Where a step's time goes: what is there is kept, and every kernel is counted."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.gpu import profile, tables


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Call the module at a tiny size; return the peers and batches that it measured."""

    def call(*arguments: str) -> list[tuple[str, int]]:
        asked, measure = [], profile.measure

        def noted(level, network, inputs, name, settings, steps):
            asked.append((name, settings.batch))
            return measure(level, network, inputs, name, settings, steps)

        monkeypatch.setattr(profile, "measure", noted)
        monkeypatch.setattr(profile, "TIMED", 2)
        command = ["gpu_profile.py", "--device", "cpu", "--size", "17", "--width", "8"]
        command += ["--steps", "2", "--results", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        assert profile.main() == 0
        monkeypatch.setattr(profile, "measure", measure)
        return asked

    return call


def test_rows_that_are_there_are_kept(called):
    assert called("--batches", "2", "1", "--peers", "frozen bound") == [
        ("frozen bound", 2),
        ("frozen bound", 1),
    ]
    peers = ("--peers", "official;frozen bound")
    assert called("--batches", "2", "1", *peers) == [("official", 2), ("official", 1)]
    # of other settings nothing is kept
    assert called("--batches", "1", "--peers", "frozen bound") == [("frozen bound", 1)]


def test_kernels_are_counted_and_shown(called, tmp_path):
    called("--batches", "1", "--peers", "frozen bound")
    result = json.loads((tmp_path / "profile.json").read_text())
    (row,) = result["groups"][0]["rows"]
    counts = {kernel["name"]: kernel["launches"] for kernel in row["kernels"]}
    assert counts["aten::convolution_backward"] == 42  # of a step of layers 2-4, not of both
    assert row["launches"] == pytest.approx(sum(counts.values()))
    taken = [kernel["microseconds"] for kernel in row["kernels"]]
    assert taken == sorted(taken, reverse=True) and sum(taken) == pytest.approx(
        1e6 * row["kernel_seconds"]
    )
    table = tables.profile_table(result, tables.Results(tmp_path))
    assert table.startswith("|  |  | step, ms | host, ms | kernels, ms | launches |")
    assert "| frozen bound | batch 1 |" in table and "`aten::convolution_backward`" in table
