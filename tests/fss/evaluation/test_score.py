from __future__ import annotations

import json

import pytest
import torch
import yaml

import fss.evaluation.score
from fss.data import build_episodes, build_source
from fss.evaluation.evaluate import episode_classes, predict, table
from fss.evaluation.metrics import EpisodeIoU
from fss.evaluation.score import PROTOCOLS, evaluate_run
from fss.models import Matching, backbone_of, build_model
from fss.models.official import official_keys
from fss.models.regimes import apply_regime
from fss.runs.checkpoint import save_checkpoint
from fss.segment.segmenter import FewShotSegmenter

FEW = {"episodes": 4, "seeds": (1,), "accelerator": "cpu", "workers": 0}


def untrained(config, base_classes=None):
    """The folder of a run whose network is random."""
    torch.manual_seed(0)
    names = base_classes or {n: f"base {n}" for n in range(1, 16)}
    network = build_model(config.model, names, config.data.shots)
    apply_regime(network, config.regime)
    out = fss.evaluation.score.Path(config.out)
    out.mkdir()
    state = {"step": 0, "model": network.state_dict(), "base_classes": names}
    save_checkpoint(out / "best.pt", config, state)
    return out


@pytest.fixture
def elsewhere(monkeypatch, tiny):
    """A stand-in for COCO: the embedded photos under that name; returns its class names."""
    shapes = build_source(tiny().data)
    original = fss.evaluation.score.build_source

    def build(config):
        return shapes if config.source == "coco" else original(config)

    monkeypatch.setattr(fss.evaluation.score, "build_source", build)
    return shapes


@pytest.mark.parametrize("name", ["baseline", "bam"])
def test_other_data(tiny, elsewhere, name):
    """BAM's base learner has 9 classes of its own, whatever the other data have."""
    model = {"name": name} | ({"base_weights": "none"} if name == "bam" else {})
    run = untrained(tiny(model=model), {n: f"base {n}" for n in range(1, 10)})
    result = evaluate_run(str(run), source="coco", root="there", fold=2, **FEW)
    novel = [elsewhere.class_names[c] for c in elsewhere.folds[2]]
    assert list(result["iou"]) == novel and result["fold"] == 2
    assert result["source"] == "coco" and result["seen_in_training"] == []
    assert json.loads((run / "eval_coco_fold2.json").read_text()) == result
    assert not (run / "eval.json").exists()


def test_bam_is_tested_with_a_support_or_with_as_many_as_trained(tiny):
    model = {"name": "bam", "base_weights": "none"}
    run = untrained(tiny(model=model, data={"shots": 2}))
    assert [evaluate_run(str(run), shots=k, **FEW)["shots"] for k in (1, 2)] == [1, 2]
    with pytest.raises(ValueError, match="support_images: expected K = 1 or 2 supports per query"):
        evaluate_run(str(run), shots=3, **FEW)


def test_classes_that_training_saw_are_left_out(tiny, elsewhere):
    novel = [elsewhere.class_names[c] for c in elsewhere.folds[1]]
    run = untrained(tiny(), {1: novel[0].upper(), 2: novel[2], 3: "another"})
    result = evaluate_run(str(run), source="coco", root="there", fold=1, **FEW)
    assert result["seen_in_training"] == [novel[0], novel[2]]
    assert list(result["iou"]) == [name for name in novel if name not in (novel[0], novel[2])]
    assert f"{novel[0]}, {novel[2]}" in next(table(result))
    assert len(elsewhere.folds[1]) == len(novel)


def test_pascals_names_are_cocos():
    names = {
        fss.evaluation.score._plain(name)
        for name in ("aeroplane", "sofa", "tvmonitor", "diningtable")
    }
    assert names == {
        fss.evaluation.score._plain(name) for name in ("airplane", "couch", "tv", "dining table")
    }


def test_training_data_that_are_gone_are_said_to_be(tiny, elsewhere):
    run = untrained(tiny())
    config = tiny(data={"source": "folder", "root": "gone"})
    state = torch.load(run / "best.pt", weights_only=True)
    del state["base_classes"]
    save_checkpoint(run / "best.pt", config, state)
    result = evaluate_run(str(run), source="coco", root="there", **FEW)
    assert result["seen_in_training"] is None
    assert "not known" in next(table(result))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 1}, "fold, folds: expected them with --source"),
        ({"folds": "panet"}, "fold, folds: expected them with --source"),
        ({"source": "coco", "root": "there", "classes": "base"}, 'classes: expected "novel"'),
        ({"source": "coco", "root": "there", "fold": 4}, "fold: expected 0 to 3 with these data"),
        ({"source": "coco"}, "^root: expected the folder.* give --root, or --source shapes"),
        ({"source": "shapes"}, "training saw every class"),
        ({"official": "authors.pth"}, "official: expected a YAML file"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny, elsewhere, options, message):
    seen = [elsewhere.class_names[c] for c in elsewhere.folds[0]]
    run = untrained(tiny(), dict(enumerate(seen, 1)))
    with pytest.raises(ValueError, match=message):
        evaluate_run(str(run), **(FEW | options))


