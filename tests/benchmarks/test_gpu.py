"""`make gpu` without a GPU: the phases run, a failing one stops nothing, verdicts can fall."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import figures
import gpu
import gpu_tables
import gpu_tests
import processes
import pytest
import race
import torch
from levels import LEVELS, Settings

RACED = Settings(
    size=641, batch=6, dtype="bfloat16", channels_last=True, device="cuda", stride_on="conv1"
)


def test_limits_fit_into_ten_minutes():
    assert gpu.TOTAL <= 590
    assert len({phase.name for phase in gpu.PHASES}) == len(gpu.PHASES)


def test_every_phase_has_a_command_that_is_there(root):
    options = gpu.Options(root / "nowhere", False, "none")
    for phase in gpu.PHASES:
        python, *words = phase.command(options, 60)
        assert python == sys.executable
        if words[0].endswith(".py"):
            assert (root / words[0]).is_file(), phase.name


def test_dry_run(tmp_path, capsys):
    """The plumbing from the machine's facts to the tables, each a process as on a GPU."""
    names = "facts,roofline,replay,render"
    assert gpu.main(["--dry-run", "--phases", names, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "predicted" in printed and printed.count("ok, ") == 2 * 4
    summary = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["phase"] for row in summary["phases"]] == names.split(",")
    for name in ("facts", "roofline", "replay"):
        assert (tmp_path / f"{name}.md").read_text().startswith("| ")
    checked = figures.check(gpu_tables.Results(tmp_path))
    assert all(value is None and verdict is None for _, _, value, verdict in checked)


def test_a_failing_phase_and_one_out_of_time_stop_nothing(tmp_path, capsys):
    def python(code: str):
        return lambda options, seconds: [sys.executable, "-c", code]

    phases = [
        gpu.Phase("fails", 2, python("print('why'); raise SystemExit(3)")),
        gpu.Phase("hangs", 2, python("import time; print('on', flush=True); time.sleep(60)")),
        gpu.Phase("runs", 2, python("import os; print(os.environ['SVF_FAST_CACHE'])")),
    ]
    found = {"capability": None}
    started = time.monotonic()
    rows = gpu.run_all(phases, gpu.Options(tmp_path, True, "none"), 6, found)
    assert time.monotonic() - started < 6
    assert [row["status"] for row in rows] == ["failed (3)", "out of time", "ok"]
    assert rows[0]["last_line"] == "why" and rows[2]["last_line"] == str(tmp_path / "cache")
    text = gpu.summary(rows, tmp_path)
    assert "failed (3)" in text and "out of time" in text


def test_what_is_missing_is_named(monkeypatch):
    cpu = {"torch": "2.13.0+cpu", "cuda": None, "gpu": None, "capability": None}
    assert any("a CUDA build of torch" in line for line in gpu.missing(cpu, dry=False))
    assert not any("CUDA" in line for line in gpu.missing(cpu, dry=True))
    no_gpu = cpu | {"torch": "2.13.0", "cuda": "13.0"}
    assert any("is_available() is False" in line for line in gpu.missing(no_gpu, dry=False))
    monkeypatch.setattr(gpu, "NEEDED", (*gpu.NEEDED, "no_such_package"))
    assert any("pip install no-such-package" in line for line in gpu.missing(cpu, dry=True))
    monkeypatch.setattr(gpu, "MINIMUM", {"setuptools": (1000,)})
    assert any("setuptools >= 1000" in line for line in gpu.missing(cpu, dry=True))


def test_children_of_a_stopped_process_are_stopped_too(tmp_path):
    child = "import time; time.sleep(3); open('late', 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    ended = processes.run([sys.executable, "-c", code], tmp_path / "log", 1)
    assert ended.status is None and ended.word == "out of time"
    time.sleep(2.5)
    assert not (processes.ROOT / "late").exists()


def test_outcomes_of_tests_are_counted(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [0, 1, 2])\n"
        "def test_n(n):\n"
        "    if n == 2: pytest.skip('no')\n"
        "    assert n == 0, 'one is not zero'\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider", str(file)]
    processes.run(command, tmp_path / "log", 60)
    counts = gpu_tests.counted((tmp_path / "log").read_text())
    assert (counts["passed"], counts["failed"], counts["skipped"], counts["errors"]) == (1, 1, 1, 0)
    assert len(counts["failures"]) == 1 and "one is not zero" in counts["failures"][0]


