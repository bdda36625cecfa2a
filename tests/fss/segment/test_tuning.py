from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

import svf_fast
from fss.config import RegimeConfig
from fss.data import EvalTransform
from fss.models import Matching, build_backbone
from fss.segment import tuning
from fss.segment.backbones import remembering
from fss.segment.segmenter import FewShotSegmenter
from fss.segment.tuning import (
    SHARE,
    TUNABLE,
    Measure,
    Tuning,
    TuningSettings,
    soft_iou_loss,
)
from fss.segment.views import SCENES, SupportViews

SIZE = 49


def given(segmenter: FewShotSegmenter, examples, count: int) -> FewShotSegmenter:
    images, masks = zip(*examples[:count])
    return segmenter.support(list(images), list(masks))


def state(segmenter: FewShotSegmenter) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in segmenter.model.state_dict().items()}


def always_better(monkeypatch) -> None:
    """Lets every measure be kept, whatever it is."""
    monkeypatch.setattr(Measure, "better_than", lambda self, other: True)


def test_the_best_measure_is_kept_and_segments(embedded, examples, monkeypatch):
    given(embedded, examples, 2)
    query = examples[3][0]
    before = embedded(query).probability
    scores = (0.1, 0.2, 0.5, 0.5, 0.4)  # the third at the lower loss
    measured = tuning._Loop._measure

    def scored(self, losses) -> Measure:
        measure = measured(self, losses)
        loss = 1.0 + (self.done == 3)
        return dataclasses.replace(measure, iou=scores[self.done], loss=loss)

    monkeypatch.setattr(tuning._Loop, "_measure", scored)
    tuned = embedded.tune(4, lr=0.1, progress=False)
    assert (tuned.before, tuned.after, tuned.best_step, tuned.steps) == (0.1, 0.5, 2, 4)
    assert (tuned.what, tuned.shots, tuned.stopped) == ("svf", 2, "all steps are done")
    assert [each.step for each in tuned.history] == [0, 1, 2, 3, 4]
    assert "svf on 2 supports: held-out IoU 0.100 -> 0.500, step 2 is kept (4 steps" in str(tuned)
    after = embedded(query).probability
    assert np.abs(after - before).max() > 1e-3
    assert not any(p.requires_grad for p in embedded.model.parameters())
    # starts again from the untuned values, and is the same again
    again = embedded.tune(2, lr=0.1, progress=False)
    assert again.best_step == 2
    np.testing.assert_array_equal(embedded(query).probability, after)
    assert all(torch.equal(S, tuned.adapter.S[name]) for name, S in again.adapter.S.items())


def test_it_learns(embedded, examples):
    given(embedded, examples, 3)
    for seed, steps, share in ((1, 30, 1.0), (2, 30, 1.0), (1, 60, SHARE), (2, 60, SHARE)):
        history = embedded.tune(steps, seed=seed, share=share, patience=99, progress=False).history
        assert history[-1].loss < 0.9 * history[0].loss  # of views that are not trained on
        assert history[-1].iou > 2 * history[0].iou


def test_the_trained_values_go_on_whatever_share_is_measured(embedded, examples):
    """The losses of the steps are those of share 1, the measures are not."""
    given(embedded, examples, 2)
    few, all_of_it = (
        embedded.tune(4, lr=0.05, share=share, progress=False).history for share in (0.1, 1.0)
    )
    assert [m.train_loss for m in few] == [m.train_loss for m in all_of_it]
    assert few[0] == all_of_it[0] and few[-1].loss != all_of_it[-1].loss


def test_another_seed_is_another_tuning(embedded, examples):
    given(embedded, examples, 1)
    one, other = (embedded.tune(1, seed=seed, progress=False).history for seed in (0, 1))
    assert one[0].loss != other[0].loss


