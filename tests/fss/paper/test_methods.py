"""Methods side by side: what runs, what the table says, what is kept and what is refused."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from fss.config import RegimeConfig, TrainConfig
from fss.evaluation.evaluate import read_episodes, write_episodes
from fss.evaluation.metrics import Score, paired_difference
from fss.files import parse_json
from fss.paper import methods, runs
from fss.paper.methods import compare_methods
from fss.runs.folder import RunFolder
from fss.training.loop import Stopped
from fss.training.trainer import Trainer
from tests.fss.conftest import TINY


@pytest.fixture
def config(tmp_path) -> str:
    values = copy.deepcopy(TINY)
    values["model"] |= {"weights": "shapes", "width": 24}
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture
def compare(config, tmp_path):
    """Compares with the tiny configuration; returns the text and the rows by run."""

    def run(*names: str, **options):
        out = tmp_path / "out"
        text = compare_methods(names, config, **{"out": str(out), **options})
        rows = parse_json((out / "methods.json").read_text(), out)["rows"]
        return text, {(row["method"], row["regime"]): row for row in rows}

    return run


def test_the_table_has_what_each_run_found(compare, tmp_path, monkeypatch):
    text, rows = compare("baseline", "matching", regimes=["freeze", "svf"])
    assert list(rows) == [("baseline", "freeze"), ("baseline", "svf"), ("matching", "")]
    assert all(row["not_run"] is None for row in rows.values())
    frozen, svf = rows["baseline", "freeze"], rows["baseline", "svf"]
    assert frozen["trained_backbone"] == 0 < svf["trained_backbone"]
    assert frozen["saved_bytes"] < svf["saved_bytes"]
    assert min(svf["step_seconds"], svf["episode_seconds"], svf["peak"]) > 0
    for name, row in (("baseline-svf", svf), ("matching", rows["matching", ""])):
        table = read_episodes(tmp_path / "out" / name / "test_episodes.csv")
        assert table[:, 0].tolist() == [1] * 3 + [2] * 3
        sums = [table[table[:, 0] == s][:, 2:].sum(0).double() for s in (1, 2)]
        fb = [(x[0] / x[1] + x[2] / x[3]) / 2 for x in sums]
        assert row["fb_iou"] == pytest.approx(100 * float(sum(fb)) / 2)
    low, high = svf["difference"][1:]
    assert low <= svf["difference"][0] <= high and "difference" not in frozen
    lines = [line for line in text.splitlines() if line.startswith("| baseline | svf")]
    assert f"**{svf['miou']:.1f}**" in lines[0] and f"{svf['trained_backbone']:,}" in lines[0]
    assert "nothing trained" in text and "2 × 3 episodes, a seed each" in text

    def again(*_, **__):
        raise AssertionError("what is finished was made again")

    for name in ("train", "train_base"):
        monkeypatch.setattr(runs, name, again)
    monkeypatch.setattr(methods, "evaluate_matching", again)
    assert compare("baseline", "matching", regimes=["freeze", "svf"])[1] == rows


def test_a_base_learner_is_trained_once_for_all_who_need_it(compare, tmp_path, monkeypatch):
    made = []
    train_base = runs.train_base
    monkeypatch.setattr(runs, "train_base", lambda c, **o: made.append(c) or train_base(c, **o))
    _, rows = compare("bam", regimes=["freeze", "bias"])
    assert all(row["not_run"] is None for row in rows.values())
    assert len(made) == 1 and made[0].steps == TINY["steps"]
    for name in ("bam-freeze", "bam-bias"):
        used = RunFolder(tmp_path / "out" / name).config().model.base_weights
        assert used == made[0].out == str(tmp_path / "out" / "base")


def test_a_run_that_fails_stands_in_the_table_and_does_not_end_the_others(compare, monkeypatch):
    def fails(config, **_):
        if config.model.name == "baseline":
            raise FloatingPointError("loss: expected a finite number, got nan")
        return train(config)

    train = runs.train
    monkeypatch.setattr(runs, "train", fails)
    text, rows = compare("baseline", "pfenet", regimes=["freeze"])
    assert "got nan" in rows["baseline", "freeze"]["not_run"]
    assert rows["pfenet", "freeze"]["not_run"] is None
    assert "Not run: baseline freeze: failed: loss: expected a finite number, got nan." in text


def test_an_interrupted_comparison_goes_on(compare, tmp_path, monkeypatch):
    def stop(config, **_):
        if config.regime.name == "svf":
            raise Stopped("stopped after step 1 of 3, saved; continue", 143)
        return train(config)

    train = runs.train
    monkeypatch.setattr(runs, "train", stop)
    with pytest.raises(Stopped, match="methods.md, the same command goes on") as raised:
        compare("baseline")
    assert raised.value.status == 143
    assert "Not run: baseline svf: not run yet." in (tmp_path / "out" / "methods.md").read_text()
    monkeypatch.undo()
    assert compare("baseline")[1]["baseline", "svf"]["not_run"] is None


def test_no_run_begins_after_its_time_and_a_list_runs_nothing(compare, config, tmp_path):
    _, rows = compare("baseline", minutes=1e-9)
    assert {row["not_run"] for row in rows.values()} == {"not run yet"}
    listed = compare_methods(["baseline"], config, out=str(tmp_path / "new"), list=True)
    states = [line.split(maxsplit=1) for line in listed.splitlines()]
    assert states == [["baseline-freeze", "not started"], ["baseline-svf", "not started"]]
    assert not (tmp_path / "new").exists()


def test_the_authors_optimizer_takes_the_place_of_the_configurations(config, tmp_path):
    (run,) = methods.plan_methods(["pfenet"], config, ["freeze"], True, str(tmp_path), {})
    assert (run.config.optimizer.lr, run.config.optimizer.lr_factor) == (0.0025, 10)
    with pytest.raises(ValueError, match="own_optimizer: baseline has no file pascal_baseline"):
        methods.plan_methods(["baseline"], config, ["freeze"], True, str(tmp_path), {})
    own = {"optimizer": {"lr": 0.5}}
    (run,) = methods.plan_methods(["pfenet"], config, ["freeze"], True, str(tmp_path), own)
    assert (run.config.optimizer.lr, run.config.optimizer.lr_factor) == (0.5, 10)


def test_a_head_is_as_wide_as_its_authors_or_as_the_configuration_says(config, tmp_path):
    def widths(file: str, overrides: dict) -> list[int]:
        names = ["hsnet", "cwt", "canet", "baseline"]
        planned = methods.plan_methods(names, file, ["freeze"], False, str(tmp_path), overrides)
        return [run.config.model.channels for run in planned]

    assert widths("clothing", {}) == [128, 512, 256, 256]
    assert widths("clothing", {"model": {"channels": 64}}) == [64] * 4
    assert widths(config, {}) == [TINY["model"]["channels"]] * 4


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["basline"], {}, "methods: expected names of baseline, .*matching; got 'basline'"),
        ([], {}, "methods: expected different names, at least one"),
        (["bam", "bam"], {}, "methods: expected different names"),
        (["bam"], {"regimes": ["frozen"]}, "regimes: expected names of .*freeze.*; got 'frozen'"),
        (["bam"], {"minutes": 0}, "minutes: expected a number above 0, got 0"),
        (["bam"], {"steps": 0}, "steps: expected a number from 1 on, got 0"),
    ],
)
def test_what_it_refuses(config, tmp_path, names, options, message):
    with pytest.raises(ValueError, match=message):
        compare_methods(names, config, out=str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_data_that_are_missing_are_an_error_and_no_table(config, tmp_path):
    with pytest.raises(ValueError, match="data.root: expected the folder of the photos, got noth"):
        compare_methods(["baseline"], "regimes/svf", out=str(tmp_path / "out"))
    data = {"source": "folder", "root": str(tmp_path / "none")}
    with pytest.raises(FileNotFoundError, match="data folder .*none does not exist"):
        compare_methods(["baseline"], config, out=str(tmp_path / "out"), data=data)
    assert not (tmp_path / "out").exists()


def test_finished_runs_of_other_settings_are_refused(compare, tmp_path):
    compare("matching", "baseline", regimes=["freeze"])
    with pytest.raises(ValueError, match="steps: expected 2, the checkpoint has 3"):
        compare("baseline", regimes=["freeze"], steps=2)
    for name, options in {
        "test_episodes": {"test_episodes": 2},
        "data.seed": {"data": {"seed": 7}},
        "data.min_area": {"data": {"min_area": 0.02}},
        "model.weights": {"model": {"weights": "none"}},
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: expected .* (the checkpoint has|is of)"):
            compare("matching", **options)
    moved = tmp_path / "shapes"  # of the same name elsewhere
    compare("baseline", regimes=["freeze"], model={"weights": str(moved)})
    gone = {"model": {"weights": "gone.pth"}}
    with pytest.raises(ValueError, match="weights: expected gone.pth, .*is of shapes; give anot"):
        compare("baseline", regimes=["freeze"], **gone)


def test_unfinished_runs_of_other_settings_are_refused_and_the_table_stays(
    compare, tmp_path, monkeypatch
):
    original = Trainer._loss

    def loss(self, batch):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "_loss", loss)
    with pytest.raises(Stopped):
        compare("baseline", regimes=["freeze"])
    compare("matching")
    with pytest.raises(Stopped):  # before the finished one's turn, which stays in the table
        compare("canet", "matching", regimes=["freeze"])
    rows = parse_json((tmp_path / "out" / "methods.json").read_text(), tmp_path)["rows"]
    assert [row["not_run"] for row in rows] == ["not run yet", None]
    monkeypatch.undo()
    before = (tmp_path / "out" / "methods.md").read_bytes()
    with pytest.raises(ValueError, match="steps: expected 9, the checkpoint has 3"):
        compare("baseline", regimes=["freeze"], steps=9)
    assert (tmp_path / "out" / "methods.md").read_bytes() == before
    (tmp_path / "out" / "baseline-freeze" / "last.pt").write_bytes(b"damaged")
    _, rows = compare("baseline", "matching", regimes=["freeze"])
    assert "cannot be read" in rows["baseline", "freeze"]["not_run"]
    assert rows["matching", ""]["not_run"] is None


OTHER = {"protocol": "hsnet", "seed": 7, "shuffle_test": False}
NAMES = ("baseline-freeze", "matching")


def test_matching_is_tested_as_the_others(compare, tmp_path):
    _, rows = compare(
        "baseline", "matching", regimes=["freeze"], data=OTHER, precision="bf16-mixed"
    )
    assert {row["not_run"] for row in rows.values()} == {None}
    folder = tmp_path / "out" / "matching"
    config = TrainConfig.from_dict(parse_json((folder / "eval.json").read_text(), folder)["config"])
    trained = RunFolder(tmp_path / "out" / "baseline-freeze").config()
    assert config.data == trained.data and config.precision == trained.precision
    a, b = (read_episodes(tmp_path / "out" / n / "test_episodes.csv") for n in NAMES)
    assert torch.equal(a[:, :2], b[:, :2])
    total = [each[:, 4] + each[:, 3] for each in (a, b)]  # found object, and all else
    assert torch.equal(*total)


def test_a_regime_takes_the_place_of_the_configurations(config, tmp_path):
    path = tmp_path / "tuned.yaml"
    own = {"name": "full", "layers": ["all"], "batch_norm": "both"}
    path.write_text(yaml.safe_dump(yaml.safe_load(Path(config).read_text()) | {"regime": own}))
    plan = methods.plan_methods(["canet"], str(path), ["freeze", "svf"], False, str(tmp_path), {})
    assert [run.config.regime for run in plan] == [RegimeConfig("freeze"), RegimeConfig("svf")]
    with pytest.raises(
        ValueError, match="regime: expected names, in regimes; got {'name': 'full'}"
    ):
        compare_methods(["canet"], config, regime={"name": "full"})


def test_what_trains_no_backbone_is_the_same_at_each_of_its_rates(config, tmp_path):
    def planned(**optimizer):
        names = ["baseline", "matching"]
        options = {"optimizer": optimizer}
        return methods.plan_methods(names, config, ["freeze", "svf"], False, str(tmp_path), options)

    (frozen, svf, matching), others = planned(), planned(backbone_lr=0.03)
    assert [frozen.config, matching.config] == [others[0].config, others[2].config]
    assert (svf.config.optimizer.backbone_lr, others[1].config.optimizer.backbone_lr) == (
        None,
        0.03,
    )


def test_a_test_that_is_stopped_leaves_the_table(compare, tmp_path, monkeypatch):
    def stopped(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(methods, "evaluate_matching", stopped)
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped; what is finished is in .*methods.md") as raised:
        compare("baseline", "matching", regimes=["freeze"])
    assert raised.value.status == 143 and signal.getsignal(signal.SIGTERM) == former
    assert "Not run: matching" in (tmp_path / "out" / "methods.md").read_text()


def test_a_paired_difference_by_hand():
    """Two classes, the second of which alone is better: (1/2 - 0)/2."""
    before = torch.tensor([[5, 2, 4], [9, 0, 2], [9, 0, 2]])
    after = torch.tensor([[5, 2, 4], [9, 1, 2], [9, 1, 2]])
    middle, low, high = paired_difference(before, after)
    assert middle == 0.25 and low <= 0.25 <= high
    assert paired_difference(before, before) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="expected the 3 episodes of the first"):
        paired_difference(before, after[[1, 0, 2]])


def test_pairing_removes_what_both_find_hard():
    """Episodes differ much, the two of each little: unpaired the interval would be wider."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(200) % 4
    hard = torch.randint(10, 90, (200,), generator=generator)
    before = torch.stack([classes, hard, torch.full((200,), 100)], dim=1)
    after = before + torch.tensor([0, 5, 0])
    _, low, high = paired_difference(before, after)
    assert 0.049 < low <= high < 0.051
    _, low, high = paired_difference(before, after[torch.arange(200).roll(4)])
    assert high - low > 0.03


def test_the_table_of_episodes_is_read_as_written(tmp_path):
    rows = torch.tensor([[3, 10, 20, 1, 5], [7, 11, 12, 0, 9]])
    scores = [Score(0.0, 0.0, {}, {}, rows=each) for each in (rows, rows.flip(0))]
    write_episodes(tmp_path / "t.csv", [5, 6], scores)
    read = read_episodes(tmp_path / "t.csv")
    assert read[:, 0].tolist() == [5, 5, 6, 6] and torch.equal(read[:2, 1:], rows)
    assert torch.equal(read[2:, 1:], rows.flip(0))
    (tmp_path / "t.csv").write_text("seed,miou\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns seed, class_id"):
        read_episodes(tmp_path / "t.csv")
