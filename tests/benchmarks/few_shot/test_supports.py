from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.few_shot import supports, supports_cost, supports_table
from benchmarks.few_shot.rows import read_rows
from benchmarks.few_shot.supports import REGIMES, SETS, Task, counts, tasks
from benchmarks.race.peers import official
from fss.config import RegimeConfig
from fss.data import EvalTransform
from fss.models import Matching, build_backbone
from fss.segment.segmenter import FewShotSegmenter
from fss.segment.tuning import LAYERS, TUNABLE


def row(kind: str, class_id: int, regime: str, rate: float, tuned: list[int], **more: object):
    """Returns a row of one query, untuned IoU a half, that kept what step 5 gave."""
    first = {"step": 0, "iou": 0.5, "loss": 1.0, "queries": [[50, 100, 50, 100]]}
    last = {"step": 5, "iou": 0.6, "loss": 0.9, "queries": [tuned]}
    return {
        "kind": kind,
        "class_id": class_id,
        "fold": (class_id - 1) // 5,
        "regime": regime,
        "rate": rate,
        "shots": 1,
        "number": 0,
        "others": [],
        "others_untuned": [],
        "best_step": 5,
        "checks": [first, last],
        **more,
    }


def test_every_regime_has_the_same_trials_and_tasks():
    assert len({len(regime.rates) for regime in REGIMES.values()}) == 1
    assert all(isinstance(what, RegimeConfig) or what in TUNABLE for what, *_ in REGIMES.values())
    every = list(tasks(list(range(1, 21)), [5, 1]))
    assert len({task.name for task in every}) == len(every)
    for regime in REGIMES:
        of = [task for task in every if task.regime == regime]
        assert sum(task.kind == "final" for task in of) == 20 * SETS * 2
        assert sum(task.kind == "search" for task in of) == 4 * 3 * 2
    kinds = [task.kind for task in every]
    assert kinds.index("final") == kinds.count("search")  # rates are chosen before they are used


def test_a_fold_chooses_its_rate_without_its_novel_classes():
    good, bad = [90, 100, 90, 100], [10, 100, 10, 100]
    rows = {}
    for class_id in range(1, 21):
        novel = class_id <= 5
        for rate, tuned in (
            (0.1, good if novel else bad),
            (0.2, bad if novel else [30, 100, 0, 1]),
        ):
            rows[f"{class_id}{rate}"] = row("search", class_id, "svf", rate, tuned)
    assert supports_table.chosen_rate(rows, "svf", 1, 0) == 0.2
    assert supports_table.chosen_rate(rows, "svf", 1, 1) == 0.1
    assert supports_table.base_scores(rows, "svf", 1, 0)[0.2] == pytest.approx(0.3)
    for regime, shots in (("bias", 1), ("svf", 5)):
        with pytest.raises(ValueError, match=f"{regime}: expected as many trials.*found none"):
            supports_table.chosen_rate(rows, regime, shots, 0)
    del rows["200.2"]  # a rate with one trial fewer
    with pytest.raises(ValueError, match="15 of 0.1, 14 of 0.2; run --kinds search"):
        supports_table.chosen_rate(rows, "svf", 1, 0)


def test_the_table_is_paired(tmp_path):
    rows = {}
    for class_id, both in ((1, 70), (6, 60)):
        tuned = [both, 100, 50, 100]
        more = {"others": [[40, 100, 50, 100]], "others_untuned": [[50, 100, 50, 100]]}
        rows[f"s{class_id}"] = row("final", class_id, "svf", 0.1, tuned, **more)
        rows[f"b{class_id}"] = row("final", class_id, "bias", 0.1, [50, 100, 50, 100])
    rows["alone"] = row("final", 11, "svf", 0.1, [99, 100, 99, 100])  # which bias does not have
    text = supports_table.write(rows, ["svf", "bias"], {}, tmp_path / "t")
    found = json.loads((tmp_path / "t.json").read_text())["tables"]["1"]
    assert found["sets"] == found["episodes"] == 2
    assert found["rows"]["untuned"]["miou"] == pytest.approx(0.5)
    svf = found["rows"]["svf"]
    assert svf["miou"] == pytest.approx(0.65) and svf["wins"] == 1
    middle, low, high = svf["difference"]
    assert middle == pytest.approx(0.15) and low == pytest.approx(0.1)
    assert high == pytest.approx(0.2) and svf["others"] == pytest.approx(-0.1)
    assert found["rows"]["bias"]["difference"][0] == 0 and found["rows"]["bias"]["wins"] == 0.5
    assert "| svf | 65.0 | +15.0 (+10.0 to +20.0) | 100 % |" in text
    assert "first_ahead" not in svf
    assert found["rows"]["bias"]["first_ahead"] == pytest.approx([0.15, 0.1, 0.2])
    assert text.splitlines()[2].endswith("| svf ahead by, 95 % |")
    bias = next(line for line in text.splitlines() if line.startswith("| bias |"))
    assert bias.endswith("| +15.0 (+10.0 to +20.0) |")
    assert not (tmp_path / "t.png").exists()