def test_nothing_better_leaves_it_untuned(embedded, examples, monkeypatch):
    given(embedded, examples, 1)
    monkeypatch.setattr(Measure, "better_than", lambda self, other: False)
    query = examples[3][0]
    embedded.tune(1, progress=False)  # decomposes, which rounds
    own = embedded.adapter(None) or embedded(query).probability
    for what in ("svf", "svf_scale", "bias"):
        before = state(embedded)
        tuned = embedded.tune(1, lr=0.1, what=what, progress=False)
        assert tuned.best_step == 0 and tuned.after == tuned.before
        assert "the untuned values are kept" in str(tuned)
        np.testing.assert_array_equal(embedded(query).probability, own)
        after = state(embedded)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_stops_when_it_does_not_get_better(embedded, examples, monkeypatch):
    given(embedded, examples, 1)
    monkeypatch.setattr(tuning, "_EVERY", 1)
    monkeypatch.setattr(Measure, "better_than", lambda self, other: self.step <= 2)
    tuned = embedded.tune(30, what="bias", progress=False)
    assert tuned.best_step == 2 and tuned.steps == 2 + TuningSettings().patience
    assert tuned.stopped == "not better since step 2"


@pytest.mark.parametrize("what", TUNABLE)
def test_what_trains_and_nothing_else(embedded, examples, monkeypatch, what):
    always_better(monkeypatch)
    given(embedded, examples, 2)
    before = {k: v.clone() for k, v in embedded.model.backbone.state_dict().items()}
    tuned = embedded.tune(1, what=what, progress=False)
    assert tuned.best_step == 1 and tuned.what == what
    assert (tuned.adapter is not None) == (what in ("svf", "svf_scale"))
    after = embedded.model.backbone.state_dict()
    changed = {k for k in before if k in after and not torch.equal(before[k], after[k])}
    new = {k for k in after if k not in before}
    layers = ("layer4",) if what == "layer4" else ("layer3", "layer4")
    assert changed or new
    assert all(name.startswith(layers) for name in changed | new)
    statistics = {name for name in changed if "running" in name or "batches" in name}
    assert not statistics
    embedded.adapter(None)
    back = embedded.model.backbone
    if what not in ("svf", "svf_scale"):
        assert all(torch.equal(before[k], v) for k, v in back.state_dict().items())


@pytest.mark.parametrize(
    "overrides, what",
    [
        ({"regime": {"name": "freeze"}}, "svf"),
        ({"regime": {"name": "svf"}}, "svf"),
        ({"regime": {"name": "svf"}}, "svf_scale"),
        ({"regime": {"name": "svf"}}, "batch_norm"),
        ({"regime": {"name": "svf_scale"}}, "svf"),
        ({"regime": {"name": "full"}, "data": {"protocol": "hsnet"}}, "svf_scale"),
        ({"model": {"name": "pfenet"}, "data": {"shots": 3}}, "svf"),
        ({"model": {"name": "bam", "base_weights": "none"}, "data": {"shots": 3}}, "svf"),
    ],
)
def test_runs_of_every_kind(run, examples, monkeypatch, overrides, what):
    always_better(monkeypatch)
    segmenter = given(run(**overrides), examples, overrides.get("data", {}).get("shots", 1))
    query = examples[3][0]
    head = {k: v for k, v in state(segmenter).items() if not k.startswith("backbone")}
    own = segmenter(query).probability
    tuned = segmenter.tune(2, lr=0.05, what=what, progress=False)
    after = segmenter(query).probability
    assert np.abs(after - own).max() > 1e-6
    assert all(torch.equal(v, segmenter.model.state_dict()[k]) for k, v in head.items())
    segmenter.adapter(None)
    np.testing.assert_allclose(segmenter(query).probability, own, atol=1e-5)
    if tuned.adapter is not None:
        segmenter.adapter(tuned.adapter)
        np.testing.assert_allclose(segmenter(query).probability, after, atol=1e-5)


@pytest.mark.parametrize("share", [SHARE, 1.0])
def test_values_of_a_run_train_from_where_they_are(run, examples, monkeypatch, share):
    """Also those of layers that are not tuned stay, and the file fits the run."""
    always_better(monkeypatch)
    segmenter = given(run(), examples, 2)
    before = {n: p.clone() for n, p in segmenter.model.backbone.state_dict().items()}
    tuned = segmenter.tune(1, lr=0.01, progress=False, share=share)
    assert {name.split(".")[0] for name in tuned.adapter.S} == {"layer2", "layer3", "layer4"}
    for name, values in tuned.adapter.S.items():
        own = before[f"{name}.S"]
        # a step of Adam is as large as its rate
        moved = 0.0 if name.startswith("layer2") else share * 0.01 * float(own.abs().mean())
        assert float((values - own).abs().max()) == pytest.approx(moved, rel=0.02)


