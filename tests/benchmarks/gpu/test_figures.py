"""What the figures say of predictions and of kernels alone, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import render
from benchmarks.gpu import figures, tables


def predicted(name: str, seconds: float, least: float) -> dict:
    modes = {mode: {"device_seconds": {"H200": seconds}} for mode in ("in a graph",)}
    return {"peer": name, "roofline_seconds": {"H200": least}, **modes}


def written(folder: Path, level: str, rows: list[dict], **settings) -> None:
    group = {"name": "batch 6", "batch": 6, "rows": rows}
    content = {"level": level, "settings": settings, "groups": [group], "commit": "abc1234"}
    (folder / f"{level}.json").write_text(json.dumps(content))


def test_predictions_are_those_of_the_code_captured(tmp_path):
    rows = [
        predicted("official", 0.030, 0.012),
        predicted("recomposed, BN folded", 0.020, 0.012),
        predicted("frozen bound", 0.010, 0.008),
        predicted("svf_fast", 0.012, 0.006),
    ]
    written(tmp_path, "predictions", rows, size=641)
    checked = {row[0].name: row for row in figures.check(tables.Results(tmp_path))}
    shown = {name: row[1] for name, row in checked.items() if "layers 2-4" in name}
    assert shown == {
        "layers 2-4: time over the official chain's": "0.40 (H200)",
        "layers 2-4: peak over the official chain's": "—",
        "layers 2-4: time over the best peer's": "0.60 (H200)",
        "layers 2-4: peak over that peer's": "—",
        "layers 2-4: time over the frozen bound's": "1.20 (H200)",
        "layers 2-4: share of the roofline": "50 % (H200)",
    }
    assert all(value is None for _, _, value, _ in checked.values())
    assert "no GPU has run it yet" in figures.markdown(tables.Results(tmp_path))


def test_kernels_alone_are_told_and_decide_nothing(tmp_path):
    facts = {"gpu": "Some GPU", "torch": "2.11"}
    content = {"level": "facts", "settings": {"device": "cuda"}, "groups": [{"facts": facts}]}
    (tmp_path / "facts.json").write_text(json.dumps(content))
    taken = {"svf_fast": 0.012, "official": 0.030, "frozen bound": 0.010}
    rows = [{"peer": name, "kernel_seconds": seconds} for name, seconds in taken.items()]
    written(tmp_path, "profile", rows, device="cuda")
    results = tables.Results(tmp_path)
    text = figures.markdown(results)
    told = "Kernels alone, batch 6, commit abc1234: 0.40 of official's and 1.20 of the bound's time"
    assert told in text and "Measured: Some GPU, torch 2.11." in text and "no GPU" not in text
    assert all(value is None for _, _, value, _ in figures.check(results))


def test_kernels_are_told_apart_by_their_names():
    common = "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<"
    names = [common + f"at::native::(anonymous namespace)::{what}" for what in ("mul", "copy")]
    assert [tables.kernel_name(name) for name in names] == [
        "elementwise_kernel<128, 4, mul",
        "elementwise_kernel<128, 4, copy",
    ]
    assert len(tables.kernel_name("x" * 200)) == 90


@pytest.mark.parametrize("ours", [{"reason": "RuntimeError: …"}, {"seconds": [0.01]}])
def test_a_race_without_our_time_is_not_drawn(tmp_path, ours):
    rows = [{"peer": "official", "seconds": [0.04]}, {"peer": "svf_fast", **ours}]
    written(tmp_path, "backbone", rows, device="cuda")
    assert render._on_gpu(tmp_path / "backbone.json") == ("seconds" in ours)
