"""`recompute_supports`: the same loss and gradients, and bytes that hardly grow with the shots."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fss.models.features as module
from fss.config import RegimeConfig
from fss.models import MODELS
from fss.models.regimes import apply_regime
from fss.training.measure import saved_bytes
from tests.fss.models.test_models import WITH_HEAD, _batch, _grow, _loss, _model


def _trained(name: str, **options) -> nn.Module:
    model = _model(name, shots=3, **options).double()
    _grow(model)
    apply_regime(model, RegimeConfig())
    return model.train()


def _step(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = _loss(model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _assert_same(one, other) -> None:
    (loss, gradients), (expected, wanted) = one, other
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert gradients.keys() == wanted.keys()
    size = max(grad.abs().max() for grad in wanted.values())
    for name, grad in gradients.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-6, atol=1e-9 * size, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_loss_and_gradients(name):
    model = _trained(name)
    batch = {n: x.double() if x.is_floating_point() else x for n, x in _batch(shots=3).items()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plain = _step(model, batch)
    after = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    model.recompute_supports = True
    _assert_same(_step(model, batch), plain)
    for key, value in model.state_dict().items():  # statistics of the head's batch norms
        torch.testing.assert_close(value, after[key], rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ("baseline", "bam"))
def test_dropout_draws_the_same_again(monkeypatch, name):
    """Against the same passes, kept: gradients of other units than the loss saw would differ."""
    model = _trained(name, dropout=0.5)
    model.recompute_supports = True
    batch = {n: x.double() if x.is_floating_point() else x for n, x in _batch(shots=3).items()}
    torch.manual_seed(1)
    again = _step(model, batch)
    monkeypatch.setattr(module, "checkpoint", lambda run, *given, use_reentrant: run(*given))
    torch.manual_seed(1)
    _assert_same(again, _step(model, batch))


@pytest.mark.parametrize("name", ("baseline", "pfenet", "bam"))
def test_bytes_hardly_grow_with_the_shots(name):
    sizes = {}
    for again in (False, True):
        for shots in (2, 4):
            model = _model(name, shots=shots, width=32)
            apply_regime(model, RegimeConfig())
            model.train().recompute_supports = again
            batch = _batch(1, shots, 65, 73)
            with saved_bytes(model) as kept:
                loss = _loss(model, batch)
            del loss
            photos = sum(batch[n].nbytes for n in ("support_images", "support_masks"))
            sizes[again, shots] = kept.total, photos
    grown = sizes[True, 4][0] - sizes[True, 2][0]
    photos = sizes[True, 4][1] - sizes[True, 2][1]
    assert grown < 1.6 * photos  # and of each its prior mask and prototype
    assert grown < 0.2 * (sizes[False, 4][0] - sizes[False, 2][0])


def test_what_does_not_train_runs_as_ever():
    model = _trained("baseline")
    model.recompute_supports = True
    batch = {n: x.double() if x.is_floating_point() else x for n, x in _batch(shots=3).items()}
    with torch.no_grad():
        loss = _loss(model.eval(), batch)
    model.recompute_supports = False
    with torch.no_grad():
        assert torch.equal(loss, _loss(model, batch))


@pytest.mark.parametrize("name", WITH_HEAD[:2])
def test_statistics_of_the_batch_are_refused(name):
    model = _model(name, shots=2)
    apply_regime(model, RegimeConfig(name="freeze", layers=["all"], batch_norm_statistics="batch"))
    model.train().recompute_supports = True
    with pytest.raises(RuntimeError, match="recompute_supports: expected batch norms"):
        _loss(model, _batch(shots=2))