def test_scales_of_a_run_have_their_own_rate(run, examples, monkeypatch):
    """Also by the name "svf": the run says what its singular values are made of."""
    always_better(monkeypatch)
    segmenter = given(run(regime={"name": "svf_scale"}), examples, 2)
    first, second = (
        segmenter.tune(1, lr=lr, progress=False).adapter.S for lr in (None, TUNABLE["svf_scale"][1])
    )
    assert all(torch.equal(values, second[name]) for name, values in first.items())


def test_under_autocast_it_segments(embedded, examples):
    given(embedded, examples, 1)
    expected = embedded(examples[3][0]).probability
    with torch.autocast("cpu", torch.bfloat16):
        found = embedded(examples[3][0]).probability
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_classes_take_turns_without_decomposing(embedded, examples, monkeypatch, tmp_path):
    always_better(monkeypatch)
    query = examples[3][0]
    given(embedded, examples, 1)
    one = embedded.tune(1, lr=0.1, seed=1, progress=False)
    first = embedded(query).probability
    one.adapter.save(tmp_path / "one.safetensors")
    # from here on
    monkeypatch.setattr(torch.linalg, "svd", None)
    monkeypatch.setattr(svf_fast, "decompose", None)
    two = embedded.tune(1, lr=0.1, seed=2, what="svf_scale", progress=False)
    second = embedded(query).probability
    assert np.abs(first - second).max() > 1e-3
    for adapter, expected in (
        (tmp_path / "one.safetensors", first),
        (two.adapter, second),
        (one.adapter, first),
    ):
        embedded.adapter(adapter)
        np.testing.assert_allclose(embedded(query).probability, expected, atol=1e-5)
    card = svf_fast.Adapter.load(tmp_path / "one.safetensors").card
    assert (card["tuned"], card["shots"], card["steps"], card["size"]) == ("svf", 1, 1, SIZE)
    assert card["metric"] == {"IoU before": one.before, "IoU after": one.after}


def test_it_starts_from_the_adapter_that_was_set(embedded, examples, monkeypatch):
    given(embedded, examples, 1)
    monkeypatch.setattr(Measure, "better_than", lambda self, other: self.step > 0)
    one = embedded.tune(1, lr=0.1, progress=False)
    embedded.adapter(one.adapter)
    for what in ("svf", "batch_norm"):
        two = embedded.tune(1, what=what, progress=False)
        # measured on the same views: what was after is now before
        assert two.history[0].iou == one.history[-1].iou
        assert two.history[0].loss == pytest.approx(one.history[-1].loss, rel=1e-4)


def test_singular_values_of_zero_are_no_start(embedded, examples, monkeypatch):
    always_better(monkeypatch)
    tuned = given(embedded, examples, 1).tune(1, lr=0.1, progress=False)
    for values in tuned.adapter.S.values():
        values.zero_()
    embedded.adapter(tuned.adapter)
    with pytest.raises(ValueError, match=r"expected singular .* of layer3\..* all 0; go back"):
        embedded.tune(progress=False)
    embedded.adapter(None)
    assert embedded.tune(1, progress=False).steps == 1


def test_layers_of_another_choice(embedded, examples, monkeypatch):
    always_better(monkeypatch)
    given(embedded, examples, 1)
    few = embedded.tune(1, what=RegimeConfig("svf", ("layer4",)), progress=False)
    expected = embedded(examples[3][0]).probability
    more = embedded.tune(1, what=RegimeConfig("svf", ("layer3", "layer4"), "3x3"), progress=False)
    assert few.adapter.S.keys() < more.adapter.S.keys()
    embedded.adapter(few.adapter)
    np.testing.assert_allclose(embedded(examples[3][0]).probability, expected, atol=1e-5)
    both = RegimeConfig("svf", ("layer4",), batch_norm="both")
    assert embedded.tune(1, what=both, progress=False).adapter is None


def test_an_adapter_of_another_backbone_leaves_the_tuned_one(run, embedded, examples):
    other = given(run(), examples, 1).tune(1, progress=False).adapter
    given(embedded, examples, 1).tune(1, lr=0.1, what="batch_norm", progress=False)
    before = embedded(examples[3][0]).probability
    with pytest.raises(ValueError, match="singular values|another backbone"):
        embedded.adapter(other)
    np.testing.assert_array_equal(embedded(examples[3][0]).probability, before)