def test_curves_are_over_the_classes_that_all_have(tmp_path):
    rows = {
        "a": row("curve", 1, "svf", 0.1, [80, 100, 0, 1]),
        "b": row("curve", 1, "full", 0.1, [20, 100, 0, 1]),
        "c": row("curve", 2, "svf", 0.1, [80, 100, 0, 1]),
    }
    assert supports_table.curves(rows, 1) == {"full": {0: 0.5, 5: 0.2}, "svf": {0: 0.5, 5: 0.8}}
    supports_table.write(rows, ["svf"], {"size": 321}, tmp_path / "t")
    assert (tmp_path / "t.png").stat().st_size > 1000
    supports.unpack(tmp_path / "t.json", tmp_path / "out")  # on another machine
    assert read_rows(tmp_path / "out") == rows


def test_rows_of_another_share_are_not_gone_on_with(tmp_path, monkeypatch):
    supports_table.write(
        {"a": row("search", 1, "svf", 0.1, [80, 100, 0, 1])}, ["svf"], {}, tmp_path / "t"
    )
    words = f"supports --out {tmp_path / 'out'} --go-on {tmp_path / 't.json'} --root r --weights w"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(SystemExit, match="has rows of another share than 0.6; give an empty one"):
        supports.main()


def test_counts_leave_out_ignored_pixels():
    truth = np.array([[1, 1, 0, 255], [0, 0, 0, 255]], np.uint8)
    mask = np.array([[True, False, True, True], [False] * 4])
    assert counts(mask, truth) == [1, 3, 3, 5]


class _Source:
    def __init__(self):
        self.class_names = {1: "a", 2: "b"}
        self.folds = ((1,), (2,))

    def name(self, index: int) -> str:
        return f"photo{index}"


def test_supports_of_one_shot_are_the_first_of_five_and_no_query():
    photos = supports.Photos.__new__(supports.Photos)
    photos.source = _Source()
    photos._listed = {split: {1: list(range(40))} for split in ("train", "test")}
    one, queries = photos.draw(Task("final", 1, 0, 1, "svf", None))
    five, same = photos.draw(Task("final", 1, 0, 5, "bias", None))
    assert one == five[:1] and queries == same and not set(five) & set(queries)
    assert photos.draw(Task("final", 1, 1, 5, "svf", None))[0] != five
    assert photos.draw(Task("search", 1, 0, 5, "svf", 0.1))[0] != five


def test_a_support_without_background_segments_and_is_not_tuned_on():
    """As of a bottle whose rest of the photo is ignored."""
    image = np.random.default_rng(0).integers(0, 255, (65, 65, 3), np.uint8)
    mask = np.zeros((65, 65), np.uint8)
    mask[10:40, 10:40] = 1
    bare = np.where(mask == 1, mask, 255).astype(np.uint8)

    class Two:
        def draw(self, task: Task) -> tuple[list[int], list[int]]:
            return [0, 1], [0]

        def load(self, index: int, class_id: int) -> tuple[np.ndarray, np.ndarray]:
            return image, (mask, bare)[index]

    segmenter, given = FewShotSegmenter(size=49, device="cpu"), []
    support = segmenter.support
    segmenter.support = lambda images, masks: given.append(len(masks)) or support(images, masks)
    example = supports.Example(Task("final", 1, 2, 2, "svf", None), Two())
    example.give(segmenter)
    assert segmenter.tune(1, progress=False).shots == 1  # with both it is an error
    example.ask(segmenter)
    assert given == [2, 1, 2]


def test_costs_of_a_step_and_of_what_is_kept(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (97, 97, 3), np.uint8)
    mask = np.zeros((97, 97), bool)
    mask[10:60, 10:60] = True
    found = {}
    for name in ("svf", "the paper's layers", "batch_norm"):
        segmenter = FewShotSegmenter(size=49, device="cpu")
        bottlenecks = Matching(build_backbone("resnet50", width=8))  # as of the network measured
        segmenter._prepare(bottlenecks, None, EvalTransform(97), None, 0.5, "cpu")
        if name == "the paper's layers":
            official(segmenter.model.backbone, LAYERS).requires_grad_(False)
        segmenter.support(image, mask)
        tuning, saved, trained = supports_cost._first(segmenter, supports_cost.what_of(name))
        assert tuning.steps == 1 and supports_cost._kept(tuning, trained) >= 4 * trained
        found[name] = saved, trained
    assert 0 < found["svf"][0] < 0.5 * found["the paper's layers"][0]
    assert found["svf"][1] == found["the paper's layers"][1] != found["batch_norm"][1]
    rows = [
        {
            "name": name,
            "shots": shots,
            "seconds": [3.0, 1.0, 2.0],
            "saved_bytes": shots * 2**20,
            "trained": 12544,
            "kept_bytes": 54321,
        }
        for name in supports_cost.ROWS
        for shots in (1, 5)
    ]
    assert "| svf | 12 544 | 2.0 (1.0-3.0) | 1 | 2.0 (1.0-3.0) | 5 | 53.05 KiB |" in (
        supports_cost.table(rows)
    )
