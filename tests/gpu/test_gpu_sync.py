"""A training step queues its work and never waits for the GPU."""

from __future__ import annotations

import pytest
import torch

import svf_fast

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_training_step_does_not_wait(trunk, maps, dtype):
    model, x = trunk(), maps()
    optimizer = torch.optim.SGD(svf_fast.svf_parameters(model), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype, enabled=dtype.itemsize == 2):
            y = model(x)
        y.float().square().mean().backward()
        optimizer.step()

    for _ in range(3):  # compiles kernels, makes handles and the optimizer's state
        step()
    torch.cuda.synchronize()  # what follows S from one step to the next has arrived, too
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_check_sees_a_wait(device):
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(3, device=device).sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cosine_max_does_not_wait(device):
    query, support = (torch.randn(2, 64, 130, device=device, requires_grad=True) for _ in range(2))
    mask = (torch.rand(2, 130, device=device) > 0.5).float()
    svf_fast.cosine_max(query, support, mask).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        svf_fast.cosine_max(query, support, mask).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