def test_ctrl_c_keeps_the_best(embedded, examples, monkeypatch):
    always_better(monkeypatch)
    given(embedded, examples, 1)
    expected = embedded.tune(2, lr=0.1, progress=False)
    step = tuning._Loop._step

    def interrupted(self) -> float:
        if self.done == 2:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(tuning._Loop, "_step", interrupted)
    tuned = embedded.tune(4, lr=0.1, progress=False)
    assert tuned.best_step == tuned.steps == 2
    assert tuned.stopped == "stopped by ctrl-C after 2 steps"
    for name, values in tuned.adapter.S.items():
        assert torch.equal(values, expected.adapter.S[name])


@pytest.mark.parametrize("what", ["svf", "batch_norm"])
def test_a_failure_puts_the_untuned_network_back(embedded, examples, monkeypatch, what):
    given(embedded, examples, 1)
    embedded.tune(1, progress=False)
    embedded.adapter(None)
    before = state(embedded)

    def broken(self, *_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning._Loop, "_measure", broken)
    with pytest.raises(KeyboardInterrupt):
        embedded.tune(1, lr=0.1, what=what, progress=False)
    after = state(embedded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in embedded.model.parameters())


@pytest.mark.parametrize("what", ["svf", "full"])
def test_a_loss_that_is_not_finite_ends_it(embedded, examples, what):
    given(embedded, examples, 1)
    tuned = embedded.tune(6, lr=1e30, what=what, progress=False)
    assert "the loss of step 2 was nan, a lower lr may help" in tuned.stopped
    assert tuned.best_step == 0
    assert np.isfinite(embedded(examples[3][0]).probability).all()


def test_supports_that_do_not_explain_each_other_are_named(embedded, examples):
    record = Tuning("svf", 2, 0.02, 0.04, 3, 10, 1.0, "all steps are done", ())
    assert "do all of them show the same kind of object" in str(record)
    assert "is its mask right" in str(Tuning("svf", 1, 0.0, 0.0, 0, 9, 1.0, "", ()))
    assert Tuning("svf", 2, 0.1, 0.4, 3, 10, 1.0, "", ()).advice == ""
    # corners of the same photo: one is the background of the other
    image = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    corner = np.zeros((48, 48), bool)
    corner[:6, :6] = True
    embedded.support([image, image], [corner, corner[::-1, ::-1].copy()])
    tuned = embedded.tune(1, progress=False)
    assert tuned.after < 0.1 and "do not explain each other" in str(tuned)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0; to segment untuned"),
        ({"steps": 1.5}, TypeError, "steps: expected an integer"),
        ({"lr": -1.0}, ValueError, "lr: expected a number above 0, got -1"),
        ({"lr": math.nan}, ValueError, "lr: expected a number above 0"),
        ({"lr": "fast"}, TypeError, "lr: expected a number"),
        ({"seed": -1}, ValueError, "seed: expected an integer from 0 to 2"),
        ({"seed": 2**64}, ValueError, "seed: expected an integer from 0 to 2"),
        ({"what": ["svf"]}, TypeError, "what: expected a text or RegimeConfig"),
        ({"size": 49.0}, TypeError, "size: expected an integer or null, got 49.0"),
        ({"size": "49"}, TypeError, "size: expected an integer or null, got '49'"),
        ({"share": 0.0}, ValueError, "share: expected more than 0, at most 1, got 0"),
        ({"share": math.nan}, ValueError, "share: expected more than 0"),
        ({"on_measure": 3}, TypeError, "on_measure: expected a function, got 3"),
        ({"what": "svd"}, ValueError, "what: expected one of svf, svf_scale, full, .*got 'svd'"),
        ({"what": RegimeConfig("freeze")}, ValueError, "trains something in the backbone"),
        ({"what": RegimeConfig("rotated_svf")}, ValueError, "another network"),
        (
            {"what": RegimeConfig("svf", batch_norm_statistics="batch")},
            ValueError,
            'batch_norm_statistics "frozen"',
        ),
        ({"what": RegimeConfig("svf", ("layer9",))}, ValueError, "got 'layer9'"),
        ({"what": RegimeConfig("full", ("layer9",))}, ValueError, "got 'layer9'"),
        ({"size": 100}, ValueError, "size: expected a multiple of 8 plus 1"),
        ({"size": 57}, ValueError, "size: expected at most 49, at which the network sees pictures"),
        ({"unlabeled": ["none.jpg"]}, FileNotFoundError, "unlabeled picture 1"),
    ],
)
def test_wrong_arguments_are_explained(embedded, examples, options, error, message):
    given(embedded, examples, 1)
    before = embedded(examples[3][0]).probability
    with pytest.raises(error, match=message):
        embedded.tune(progress=False, **options)
    np.testing.assert_array_equal(embedded(examples[3][0]).probability, before)