def test_kernels_are_tested_first():
    names = [path.name for path in gpu_tests.files()]
    kernels = [n for n, name in enumerate(names) if name.startswith("test_triton")]
    assert kernels == list(range(len(kernels)))
    assert any(name.startswith("test_gpu_") for name in names)


def measured(folder, **rows):
    """A race on a GPU, as if it had run: seconds and peak of each peer."""
    listed = [
        {"peer": name.replace("_", " "), "seconds": [s] * 3, "peak_bytes": p, "saved_bytes": p}
        for name, (s, p) in rows.items()
    ]
    listed += [{"peer": "svf_fast", "seconds": [0.006] * 3, "peak_bytes": 1000, "saved_bytes": 1}]
    settings = dataclasses.asdict(RACED)
    content = {
        "level": "backbone",
        "title": "Backbone",
        "settings": settings,
        "groups": [{"name": "layers 2-4", "rows": listed}],
    }
    (folder / "backbone-gpu.json").write_text(json.dumps(content))
    facts = {"gpu": "Some GPU", "torch": "2.11"}
    facts |= {"copy_bytes_per_second": 4.8e12, "matmul_flops_per_second": 9.0e14}
    content = {"level": "facts", "settings": {"device": "cuda"}, "groups": [{"facts": facts}]}
    (folder / "facts.json").write_text(json.dumps(content))
    return {row[0].name: row for row in figures.check(gpu_tables.Results(folder))}


def test_verdicts(tmp_path):
    good = measured(
        tmp_path, official=(0.014, 6000), frozen_bound=(0.0055, 1), recomposed=(0.01, 5000)
    )
    value, verdict = good["layers 2-4: time over the official chain's"][2:]
    assert value == pytest.approx(6 / 14) and verdict
    value, verdict = good["layers 2-4: time over the best peer's"][2:]
    assert value == pytest.approx(0.6) and verdict  # recomposed, not the bound
    assert good["layers 2-4: peak over that peer's"][2:] == (0.2, True)
    value, verdict = good["layers 2-4: share of the roofline"][2:]
    assert 0.5 < value < 1.0 and verdict == (value >= 0.6)
    assert good["step: time over the official chain's"][2:] == (None, None)
    bad = measured(tmp_path, official=(0.007, 3000), frozen_bound=(0.004, 1))
    for name in (
        "layers 2-4: time over the official chain's",
        "layers 2-4: peak over the official chain's",
        "layers 2-4: time over the frozen bound's",
        "layers 2-4: time over the best peer's",
    ):
        assert bad[name][3] is False, name
    assert "**no**" in figures.markdown(gpu_tables.Results(tmp_path))


def test_a_cpu_result_is_no_measured_figure(tmp_path):
    measured(tmp_path, official=(0.014, 6000))
    path = tmp_path / "backbone-gpu.json"
    content = json.loads(path.read_text())
    content["settings"]["device"] = "cpu"
    path.write_text(json.dumps(content))
    checked = figures.check(gpu_tables.Results(tmp_path))
    assert all(value is None for _, _, value, _ in checked)


def test_a_peer_out_of_memory_says_so(monkeypatch):
    """On a GPU its row has a reason and the race goes on."""
    tiny = Settings(size=33, width=8, batch=1)
    contest = race.Contest(LEVELS["block"], "layer2", tiny, ["official", "full", "svf_fast"])
    step = race.step

    def full(level, network, inputs, name, settings):
        if name == "full":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        step(level, network, inputs, name, settings)

    monkeypatch.setattr(race, "step", full)
    rows = {row["peer"]: row for row in contest.run(rounds=1, peaks=False)["rows"]}
    assert "out of memory" in rows["full"]["reason"] and rows["full"]["skipped"]
    assert rows["official"]["seconds"] and rows["svf_fast"]["seconds"]
