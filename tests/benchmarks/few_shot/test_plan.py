"""A plan is run in its order, chooses on base classes, and goes on where it was killed."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from pathlib import Path

import pytest
import yaml

import fss.cli
import fss.training.loop
import fss.training.run
from benchmarks.few_shot import plan as plans
from benchmarks.few_shot import planned, training
from benchmarks.few_shot.rows import Stopwatch, read_rows
from benchmarks.gpu.processes import Ended
from fss.config import TrainConfig
from fss.training.trainer import Trainer

TINY = {
    "data": {"size": 33, "workers": 0},
    "model": {"width": 4, "weights": "none", "channels": 8},
    "steps": 3,
    "batch_size": 2,
    "validation_every": 2,
    "validation_episodes": 2,
    "test_episodes": 2,
    "test_seeds": [1],
    "pictures": 0,
    "log_every": 1,
    "save_every": 1,
    "accelerator": "cpu",
}
LR, BACKBONE_LR = "optimizer.lr", "optimizer.backbone_lr"
STAGES = [
    {"regime": "freeze", "setting": LR, "values": [0.01, 0.02], "shared": True},
    {"regime": "svf", "setting": BACKBONE_LR, "values": [0.1, 0.2]},
    {"regime": "svf", "setting": "regime.layers", "values": [None, ["layer4"]]},
]
PLAN = {
    "config": "demo",
    "settings": TINY,
    "regimes": {"freeze": {"regime.name": "freeze"}, "svf": {"regime": {"name": "svf"}}},
    "search": {"stages": STAGES},
    "final": {"folds": [0, 2]},
}
TRIALS = ["freeze-lr=0.01", "freeze-lr=0.02", "svf-backbone_lr=0.1", "svf-backbone_lr=0.2"]
TRIALS = [f"trial-fold0-{name}" for name in (*TRIALS, "svf-layers=layer4")]
FINALS = [f"fold{fold}-{name}-seed321" for fold in (0, 2) for name in ("freeze", "svf")]


class Killed(BaseException):
    """Ends a process where nothing expects it."""


@pytest.fixture
def written(tmp_path):
    """Writes a plan; returns its path."""

    def write(**changes: object) -> Path:
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(PLAN | changes))
        return path

    return write


@pytest.fixture
def main(monkeypatch, tmp_path, written):
    """Runs the command on a plan, by default `PLAN`; returns the exit status."""

    def run(*arguments: str, path: Path | None = None, out: str = "out") -> int:
        words = [str(path or written()), "--out", str(tmp_path / out), *arguments]
        monkeypatch.setattr(sys, "argv", ["plan.py", *words])
        return plans.main()

    return run


@pytest.fixture
def trained(monkeypatch):
    """Stands for `fss train`: the settings of each run; base and novel mIoU by what is set."""
    asked: dict[str, dict[str, str]] = {}
    base = {"lr=0.01": 0.3, "backbone_lr=0.1": 0.2, "backbone_lr=0.2": 0.4}

    def make(config, folder, settings, deadline):
        asked[folder.name] = settings
        score = next((v for k, v in base.items() if folder.name.endswith(f"-{k}")), 0.1)
        folder.mkdir()
        (folder / "train.csv").write_text("step,loss\n3,1\n")
        (folder / "validation.csv").write_text(
            f"step,miou,fb_iou,train_miou,cat\n1,0,0,0,0\n3,{score},0.5,0.9,0\n"
        )
        spread = {"mean": 1 - score, "std": None, "values": [1 - score]}
        config = planned.nested({k: yaml.safe_load(v) for k, v in settings.items()})
        config["data"] |= {"source": "shapes", "shots": 1, "root": "/somewhere/photos"}
        config["model"] |= {"name": "baseline", "backbone": "resnet18"}
        result = {
            "test": {"miou": spread, "fb_iou": spread, "iou": {}, "episodes": {}},
            "config": TrainConfig.from_dict(config).to_dict(),
            "machine": {"gpu": None, "cpu": "a processor", "threads": 1},
            "versions": {"torch": "2"},
            "parameters": {"trained_backbone": 12},
            "step_seconds_median": 0.5,
            "saved_bytes_per_step": 2**20,
        }
        result["test"] |= {"step": 3, "checkpoint": "last.pt", "seeds": [1]}
        (folder / "result.json").write_text("{}")
        return result | dict.fromkeys(("steps", "epoch_images", "peak_memory_bytes", "commit"), 3)

    monkeypatch.setattr(plans, "make_run", make)
    return asked


def test_base_classes_choose_and_novel_ones_do_not(main, trained, tmp_path, capsys):
    """The novel classes would have chosen the other value of each."""
    assert main("--steps=4") == 0
    assert list(trained) == [*TRIALS, *FINALS]
    for name in FINALS:
        assert trained[name][LR] == "0.01"  # of freezing, for all
    assert trained["fold2-svf-seed321"][BACKBONE_LR] == "0.2"
    assert "regime.layers" not in trained["fold2-svf-seed321"]  # null was better
    assert BACKBONE_LR not in trained["fold2-freeze-seed321"]
    assert trained["trial-fold0-svf-layers=layer4"]["regime.layers"] == '["layer4"]'
    assert {each["validation_classes"] for each in trained.values()} == {"base"}
    assert {each["steps"] for each in trained.values()} == {"4"}
    rows = read_rows(tmp_path / "out")
    assert rows[TRIALS[3]]["base"] == {"miou": 0.4, "fb_iou": 0.5}
    assert rows[TRIALS[3]]["curve"]["train_miou"] == [0, 0.9]
    assert "done: 9 of 9 runs" in capsys.readouterr().out


def test_each_fold_can_choose_for_itself(main, trained, written):
    search = {"fold": "each", "stages": STAGES[:2]}
    assert main(path=written(search=search)) == 0
    trials = [name for name in trained if name.startswith("trial")]
    assert [name[:11] for name in trials] == ["trial-fold0"] * 4 + ["trial-fold2"] * 4
    assert trained["trial-fold2-svf-backbone_lr=0.1"]["data.fold"] == "2"


def test_table_and_curves_come_from_the_rows(main, trained, written, tmp_path, capsys):
    with pytest.raises(SystemExit, match="expected at least one finished run"):
        main("--table")
    assert main("--root", "/somewhere/photos") == 0
    name = tmp_path / "results" / "table"
    assert main("--table", str(name)) == 0
    text = name.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert "| svf | 12 | 90.0 | 90.0 | 90.0 | 90.0 | 10.0 | 10.0 | 0.50 | 1 |" in text
    assert "| 0 | svf | **backbone_lr=0.2** | 40.00 | 50.00 | 60.00 |" in text
    assert "| 0 | svf | backbone_lr=0.1 | 20.00" in text
    assert "Trials: freeze 2, svf 3." in text and "the novel classes of fold 2." in text
    assert (tmp_path / "results" / "table-fold2.png").stat().st_size > 1000
    content = json.loads(name.with_suffix(".json").read_text())
    assert list(content["rows"]) == [*TRIALS, *FINALS]
    assert "somewhere" not in json.dumps(content["rows"]) and "somewhere" not in text
    # of an unfinished plan what there is
    (tmp_path / "out" / "rows" / f"{FINALS[3]}.json").unlink()
    (tmp_path / "out" / "rows" / f"{TRIALS[4]}.json").unlink()
    assert main("--table") == 0
    shown = (tmp_path / "out" / "table.md").read_text()
    assert "| svf | 12 | 90.0 | – | – | – | 10.0 | – |" in shown and "7 of 9 runs" in shown


@pytest.fixture
def matched(monkeypatch):
    """Stands for `fss eval --weights`: the settings of each test, and 0.45 mIoU."""
    asked: dict[str, TrainConfig] = {}

    def score(folder, config, deadline):
        asked[folder.name] = config
        spread = {"mean": 0.45, "std": 0.01, "values": [0.44, 0.46]}
        result = {"miou": spread, "fb_iou": spread, "iou": {}, "episodes": {}, "seeds": [1]}
        return result | {"weights": "w", "backbone": "b", "stride_on": "conv2", "size": 33}

    monkeypatch.setattr(plans, "score_matching", score)
    return asked


MODEL = TINY["model"] | {"width": 24, "weights": "shapes"}
UNTRAINED = {
    "settings": TINY | {"model": MODEL},
    "final": {"folds": [0, 2], "untrained": [33, 65]},
}


def test_the_row_without_training_stands_in_the_table(main, trained, matched, written, tmp_path):
    path = written(**UNTRAINED)
    assert main(path=path) == 0
    names = [f"fold{fold}-untrained-{size}px" for size in (33, 65) for fold in (0, 2)]
    assert list(matched) == names and list(trained) == [*TRIALS, *FINALS]
    config = matched["fold2-untrained-65px"]
    assert (config.data.size, config.data.fold, config.test_episodes) == (65, 2, 2)
    assert main("--table", path=path) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    row = "| nothing trained, 65 px | 0 | 45.0 ± 1.0 | 45.0 ± 1.0 | 45.0 | 45.0 | – | – | – | – |"
    assert row in text and "13 of 13 runs" in text and "on the same episodes" in text
    file = tmp_path / "out" / "rows" / f"{names[3]}.json"
    row = json.loads(file.read_text())
    row["novel"]["episodes"] = {"cat": 1}
    file.write_text(json.dumps(row))
    with pytest.raises(SystemExit, match=rf"{names[3]}: expected the test episodes of fold2"):
        main("--table", path=path)


def test_matching_is_tested_on_the_episodes_of_the_runs(
    main, in_process, written, tmp_path, monkeypatch
):
    """As `fss eval` counts them; a test that is stopped leaves no row."""
    settings = TINY | {"model": MODEL, "test_episodes": 8, "steps": 1, "test_seeds": [3, 1]}
    final = {"folds": [2], "untrained": [33]}
    regimes = {"freeze": {"regime.name": "freeze"}}
    path = written(settings=settings, regimes=regimes, search={}, final=final)
    make = plans.score_matching
    monkeypatch.setattr(plans, "score_matching", lambda *_: None)
    assert main(path=path) == 1
    assert list(read_rows(tmp_path / "out")) == ["fold2-freeze-seed321"]
    monkeypatch.setattr(plans, "score_matching", make)
    assert main(path=path) == 0
    trained, matched = read_rows(tmp_path / "out").values()
    assert matched["novel"]["episodes"] == trained["novel"]["episodes"]
    assert sum(matched["novel"]["episodes"].values()) == 16
    assert len(matched["novel"]["miou"]["values"]) == 2
    assert matched["novel"]["miou"] != trained["novel"]["miou"]
    assert matched["tested"]["weights"] == "shapes" and matched["tested"]["size"] == 33
    assert str(tmp_path) not in json.dumps(matched)
    assert main("--table", path=path) == 0


def test_no_run_begins_that_does_not_fit(main, trained, tmp_path, capsys, monkeypatch):
    assert main("--minutes", "0") == 1
    assert not trained
    said = capsys.readouterr().out
    assert "done: 0 of 9 runs" in said and f"pending: 9 ({TRIALS[0]}, " in said

    out = tmp_path / "out"
    make = plans.make_run
    monkeypatch.setattr(plans, "make_run", lambda *a, **k: make(*a, **k) if not trained else None)
    assert main("--minutes", "60") == 1  # of unknown length the first begins; it stops the second
    row = out / "rows" / f"{TRIALS[0]}.json"
    row.write_text(json.dumps(json.loads(row.read_text()) | {"minutes": 50.0}))
    deadlines = []
    monkeypatch.setattr(plans, "make_run", lambda *a, deadline: deadlines.append(deadline))
    capsys.readouterr()
    assert main("--minutes", "49") == 1
    assert not deadlines and "expected: 400 minutes" in capsys.readouterr().out
    # one that was begun goes on, and is stopped at the end of the time
    (out / TRIALS[1]).mkdir()
    (out / TRIALS[1] / "last.pt").touch()
    begun = time.monotonic()
    assert main("--minutes", "49") == 1
    assert len(deadlines) == 1 and 48 * 60 < deadlines[0] - begun < 50 * 60
    assert f"running, goes on with the same command: {TRIALS[1]}" in capsys.readouterr().out


def test_what_another_plan_made_is_refused(main, trained, written, tmp_path, monkeypatch):
    assert main() == 0
    with pytest.raises(
        SystemExit, match="it was made with steps 3 instead of 5; give another --out"
    ):
        main("--steps=5")
    with pytest.raises(SystemExit, match="made with steps; give another"):
        main(path=written(settings={k: v for k, v in TINY.items() if k != "steps"}))
    # a process may be killed between a run's end and its row
    for row in (tmp_path / "out" / "rows").iterdir():
        row.unlink()
    made = plans.make_run
    monkeypatch.setattr(
        plans, "make_run", lambda *a, **k: made(a[0], tmp_path / "x", a[2] | {"steps": "3"}, **k)
    )
    with pytest.raises(SystemExit, match="with steps 3 instead of 5; remove its folder"):
        main("--steps=5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "plan: unknown key 'colour'; expected config, regimes, settings"),
        ({"search": {"stage": []}}, "search: unknown key 'stage'; expected fold, settings"),
        ({"search": {"stages": [STAGES[0] | {"by": 1}]}}, "search.stages: unknown key 'by'"),
        ({"search": {"stages": [{"regime": "svf"}]}}, "search.stages: expected setting, found"),
        ({"search": {"stages": [STAGES[2]]}}, "null stands for what an earlier stage of svf"),
        ({"search": {"stages": [STAGES[0] | {"regime": "x"}]}}, "a regime of freeze, svf; got 'x'"),
        ({"search": {"stages": STAGES[:1] * 2}}, "different runs, got trial-fold0-freeze-lr=0.01"),
        ({"search": {"fold": "all"}}, 'search.fold: expected a number or "each"'),
        ({"final": {"folds": 0}}, "final.folds: expected a list of numbers, got 0"),
        ({"final": {"untrained": 129}}, "final.untrained: expected a list of sizes in pixels, got"),
        ({"final": {"folds": [0], "untrained": [33]}}, 'final.untrained: .*, got "none"'),
        (
            {"final": {"folds": [0], "untrained": [32]}, "settings": UNTRAINED["settings"]},
            "data.size: expected a multiple of 8 plus 1 .* got 32",
        ),
        (
            UNTRAINED | {"settings": UNTRAINED["settings"] | {"data.protocol": "hsnet"}},
            "final.untrained: expected data.protocol pfenet, got hsnet, which fss eval",
        ),
        ({"final": {"folds": [True]}}, "final.folds: expected a list of numbers"),
        ({"search": {"fold": True}}, 'search.fold: expected a number or "each"'),
        ({"config": 3}, "config: expected a name, got 3"),
        ({"settings": {1: 2}}, "settings: expected a name, got 1"),
        ({"regimes": {"a/b": {}}, "search": {}}, "part of a file's name, got the run 'fold0-a/b"),
        ({"settings": {"data": {"sise": 33}}}, "demo: data: 'sise' is no setting"),
        ({"settings": {"data.size": 32}}, "data.size: expected a multiple of 8 plus 1"),
        ({"settings": {LR: "1e-5"}}, "optimizer.lr: expected a number, got '1e-5'"),
        ({"settings": {"validation_classes": "novel"}}, 'validation_classes: expected "base"'),
        ({"final": {"folds": [0, 4]}}, "final.folds: expected 0 to 3, .* have 4 folds; got 4"),
        ({"search": {"fold": 9, "stages": STAGES}}, "search.fold: expected 0 to 3, .*; got 9"),
        ({"config": "nothing"}, "config: expected a YAML file"),
        ({"regimes": ["svf"]}, r"regimes: expected keys with values, got \['svf'\]"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(main, trained, written, changes, message):
    with pytest.raises(SystemExit, match=message):
        main(path=written(**changes))
    assert not trained


def test_options_are_settings(main, trained):
    with pytest.raises(SystemExit, match="--data.size: expected a setting as --NAME=VALUE"):
        main("--data.size", "161")
    with pytest.raises(SystemExit, match=r"--steps=\[: expected a value as in YAML, '\[' is none"):
        main("--steps=[")


@pytest.mark.parametrize("text", ["{}", "[]"])
def test_a_file_that_is_no_row_is_named(main, trained, tmp_path, text):
    (tmp_path / "out" / "rows").mkdir(parents=True)
    (tmp_path / "out" / "rows" / "fold0-svf-seed1.json").write_text(text)
    with pytest.raises(SystemExit, match=r"fold0-svf-seed1.json: expected the row of a finished"):
        main()
    assert not trained


def test_processes_share_the_runs(main, trained, written, tmp_path, capsys, monkeypatch):
    """A run that another process holds is left to it; what waits for its row waits."""
    plan = planned.read_plan(written())
    (tmp_path / "out").mkdir()
    waited = []
    with contextlib.ExitStack() as other:
        first = other.enter_context(plans._taken(planned.runs_of(plan, {}), tmp_path / "out"))
        assert first.name == TRIALS[0]

        def sleep(seconds):
            waited.append(list(trained))
            other.close()  # it is killed before it ends

        monkeypatch.setattr(plans.time, "sleep", sleep)
        assert main() == 0
    # the rate of freezing holds for all others
    assert waited == [[TRIALS[1]]]
    assert list(trained) == [TRIALS[1], TRIALS[0], *TRIALS[2:], *FINALS]
    assert "waiting for runs of other processes" in capsys.readouterr().out


def test_a_run_that_another_process_ended_meanwhile_is_not_made_again(written, tmp_path):
    run = planned.runs_of(planned.read_plan(written()), {})[0]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / f"{run.name}.json").write_text("{}")
    with plans._taken([run], tmp_path) as taken:
        assert taken is None


def test_time_after_the_last_checkpoint_of_a_killed_session_does_not_count(tmp_path):
    folder, file = tmp_path / "run", tmp_path / "times" / "run.json"
    Stopwatch(file, folder).start()
    assert Stopwatch(file, folder).seconds == 0  # killed before the first
    begun = json.loads(file.read_text())["begun"]
    file.write_text(json.dumps({"seconds": 5.0, "begun": begun - 100}))
    folder.mkdir()
    (folder / "last.pt").touch()
    watch = Stopwatch(file, folder)
    assert 105 <= watch.seconds < 110
    watch.start()
    watch.stop()
    assert json.loads(file.read_text())["begun"] is None
    assert Stopwatch(file, folder).seconds == pytest.approx(watch.seconds)


@pytest.mark.parametrize("name", ["pascal", "clothing"])
def test_the_plans_of_the_repository(root, name, monkeypatch):
    plan = planned.read_plan(root / "benchmarks" / "few_shot" / f"{name}.yaml")
    planned.check_runs(plan, {"data.root": "photos", "model.weights": "weights.pth"})
    trials = [run.regime for run in planned.runs_of(plan, {}) if run.kind == "trial"]
    counts = {trials.count(regime) for regime in plan.regimes}
    assert name == "clothing" or counts == {3}
    # photos without lists get one, so that base classes are validated on photos not trained on
    view = plans._view_root(plan, {"data.root": "photos"})
    assert view == ("photos" if name == "clothing" else None)


@pytest.fixture
def in_process(monkeypatch):
    """Runs `fss train` in this process, without the picture of its curves."""
    monkeypatch.setattr(fss.training.run, "draw_own_curves", lambda *_: None)
    build, found = fss.training.loop.build_source, []

    def built_once(config):
        found[:] = found or [build(config)]
        return found[0]

    monkeypatch.setattr(fss.training.loop, "build_source", built_once)

    def run(command, log, limit, grace=0.0):
        return Ended(fss.cli.main(command[3:]), 1.0)

    monkeypatch.setattr(training, "run", run)


def test_killed_anywhere_it_ends_with_the_same_rows(
    main, in_process, written, tmp_path, monkeypatch
):
    stage = {"regime": "svf", "setting": BACKBONE_LR, "values": [0.1]}
    plan = {"search": {"stages": [stage]}, "final": {"folds": [0]}}
    path = written(**plan, regimes={"svf": {"regime.name": "svf", "regime.layers": ["layer4"]}})
    assert main(path=path, out="whole") == 0

    moments = iter(["step", "row", "step"])
    step, write = Trainer._train_step, plans.write_json

    def at(moment):
        nonlocal due
        if due == moment:
            due = next(moments, None)
            raise Killed

    def killed_step(self, parts):
        if self.step == 2:  # the first two are saved
            at("step")
        step(self, parts)

    def killed_write(file, content):
        at("row")
        write(file, content)

    due = next(moments)
    monkeypatch.setattr(Trainer, "_train_step", killed_step)
    monkeypatch.setattr(plans, "write_json", killed_write)
    kills = 0
    while True:
        try:
            assert main(path=path, out="killed") == 0
            break
        except Killed:
            kills += 1
    assert kills == 3
    whole, killed = (read_rows(tmp_path / name) for name in ("whole", "killed"))
    assert list(whole) == list(killed) and len(whole) == 2
    measured = {"minutes", "step_seconds_median", "peak_memory_bytes"}
    for name, row in whole.items():
        assert row["curve"]["step"] == [2, 3] and row["steps"] == 3
        assert {k: v for k, v in row.items() if k not in measured} == {
            k: v for k, v in killed[name].items() if k not in measured
        }
    text = json.dumps(whole)
    assert str(tmp_path) not in text and not re.search(r'"/', text)
    assert main("--table", path=path, out="killed") == 0