def test_supports_that_cannot_be_tuned_on(embedded, run, examples):
    with pytest.raises(ValueError, match=r"call support\(images, masks\) first"):
        embedded.tune()
    image, mask = examples[0]
    given(embedded, examples, 1).tune(1, lr=0.1, what="bias", progress=False)
    embedded.support([image, image], [mask, mask | True])
    tuned = embedded(image).probability
    with pytest.raises(ValueError, match="support mask 2: expected some background"):
        embedded.tune()
    np.testing.assert_array_equal(embedded(image).probability, tuned)
    with pytest.raises(ValueError, match="NaN|0 to 1"):
        embedded.support(np.full((48, 48, 3), np.nan, np.float32), mask)
    bam = given(run(model={"name": "bam", "base_weights": "none"}, data={"shots": 3}), examples, 2)
    with pytest.raises(ValueError, match="supports: expected 1 or 3"):
        bam.tune()
    for regime, what, message in (
        ({"layers": ["layer2"]}, "svf", "they are in layer2"),
        ({"name": "scale_output"}, "svf", "they are in no layer"),
        ({"name": "scale_output"}, "full", "a convolution, 'layer3' has none"),
        ({"name": "adapter"}, "adapter", "layer4 of this run have adapters"),
    ):
        segmenter = given(run(regime=regime), examples, 1)
        before = segmenter(image).probability
        with pytest.raises(ValueError, match=message):
            segmenter.tune(what=what)
        np.testing.assert_array_equal(segmenter(image).probability, before)


def test_pictures_without_a_mask_are_tuned_on(embedded, examples, monkeypatch):
    always_better(monkeypatch)
    pictures = [image for image, _ in examples[1:]]
    given(embedded, examples, 1)
    alone = embedded.tune(2, 0.05, progress=False)
    first = embedded.tune(2, 0.05, progress=False, unlabeled=pictures)
    after = embedded(pictures[0]).probability
    # before the first step the network is the untuned one, whatever it was tuned to meanwhile
    again = embedded.tune(2, 0.05, progress=False, unlabeled=pictures)
    assert again.history == first.history != alone.history
    np.testing.assert_array_equal(embedded(pictures[0]).probability, after)
    one = embedded.tune(2, 0.05, progress=False, unlabeled=pictures[0])
    assert one.history == embedded.tune(2, 0.05, progress=False, unlabeled=pictures[:1]).history


def test_not_more_pictures_without_a_mask_than_needed(embedded, examples, monkeypatch):
    """And none that looks like the object everywhere."""
    seen = []

    def views(*arguments, **named):
        seen.append(arguments[7])
        return SupportViews(*arguments, **named)

    monkeypatch.setattr("fss.segment.segmenter.SupportViews", views)
    given(embedded, examples, 1).tune(1, progress=False, unlabeled=[examples[1][0]] * 20)
    embedded.threshold = 1e-9
    alone = embedded.tune(1, progress=False)
    none = embedded.tune(1, progress=False, unlabeled=[examples[1][0]])
    assert [len(scenes) for scenes in seen] == [SCENES, 0, 0]
    assert none.history == alone.history
    assert "on 1 support and 0 of 1 picture without a mask: held-out" in str(none)


def test_numbers_of_numpy_and_inference_mode(embedded, examples):
    """The card of an adapter is plain JSON all the same."""
    given(embedded, examples, 1)
    first = embedded.tune(2, 0.01, size=33, seed=1, patience=2, progress=False)
    with torch.inference_mode():
        again = embedded.tune(
            np.int64(2), np.float64(0.01), "svf", np.int64(33), np.int64(1), False, np.int64(2)
        )
    assert again.history == first.history and again.adapter.card == first.adapter.card


