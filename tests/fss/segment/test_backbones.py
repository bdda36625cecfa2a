from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

import svf_fast
from fss.config import RegimeConfig
from fss.segment.tuning import TUNABLE, Measure
from tests.fss.segment.test_tuning import always_better, given, state

LAYERS = ("layer3", "layer4")
FACTORS = [
    RegimeConfig("svf", LAYERS, factors=("U", "S", "V")),
    RegimeConfig("svf_scale", LAYERS, factors=("S", "S'")),
]


@pytest.mark.parametrize("regime", FACTORS, ids=lambda each: each.name)
@pytest.mark.parametrize("fails", [False, True])
def test_the_untuned_backbone_stays_whatever_trains(embedded, examples, monkeypatch, regime, fails):
    """Bit for bit, also factors of which the tuned copy has its own."""
    always_better(monkeypatch)
    given(embedded, examples, 2).tune(1, progress=False)
    embedded.adapter(None)
    before = state(embedded)

    def look(measure: Measure) -> None:
        if fails and measure.step == 2:
            raise OSError("no space")

    if fails:
        with pytest.raises(OSError, match="no space"):
            embedded.tune(2, lr=0.1, what=regime, progress=False, on_measure=look)
    else:
        embedded.tune(2, lr=0.1, what=regime, progress=False, on_measure=look)
        embedded.adapter(None)
    after = state(embedded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_measure_is_of_the_untuned_network(embedded, examples, count):
    given(embedded, examples, count)
    found = {
        what: embedded.tune(1, what=what, progress=False, seed=2).history[0] for what in TUNABLE
    }
    own = found["bias"]  # in which nothing is decomposed
    for what, measure in found.items():
        assert measure.loss == pytest.approx(own.loss, abs=1e-4), what
        assert measure.iou == pytest.approx(own.iou, abs=2e-3), what


@pytest.mark.parametrize("regime", [{"kernel": "3x3"}, {"layers": ["layer4"]}])
@pytest.mark.parametrize("layers", [LAYERS, ("all",)])
def test_scales_train_where_a_run_has_singular_values(run, examples, monkeypatch, regime, layers):
    always_better(monkeypatch)
    segmenter = given(run(regime=regime), examples, 2)
    before = state(segmenter)
    tuned = segmenter.tune(
        1, lr=0.1, what=RegimeConfig("svf_scale", layers), progress=False, patience=1
    )
    after = segmenter(examples[3][0]).probability
    own = {name.removesuffix(".S") for name in before if name.endswith(".S")}
    assert {f"backbone.{name}" for name in tuned.adapter.S} == own
    segmenter.adapter(None)
    assert all(torch.equal(before[name], value) for name, value in state(segmenter).items())
    segmenter.adapter(tuned)
    np.testing.assert_allclose(segmenter(examples[3][0]).probability, after, atol=1e-5)


def test_adapters_of_different_layers_take_turns(embedded, examples, monkeypatch):
    """In every order, on a backbone that was decomposed for one of them alone."""
    always_better(monkeypatch)
    query = examples[3][0]
    own = given(embedded, examples, 1)(query).probability
    tuned, expected = {}, {}
    for layers in (("layer4",), ("layer2", "layer3"), LAYERS):
        tuned[layers] = embedded.tune(
            1, lr=0.1, what=RegimeConfig("svf", layers), progress=False
        ).adapter
        expected[layers] = embedded(query).probability
    for order in (list(tuned), list(tuned)[::-1]):
        fresh = given(type(embedded)(size=49, device="cpu"), examples, 1)
        for layers in [*order, *order]:
            fresh.adapter(tuned[layers])
            np.testing.assert_allclose(fresh(query).probability, expected[layers], atol=1e-4)
        fresh.adapter(None)
        np.testing.assert_allclose(fresh(query).probability, own, atol=1e-4)


def test_an_adapter_that_does_not_fit_leaves_the_values(embedded, examples, monkeypatch):
    always_better(monkeypatch)
    given(embedded, examples, 1)
    few = RegimeConfig("svf", ("layer4",))
    embedded.tune(1, lr=0.1, what=few, progress=False)
    before = embedded(examples[3][0]).probability
    other = given(type(embedded)(size=49, device="cpu"), examples, 1).tune(1, progress=False)
    name = next(iter(other.adapter.S))
    wrong = {**other.adapter.S, name: torch.ones(3)}
    with pytest.raises(ValueError, match=r"got \[3\]: trained on another backbone; load the one"):
        embedded.adapter(dataclasses.replace(other.adapter, S=wrong))
    np.testing.assert_allclose(embedded(examples[3][0]).probability, before, atol=1e-5)


def test_what_was_tuned_goes_back_by_its_record(embedded, examples, monkeypatch):
    always_better(monkeypatch)
    given(embedded, examples, 1)
    tuned = embedded.tune(1, lr=0.1, progress=False)
    after = embedded(examples[3][0]).probability
    other = embedded.tune(1, lr=0.1, what="batch_norm", progress=False)
    kept = embedded(examples[3][0]).probability
    with pytest.raises(ValueError, match="adapter: expected a tuning of singular values, got one"):
        embedded.adapter(other)
    np.testing.assert_array_equal(embedded(examples[3][0]).probability, kept)
    embedded.adapter(tuned)
    np.testing.assert_allclose(embedded(examples[3][0]).probability, after, atol=1e-5)


@pytest.mark.parametrize("what", ["svf", "bias"])
@pytest.mark.parametrize("call", [lambda s: s.adapter(None), lambda s: s.tune(1, progress=False)])
def test_nothing_is_exchanged_while_it_is_tuned(embedded, examples, what, call):
    given(embedded, examples, 1).tune(1, progress=False)
    embedded.adapter(None)
    own = embedded(examples[3][0]).probability

    def look(measure: Measure) -> None:
        call(embedded)

    with pytest.raises(RuntimeError, match=r"(adapter|tune)\(\): was called while the segmenter"):
        embedded.tune(2, what=what, progress=False, on_measure=look)
    np.testing.assert_allclose(embedded(examples[3][0]).probability, own, atol=1e-6)
    embedded.adapter(None)  # afterwards it can


def test_a_callback_that_segments_and_fails_leaves_nothing_of_it(embedded, examples):
    given(embedded, examples, 1).tune(1, progress=False)
    embedded.adapter(None)
    own = embedded(examples[3][0]).probability

    def look(measure: Measure) -> None:
        embedded(examples[3][0])
        if measure.step:
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        embedded.tune(2, lr=0.1, progress=False, on_measure=look)
    np.testing.assert_array_equal(embedded(examples[3][0]).probability, own)


@pytest.mark.parametrize("first", ["svf", "batch_norm", "svf_scale"])
@pytest.mark.parametrize("second", ["svf", "bias", RegimeConfig("svf", ("layer9",)), "a picture"])
def test_what_was_tuned_stays_where_another_tuning_fails(
    embedded, examples, monkeypatch, first, second
):
    always_better(monkeypatch)
    query = examples[3][0]
    given(embedded, examples, 1).tune(2, lr=0.1, what=first, progress=False)
    expected = embedded(query).probability

    def look(measure: Measure) -> None:
        if measure.step:
            raise OSError("no space")

    options = {"what": second, "on_measure": look}
    if second == "a picture":
        options = {"unlabeled": ["none.png"]}
    with pytest.raises((OSError, ValueError), match="no space|layer9|none.png"):
        embedded.tune(2, lr=0.1, progress=False, **options)
    np.testing.assert_array_equal(embedded(query).probability, expected)
    assert not [p for p in embedded.model.parameters() if p.requires_grad or p.grad is not None]
    embedded.adapter(None)
    own = given(type(embedded)(size=49, device="cpu"), examples, 1)(query).probability
    np.testing.assert_allclose(embedded(query).probability, own, atol=1e-4)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("call", ["tune", "adapter"])
def test_an_interrupted_decomposition_leaves_the_values(
    embedded, examples, monkeypatch, late, call
):
    """Before and after layers have been replaced."""
    always_better(monkeypatch)
    query = examples[3][0]
    few = RegimeConfig("svf", ("layer4",))
    given(embedded, examples, 1)
    more = copy.deepcopy(embedded).tune(1, lr=0.1, progress=False)
    own = embedded(query).probability
    embedded.adapter(embedded.tune(1, lr=0.1, what=few, progress=False))
    expected = embedded(query).probability
    convert = svf_fast.convert

    def interrupted(*arguments: object, **options: object) -> None:
        if late:
            convert(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(svf_fast, "convert", interrupted)
        embedded.tune(1, progress=False) if call == "tune" else embedded.adapter(more)
    np.testing.assert_allclose(embedded(query).probability, expected, atol=1e-5)
    embedded.adapter(None)
    np.testing.assert_allclose(embedded(query).probability, own, atol=1e-4)
    embedded.adapter(more)
    embedded.tune(1, progress=False)


def test_a_tuning_does_not_depend_on_what_was_set_before(embedded, examples, monkeypatch):
    """Nor do its memory and time: the same blocks are fused."""
    always_better(monkeypatch)
    fresh = copy.deepcopy(given(embedded, examples, 1))
    first = embedded.tune(2, lr=0.1, progress=False, seed=1)
    expected = fresh.tune(2, lr=0.1, progress=False)
    other = given(type(embedded)(size=49, device="cpu"), examples, 1)
    other.adapter(first)
    np.testing.assert_array_equal(
        other(examples[3][0]).probability, embedded(examples[3][0]).probability
    )
    other.adapter(None)
    tuned = other.tune(2, lr=0.1, progress=False)
    assert all(torch.equal(values, expected.adapter.S[n]) for n, values in tuned.adapter.S.items())
    kinds = [[type(m).__name__ for m in s.model.backbone.modules()] for s in (fresh, other)]
    assert kinds[0] == kinds[1] and "SVFBasicBlock" in kinds[0]


def test_an_adapter_that_was_set_in_inference_mode(embedded, examples):
    tuned = given(embedded, examples, 1).tune(1, progress=False)
    with torch.inference_mode():
        other = type(embedded)(size=49, device="cpu")
        other.adapter(tuned.adapter)
        given(other, examples, 1)
    assert other.tune(1, progress=False).steps == 1


def test_unknown_layers_of_a_run_are_refused(run, examples):
    segmenter = given(run(), examples, 1)
    with pytest.raises(ValueError, match="what: expected layers of the backbone.*got 'layer9'"):
        segmenter.tune(what=RegimeConfig("svf", ("layer9", "layer4")))


@pytest.mark.parametrize("core", ["band:1", "lowrank:2"])
def test_a_backbone_with_more_than_S(run, examples, monkeypatch, core):
    """Tuned is S alone, or all that the run's core has; what a copy trains begins where it was."""
    always_better(monkeypatch)
    segmenter = given(run(regime={"name": "svf", "core": core}), examples, 1)
    backbone = segmenter.model.backbone
    with torch.no_grad():
        for parameter in svf_fast.svf_parameters(backbone):
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = svf_fast.Adapter.of(backbone)
    segmenter.adapter(before)  # features of the supports anew
    own = segmenter(examples[3][0]).probability
    parts = {}
    for what in ("svf", RegimeConfig("svf", core=core)):
        tuned = segmenter.tune(2, lr=0.1, what=what, progress=False).adapter
        assert any(not torch.equal(values, before.S[name]) for name, values in tuned.S.items())
        parts[str(what)] = [
            torch.equal(values, before.cores[name].parts[part])
            for name, found in tuned.cores.items()
            for part, values in found.parts.items()
        ]
        segmenter.adapter(before)
    alone, every = parts.values()
    assert all(alone) and not any(every)
    with pytest.raises(ValueError, match="what: expected a backbone of which S alone was trained"):
        segmenter.tune(1, what="svf_scale", progress=False)
    with pytest.raises(ValueError, match=f"what: expected core='{core}', which layer2.* 'block:2'"):
        segmenter.tune(1, what=RegimeConfig("svf", core="block:2"), progress=False)
    assert segmenter.tune(1, what="full", progress=False).history
    segmenter.adapter(before)
    np.testing.assert_allclose(segmenter(examples[3][0]).probability, own, atol=1e-5)
