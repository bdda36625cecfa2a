from __future__ import annotations

import time

import torch
from torch import nn

from fss.training.measure import StepTimer, peak_memory, saved_bytes


def test_saved_bytes_by_hand():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    x = torch.rand(3, 4)
    with saved_bytes(model) as saved:
        y = model(x)
    # The input and ReLU's output, which the second layer shares; no weight.
    assert saved.total == 4 * (3 * 4 + 3 * 6)
    y.sum().backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_counting_changes_no_gradient():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 2, 3))
    x = torch.rand(1, 3, 8, 8)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with saved_bytes(model):
        y = model(x)
    y.sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))


def test_a_frozen_model_saves_nothing():
    model = nn.Linear(4, 6).requires_grad_(False)
    with saved_bytes(model) as saved:
        model(torch.rand(3, 4))
    assert saved.total == 0


def test_timer_times_steps_and_not_what_is_between():
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        timer.start()
        time.sleep(0.01)
        timer.stop()
        time.sleep(0.05)
    first, second = timer.take()
    assert 0.01 <= first < 0.05 and 0.01 <= second < 0.05
    assert timer.take() == []


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + 2**24)
    assert peak_memory(torch.device("cpu")) >= before + 2**25
    assert held.sum() > 0
