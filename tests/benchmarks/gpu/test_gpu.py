"""`make gpu` without a GPU: all phases run, a kill loses nothing, a second call goes on.

SVF_LONG=1 kills twenty times, else a few; SVF_SEED repeats the moments that a failure printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import random
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.few_shot import regimes
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import figures, phases, processes, tables, tests
from benchmarks.race import contest, exactness
from benchmarks.race.levels import LEVELS, Settings
from fss.cli import build_parser
from tests.long import LONG

QUICK = "build,facts,race,roofline,elementwise,render"
RACED = Settings(
    size=641, batch=6, dtype="bfloat16", channels_last=True, device="cuda", stride_on="conv1"
)
NO_GPU = {"torch": "2.13.0+cpu", "cuda": None, "gpu": None, "capability": None}
# by phase, what it leaves
LEFT = {
    "facts": "facts.json",
    "tests-first": "tests-first.json",
    "race": "backbone-33px-batch1-bfloat16-channels_last-resnet50_8.json",
    "profile": "profile.json",
    "one-image": "one_image/backbone-33px-batch1-bfloat16-channels_last-resnet50_8.json",
    "replay": "replay.json",
    "train": "train.json",
    "step": "step-5shot-33px-bfloat16-channels_last-resnet50_8.json",
    "prior": "prior-33px-bfloat16-resnet50_8.json",
    "elementwise": "elementwise.json",
    "roofline": "roofline.json",
    "tests-rest": "tests-rest.json",
    "regimes": "regimes/regimes.json",
}


def python(code: str):
    return lambda options, seconds: [sys.executable, "-c", code]


def test_the_first_needs_fit_into_the_time():
    """What comes before the rest of the tests does, even at the limits of each phase."""
    names = [phase.name for phase in gpu.PHASES]
    assert gpu.TOTAL == 780 and len(set(names)) == len(names)
    first = gpu.PHASES[: names.index("step")]
    ends = sum(phase.seconds for phase in first) + gpu.PHASES[-1].seconds
    assert ends <= gpu.TOTAL
    order = ["build", "facts", "tests-first", "race", "profile", "one-image", "replay", "train"]
    assert names[:8] == order and names[-4:-1] == [
        "tune",
        "compiled-official",
        "compiled-recomposed",
    ]


@pytest.mark.parametrize("dry", [True, False])
def test_every_phase_has_a_command_that_is_there(root, tmp_path, dry):
    options = gpu.Options(tmp_path, dry, "none")
    for phase in gpu.PHASES:
        python, *words = phase.command(options, 60)
        assert python == sys.executable and all(isinstance(word, str) for word in words)
        if words[0] == "-m":
            assert importlib.util.find_spec(words[1]), phase.name
        else:
            assert words[0] == "-c" or (root / words[0]).is_file(), phase.name


def call(out: Path, *words: str) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out)]
    return [*command, "--archive", str(out) + ".tgz", *words]


def in_archive(path: Path) -> dict[str, str]:
    """Return the contents by name in the folder; check that every JSON file is complete."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            content = tar.extractfile(member).read()
            if member.name.endswith(".json"):
                json.loads(content)
            found[member.name.partition("/")[2]] = content.decode(errors="replace")
    return found


def done(printed: str) -> set[str]:
    """Return the phases that were reported as ok."""
    lines = printed.replace("…", "\n").splitlines()
    words = (line.strip().partition(": ") for line in lines)
    return {name for name, _, word in words if word.startswith(("ok, ", "done before"))}