def test_clothing_on_coco(shared, tiny):
    """A model of real photos on those of another layout; none of its classes is a garment."""
    folder = shared / "data" / "coco200"
    data = {"source": "folder", "root": str(shared / "data" / "clothing"), "size": 65}
    run = untrained(tiny(data=data))
    options = {"min_area": 0.005, "drop_small_classes": True}
    result = evaluate_run(str(run), source="coco", root=str(folder), fold=0, **FEW, **options)
    assert "person" in result["iou"] and len(result["iou"]) == 20
    assert sum(result["episodes"].values()) == 4


@pytest.mark.parametrize("name", ["pfenet", "bam"])
def test_the_authors_checkpoint_alone(tiny, tmp_path, name):
    """Its score is that of a run with the same weights."""
    model = {"name": name, "stem": "deep"} | ({"base_weights": "none"} if name == "bam" else {})
    config = tiny(model=model, regime={"name": "freeze"})
    run = untrained(config, episode_classes(build_source(config.data), 0, novel=False))
    weights = torch.load(run / "best.pt", weights_only=True)["model"]
    network = build_model(config.model, dict.fromkeys(range(15), ""))
    theirs = {theirs: weights[own] for own, theirs in official_keys(network).items()}
    for key in ("gram_merge.weight", "cls_merge.weight"):
        if key in theirs:
            theirs[key] = theirs[key].reshape(1, 2, 1, 1)
    torch.save({"epoch": 1, "state_dict": theirs}, tmp_path / "authors.pth")
    values = config.to_dict() | {"out": str(tmp_path / "authors")}
    values["model"] |= {"base_weights": None, "official": "elsewhere.pth"}
    (tmp_path / "authors.yaml").write_text(yaml.safe_dump(values))

    file = str(tmp_path / "authors.pth")
    result = evaluate_run(str(tmp_path / "authors.yaml"), file, **FEW)
    expected = evaluate_run(str(run), **FEW)
    assert result.pop("checkpoint") == "authors.pth"
    assert {"checkpoint": "best.pt", "step": 0, **result} == expected
    assert (tmp_path / "authors" / "eval.json").is_file()


def test_settings_without_a_checkpoint(tiny, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(tiny(model={"name": "pfenet"}).to_dict()))
    with pytest.raises(ValueError, match="official: expected the authors' checkpoint"):
        evaluate_run(str(path))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_sets_what_the_published_test_chooses(tiny, protocol, monkeypatch):
    given = {}

    def evaluate_seeds(model, source, data, fabric, seeds, episodes, *rest):
        given.update(seeds=seeds, episodes=episodes, data=data, resize=rest[2])
        return {}

    run = untrained(tiny())
    monkeypatch.setattr(fss.evaluation.score, "evaluate_seeds", evaluate_seeds)
    assert evaluate_run(str(run), protocol=protocol)["protocol"] == protocol
    assert given["resize"] == ("network" if protocol == "hsnet" else "canvas")
    assert given["data"].protocol == ("hsnet" if protocol == "hsnet" else "pfenet")
    assert not given["data"].shuffle_test
    wanted = {"bam": (5, 1000), "pfenet": (1, 5000), "hsnet": (1, 1000)}[protocol]
    assert (len(given["seeds"]), given["episodes"]) == wanted
    evaluate_run(str(run), protocol=protocol, episodes=7, resize="photo")
    assert given["episodes"] == 7 and given["resize"] == "photo"


def test_pfenets_test_of_coco_is_longer(tiny, elsewhere, monkeypatch):
    given = []
    monkeypatch.setattr(
        fss.evaluation.score, "evaluate_seeds", lambda *args: given.append(args[5]) or {}
    )
    run = untrained(tiny())
    evaluate_run(str(run), source="coco", root="there", protocol="pfenet")
    assert given == [20000]