def test_ignored_pixels_are_neither_object_nor_background(embedded, examples, monkeypatch):
    image, mask = examples[0]
    ids = mask.astype(np.uint8)
    ring = np.zeros_like(mask)
    ring[:8] = ids[:8] == 0
    ids[ring] = 255
    seen = []
    monkeypatch.setattr(
        "fss.segment.segmenter.SupportViews",
        lambda examples, *more: seen.extend(examples) or SupportViews(examples, *more),
    )
    embedded.support(image, ids).tune(1, progress=False)
    assert embedded.conventions == ["class id 1, 255 ignored"]
    np.testing.assert_array_equal(seen[0][1], ids)
    network = embedded._examples[1][0]  # what the network reads
    assert (network[0, :48] == 255).all()
    ids[ids == 0] = 255
    with pytest.raises(ValueError, match="expected some background"):
        embedded.support(image, ids)


def test_matching_is_differentiable_where_it_trains(embedded, examples):
    model: Matching = embedded.model
    pairs = [(image, mask.astype(np.uint8)) for image, mask in examples[:2]]
    images, masks, episodes = SupportViews(pairs, EvalTransform(SIZE), SIZE).sample()
    assert not model.compare(images, masks, episodes).requires_grad
    weight = model.backbone.layer4[-1].conv2.weight.requires_grad_(True)
    logits = model.compare(images, masks, episodes)
    soft_iou_loss(logits[:, 1] - logits[:, 0], masks).backward()
    assert weight.grad.abs().max() > 0
    supports = model.encode_supports(images[:1], masks[:1])
    assert not supports.prototypes[0].requires_grad
    assert not model.segment(images, supports).requires_grad


def test_the_loss_is_one_minus_the_iou():
    masks = torch.tensor([[[1, 1, 0, 255]], [[0, 0, 1, 1]]])
    sure = torch.tensor([[[90.0, -90.0, 90.0, 90.0]], [[-90.0, -90.0, 90.0, 90.0]]])
    torch.testing.assert_close(soft_iou_loss(sure, masks), torch.tensor((2 / 3 + 0) / 2))
    unsure = torch.zeros(1, 1, 4)  # everywhere a half: 1 of 1 + 2 · ½ + ½
    torch.testing.assert_close(soft_iou_loss(unsure, masks[:1]), torch.tensor(1 - 1 / 2.5))
    margins = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: soft_iou_loss(x, masks), margins)


def test_every_measure_is_told_while_the_segmenter_has_its_values(embedded, examples):
    (image, mask), (query, _) = examples[:2]
    embedded.support(image, mask)
    told, seen = [], []

    def look(measure: Measure) -> None:
        told.append(measure)
        seen.append(embedded(query).probability)

    record = embedded.tune(4, lr=0.1, progress=False, patience=9, on_measure=look)
    assert tuple(told) == record.history and [m.step for m in told] == [0, 1, 2, 3, 4]
    assert all(abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(seen))
    np.testing.assert_allclose(embedded(query).probability, seen[record.best_step], atol=1e-5)
    with pytest.raises(ValueError, match="patience: expected at least 1"):
        embedded.tune(patience=0)


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn"])
def test_early_layers_are_computed_once_for_each_image(name, monkeypatch):
    torch.manual_seed(0)
    backbone = build_backbone(name, width=4).eval().requires_grad_(False)
    images = torch.randn(3, 3, 33, 33)
    expected = backbone.features(images)
    asked = []
    compute = backbone.layer1.forward
    monkeypatch.setattr(backbone.layer1, "forward", lambda x: asked.append(len(x)) or compute(x))
    with remembering(backbone):
        for chosen in ([0, 1], [1, 2], [0, 1, 2], [2, 2]):
            for one, other in zip(backbone.features(images[chosen]), expected, strict=True):
                torch.testing.assert_close(one, other[chosen])
        with remembering(backbone):
            backbone.features(images)
        backbone.features(images)  # what is remembered outside stays so
        assert asked == [2, 1]
    backbone.features(images)
    assert asked == [2, 1, 3]
    backbone.layer2.requires_grad_(True)
    with remembering(backbone):
        assert backbone.features(images)[0].requires_grad