def running(out: Path) -> list[str]:
    """List the commands of processes that write to a folder, whether absolute or relative."""
    found, folder = [], "/".join(out.parts[-3:])
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            words = path.read_bytes().decode(errors="replace").split("\0")
            if any(folder in word for word in words):
                found.append(" ".join(words))
    return found


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not (came := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return came


def all_ended(out: Path) -> bool:
    return eventually(lambda: not running(out))


def test_dry_run_of_every_phase_and_a_second_call(tmp_path, root):
    """The plumbing from the machine's facts to the tables, each a process as on a GPU."""
    out = tmp_path / "dry"
    first = subprocess.run(call(out), cwd=root, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert done(first.stdout) == {phase.name for phase in gpu.PHASES}
    summary = json.loads((out / "gpu.json").read_text())
    assert [row["phase"] for row in summary["phases"]] == [phase.name for phase in gpu.PHASES]
    archived = in_archive(tmp_path / "dry.tgz")
    assert set(LEFT.values()) <= archived.keys()
    for name in ("facts", "roofline", "replay", "profile", "train", "regimes/regimes"):
        assert archived[f"{name}.md"].startswith("| "), name
    assert not any("svd" in name for name in archived)
    checked = figures.check(tables.Results(out))
    assert all(value is None and verdict is None for _, _, value, verdict in checked)

    before = {name: (out / name).stat().st_mtime_ns for name in LEFT.values()}
    second = subprocess.run(call(out), cwd=root, capture_output=True, text=True)
    assert second.returncode == 0
    assert second.stdout.count("done before") == len(gpu.PHASES) - 2  # build and render repeat
    assert before == {name: (out / name).stat().st_mtime_ns for name in LEFT.values()}


def test_a_kill_at_any_moment_loses_nothing_that_was_done(tmp_path, root):
    """Each call goes on where the one before was killed, until all is there."""
    seed = int(os.environ.get("SVF_SEED", random.SystemRandom().randrange(10**6)))
    print(f"the moments are those of SVF_SEED={seed}")  # shown where the test fails
    moments, out = random.Random(seed), tmp_path / "dry"
    words = () if LONG else ("--phases", QUICK)
    known: set[str] = set()
    for _ in range(20 if LONG else 3):
        with subprocess.Popen(
            call(out, *words), cwd=root, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(1, 30 if LONG else 20))
            process.kill()
            said = done(process.stdout.read())
        assert all_ended(out), running(out)
        known |= said
        if not (tmp_path / "dry.tgz").exists():
            assert not known
            continue
        archived = in_archive(tmp_path / "dry.tgz")
        missing = {name for name in known & LEFT.keys() if LEFT[name] not in archived}
        assert not missing
        rows = json.loads(archived.get("gpu.json", '{"phases": []}'))["phases"]
        assert known <= {row["phase"] for row in rows if row["status"] == "ok"}
    ended = subprocess.run(call(out, *words), cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    again = known - {"build", "render"}
    assert all(f"{name}: done before" in ended.stdout for name in again)


def test_sigterm_ends_all_and_leaves_an_archive(tmp_path, root):
    out = tmp_path / "dry"
    words = ("--phases", "facts,race")
    with subprocess.Popen(
        call(out, *words), cwd=root, stdout=subprocess.PIPE, text=True
    ) as process:
        printed = ""
        while "race: at most" not in printed:
            printed += process.stdout.read(1)
        assert eventually(lambda: len(running(out)) >= 3)  # this one, the guard, the race
        process.terminate()
        assert process.wait(30) == 143
    assert all_ended(out), running(out)
    assert "facts.json" in in_archive(tmp_path / "dry.tgz")


def test_a_failing_phase_and_one_out_of_time_stop_nothing(tmp_path, capsys):
    phases = [
        gpu.Phase("fails", 2, 1, python("print('why'); raise SystemExit(3)")),
        gpu.Phase("hangs", 2, 1, python("import time; print('on', flush=True); time.sleep(60)")),
        gpu.Phase("lacks", 2, 1, python("print()"), needs=("no_such_module",)),
        gpu.Phase("long", 60, 60, python("print()")),
        gpu.Phase("runs", 2, 1, python("import os; print(os.environ['SVF_FAST_CACHE'])")),
    ]
    started = time.monotonic()
    options = gpu.Options(tmp_path, True, "none")
    rows = gpu.run_all(phases, options, 20, NO_GPU)
    assert time.monotonic() - started < 15
    words = ["failed (3)", "out of time", "not run: no_such_module not installed, nor in wheels"]
    assert [row["status"] for row in rows] == [*words, "no time left", "ok"]
    assert rows[0]["last_line"] == "why" and rows[4]["last_line"] == str(tmp_path / "cache")
    text = gpu.summary(rows, tmp_path)
    assert "failed (3)" in text and "out of time" in text

    phases[0] = gpu.Phase("fails", 2, 1, python("print('mended')"))
    earlier = gpu.earlier_rows(tmp_path / "gpu.json", NO_GPU, pytest.fail)
    rows = gpu.run_all([phases[0], phases[4]], options, 20, NO_GPU, earlier)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert "runs: done before" in capsys.readouterr().out
    kept = json.loads((tmp_path / "gpu.json").read_text())["phases"]
    assert {row["phase"]: row["status"] for row in kept} == {
        "fails": "ok",
        "hangs": "out of time",
        "lacks": words[2],
        "long": "no time left",
        "runs": "ok",
    }


def test_time_is_kept_for_what_repeats(tmp_path):
    seen = []

    def told(options, seconds):
        seen.append(seconds)
        return [sys.executable, "-c", ""]

    phases = [gpu.Phase("much", 100, 1, told), gpu.Phase("last", 20, 1, told, repeats=True)]
    gpu.run_all(phases, gpu.Options(tmp_path, True, "none"), 60, NO_GPU)
    assert 37 <= seen[0] <= 40 and seen[1] == 20


def test_results_of_another_gpu_are_not_mixed(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"machine": {"gpu": "NVIDIA A100"}, "phases": []}))
    told: list[str] = []
    gpu.earlier_rows(path, {"gpu": "NVIDIA H100"}, told.append)
    assert "of NVIDIA H100" in told[0] and "those of NVIDIA A100" in told[0]


def test_real_weights_and_photos_are_found(tmp_path, monkeypatch):
    for name in (phases.IMAGENET, phases.PASCAL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("SVF_SHARED", str(tmp_path))
    found = gpu._shared(None, phases.IMAGENET, False)
    assert found.endswith(phases.IMAGENET) and (processes.ROOT / found).exists()
    assert gpu._shared(None, phases.PASCAL, True) == "none"
    assert gpu._shared("none", phases.PASCAL, False) == "none"
    options = gpu.Options(tmp_path, False, found, str(tmp_path / phases.PASCAL))
    words = phases.regimes(options, 400)
    assert "--data.min_area=1311" in words and f"--model.weights={found}" in words
    assert "--model.stride_on=conv1" in words
    assert json.loads((tmp_path / "regimes/plan.json").read_text())["steps"] == 1800
    steps = [word for word in phases.regimes(options, 90) if word.startswith("--steps")]
    assert steps == ["--steps=1800"]  # those of the first call


@pytest.mark.parametrize("photos", ["none", "packed", "400 px"])
def test_regimes_are_asked_of_fss_as_it_takes_them(tmp_path, monkeypatch, photos):
    (tmp_path / "pascal").mkdir()
    if photos == "packed":
        config = "data: {source: pascal, min_area: 541}"
        (tmp_path / "pascal/pascal.yaml").write_text(config)
    folder = "none" if photos == "none" else str(tmp_path / "pascal")
    options = gpu.Options(tmp_path, False, "resnet50.safetensors", folder)
    _, _, module, *words = phases.regimes(options, 300)
    monkeypatch.setattr(sys, "argv", [module, *words])
    given, extra = regimes._arguments()
    assert given.regimes == ["freeze", "svf", "full"] and given.seconds == 265
    assert given.folds == ([0] if photos == "none" else [0, 2])
    config = build_parser().parse_args(["train", "--config", given.config, *extra]).train
    assert config.data.source == ("shapes" if photos == "none" else "pascal")
    assert config.data.min_area == {"none": 0.02, "packed": 541, "400 px": 1311}[photos]
    assert (config.data.size, config.precision) == (225, "bf16-mixed")
    assert (config.steps, config.model.stride_on) == (1200, "conv1")


BARE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Missing())
import benchmarks.race.__main__, benchmarks.render
from benchmarks.gpu import elementwise, facts, profile, replay, roofline
"""


def test_races_and_tables_need_less_than_training(root):
    """A machine with a GPU may have torch and little else."""
    lacking = {name for name in phases.OF_FSS if name not in ("cv2", "yaml")}
    command = [sys.executable, "-c", BARE, *lacking]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wheels_are_unpacked(tmp_path):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels/some_package-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_package/__init__.py", "found = 1")
    gpu.unpack(tmp_path / "wheels", tmp_path / "site")
    assert gpu._is_here("some_package", tmp_path / "site")
    phases = [gpu.Phase("uses", 20, 1, python("import some_package"), needs=("some_package",))]
    (row,) = gpu.run_all(phases, gpu.Options(tmp_path, True, "none"), 20, NO_GPU)
    assert row["status"] == "ok"


def test_what_is_missing_is_named(monkeypatch):
    assert any("a CUDA build of torch" in line for line in gpu.missing(NO_GPU, dry=False))
    assert not any("CUDA" in line for line in gpu.missing(NO_GPU, dry=True))
    no_gpu = NO_GPU | {"torch": "2.13.0", "cuda": "13.0"}
    assert any("is_available() is False" in line for line in gpu.missing(no_gpu, dry=False))
    monkeypatch.setattr(gpu, "NEEDED", (*gpu.NEEDED, "no_such_package"))
    assert any("pip install no-such-package" in line for line in gpu.missing(NO_GPU, dry=True))
    monkeypatch.setattr(gpu, "MINIMUM", {"setuptools": (1000,)})
    assert any("setuptools >= 1000" in line for line in gpu.missing(NO_GPU, dry=True))


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
    counts = tests.counted((tmp_path / "log").read_text())
    assert (counts["passed"], counts["failed"], counts["skipped"], counts["errors"]) == (1, 1, 1, 0)
    assert len(counts["failures"]) == 1 and "one is not zero" in counts["failures"][0]


def test_small_files_are_tested_first_and_kernels_of_the_rest():
    first = tests.files("first")
    assert {path.parent.name for path in first} == {"gpu"}
    assert [path.stat().st_size for path in first] == sorted(path.stat().st_size for path in first)
    names = [path.parent.name for path in tests.files("rest")]
    kernels = [n for n, name in enumerate(names) if name == "triton"]
    assert kernels == list(range(len(kernels))) and len(names) > len(kernels) > 3


def test_files_that_have_ended_are_not_tested_again(tmp_path, monkeypatch, capsys):
    asked = []

    def tested(path, logs, deadline):
        asked.append(path.name)
        status = "out of time" if path.name == "test_gpu_sync.py" and len(asked) < 3 else "ok"
        counts = dict.fromkeys(tests.WORDS.values(), 1) | {"failed": 0, "errors": 0}
        row = {"file": str(path.relative_to(processes.ROOT)), "status": status, "seconds": 1}
        return row | counts | {"failures": []}

    monkeypatch.setattr(tests, "tested", tested)
    files = [f"tests/gpu/test_gpu_{name}.py" for name in ("ops", "sync")]
    command = ["gpu_tests.py", "--part", "first", "--out", str(tmp_path), "--files"]
    monkeypatch.setattr(sys, "argv", [*command, *(str(processes.ROOT / name) for name in files)])
    assert [tests.main() for _ in range(3)] == [1, 0, 0]
    assert sorted(asked[:2]) == ["test_gpu_ops.py", "test_gpu_sync.py"]
    assert asked[2:] == ["test_gpu_sync.py"]
    assert json.loads((tmp_path / "tests-first.json").read_text())["passed"] == 2


def measured(folder, **rows):
    """Write a race on a GPU as if it had run: seconds and peak of each peer."""
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
    return {row[0].name: row for row in figures.check(tables.Results(folder))}


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
    assert "**no**" in figures.markdown(tables.Results(tmp_path))


def test_neither_one_image_nor_a_race_apart_decides(tmp_path):
    """Their names come first among the files."""
    measured(tmp_path, official=(0.014, 6000))
    raced = json.loads((tmp_path / "backbone-gpu.json").read_text())
    for row in raced["groups"][0]["rows"]:
        row["seconds"] = [1.0]
    raced["settings"]["batch"] = 1
    (tmp_path / "backbone-a.json").write_text(json.dumps(raced))
    raced["settings"]["batch"] = 6
    (tmp_path / "backbone-b.json").write_text(json.dumps(raced | {"suffix": "compiled_official"}))
    checked = {row[0].name: row for row in figures.check(tables.Results(tmp_path))}
    value = checked["layers 2-4: time over the official chain's"][2]
    assert value == pytest.approx(6 / 14)


def test_a_cpu_result_is_no_measured_figure(tmp_path):
    measured(tmp_path, official=(0.014, 6000))
    path = tmp_path / "backbone-gpu.json"
    content = json.loads(path.read_text())
    content["settings"]["device"] = "cpu"
    path.write_text(json.dumps(content))
    checked = figures.check(tables.Results(tmp_path))
    assert all(value is None for _, _, value, _ in checked)


def test_a_peer_out_of_memory_says_so(monkeypatch):
    """On a GPU its row has a reason and the race goes on."""
    tiny = Settings(size=33, width=8, batch=1)
    raced = contest.Contest(LEVELS["block"], "layer2", tiny, ["official", "full", "svf_fast"])
    step = contest.step

    def full(level, network, inputs, name, settings):
        if name == "full":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        step(level, network, inputs, name, settings)

    monkeypatch.setattr(contest, "step", full)
    monkeypatch.setattr(exactness, "step", full)
    rows = {row["peer"]: row for row in raced.run(rounds=1, peaks=False)["rows"]}
    assert "out of memory" in rows["full"]["reason"] and rows["full"]["skipped"]
    assert rows["official"]["seconds"] and rows["svf_fast"]["seconds"]