def test_bam_of_two_shots_with_one(tiny):
    """Its weights of the shots are those of training."""
    run = untrained(tiny(model={"name": "bam", "base_weights": "none"}, data={"shots": 2}))
    assert evaluate_run(str(run), shots=1, **FEW)["shots"] == 1


def test_a_score_in_a_file_of_its_own(tiny, tmp_path):
    """What a run was scored by stays: another number of episodes, protocol, data."""
    run = untrained(tiny())
    own = evaluate_run(str(run), **FEW)
    few = FEW | {"episodes": 2, "seeds": (1, 2)}
    for name, options in (
        ("test", {}),
        ("a/bam", {"protocol": "bam"}),
        ("base", {"classes": "base"}),
    ):
        out = tmp_path / "scores" / f"{name}.json"
        result = evaluate_run(str(run), **few, **options, out=str(out))
        assert json.loads(out.read_text()) == result != own
    assert json.loads((run / "eval.json").read_text()) == own


MATCHING = {"weights": "shapes", "source": "shapes", "size": 97, "min_area": 0.01}


def test_matching_is_scored_as_a_run(tiny, tmp_path):
    """On the same episodes, by the same metric; features of recurring photos change nothing."""
    out = tmp_path / "scores" / "matching.json"
    result = evaluate_run(**MATCHING, **FEW, out=str(out))
    data = tiny(data={"size": 97}).data
    shapes = build_source(data)
    counted = EpisodeIoU(episode_classes(shapes, 0))
    model = Matching(backbone_of("shapes"))
    for episode in build_episodes(data, "test", 4, 1, shapes):
        batch = {name: episode[name][None] for name in ("query_image", "query_size")}
        batch |= {name: episode[name][None] for name in ("support_images", "support_masks")}
        batch["query_mask_original"] = [episode["query_mask_original"]]
        (mask,) = predict(model, batch)
        counted.update(mask, episode["query_mask_original"], episode["class_id"])
    assert result["miou"]["mean"] == pytest.approx(counted.result().miou, abs=1e-6) != 0
    assert json.loads(out.read_text()) == result
    run = evaluate_run(str(untrained(tiny())), **FEW)
    own = {"model", "trained", "weights", "backbone", "stride_on", "size", "min_area", "source"}
    assert result.keys() - own == run.keys() - {"checkpoint", "step"}
    assert result["episodes"] == run["episodes"]
    assert result["trained"] == "nothing" and result["backbone"] == "resnet18"
    assert evaluate_run(**MATCHING, **FEW, batch_size=2, feature_cache=0.0) == result
    assert next(table(result)) == "matching with shapes, nothing trained, 97 px"


def test_weights_are_named_without_their_folder(tmp_path):
    state = backbone_of("shapes").state_dict()
    torch.save(state, tmp_path / "mine.pth")
    options = MATCHING | {"weights": str(tmp_path / "mine.pth")}
    result = evaluate_run(**options, **FEW, classes="base", fold=1, protocol="bam")
    assert result["weights"] == "mine.pth" and str(tmp_path) not in json.dumps(result)
    assert result["classes_are"] == "base" and len(result["iou"]) == 15 and result["fold"] == 1
    assert result["protocol"] == "bam" and result["resize"] == "canvas"


def test_matching_sees_what_the_segmenter_sees():
    """The default side of the input is one rule."""
    given = FewShotSegmenter(device="cpu")._transform.size
    assert evaluate_run(weights="shapes", source="shapes", min_area=0.01, **FEW)["size"] == given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": None}, "run: expected the folder of a run, or --weights .* got neither: fss"),
        ({"source": None}, "source: expected one of folder, pascal, .*; got nothing"),
        ({"run": "runs/x"}, "weights, size: expected only without a run, runs/x brings its own; "),
        ({"run": "a.yaml", "weights": None}, "size: expected only without .*size 97, omit it"),
        ({"official": "bam.pth"}, "official: expected only with a run or its settings"),
        ({"checkpoint": "last"}, "checkpoint: expected only with a run.*got checkpoint last"),
        ({"source": "pascal"}, "^root: expected the folder.* give --root, or --source shapes"),
        ({"source": "shapes", "out": "/proc/x/a.json"}, "out: /proc/x/a.json cannot be written"),
        ({"fold": 4}, "fold: expected 0 to 3 with these data, got 4"),
        ({"backbone": "resnet50"}, "weights: expected those of resnet50, .* weights of resnet18"),
        ({"size": 32}, "^size: expected a multiple of 8 plus 1"),
    ],
)
def test_what_does_not_fit_matching_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_run(**(MATCHING | FEW | options))
