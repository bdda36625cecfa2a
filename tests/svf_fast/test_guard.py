"""guard_holds: what it says of spectra, and that the kernel says the same."""

from __future__ import annotations

import pytest
import torch

from svf_fast.reference.guard import guard_holds as definition
from svf_fast.svd import GUARD_LIMIT, guarded_directions

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def spectra(groups: int, rank: int) -> dict[str, torch.Tensor]:
    flat = torch.rand(groups * rank) + 0.5
    zero, spread, crossed = flat.clone(), torch.logspace(0, -6, groups * rank), -flat
    zero[rank // 2] = 0
    crossed[0] = 1e-4
    return {"flat": flat, "zero": zero, "spread": spread, "crossed": crossed, "none": 0 * flat}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups, rank", [(1, 1), (1, 7), (1, 2048), (3, 5), (32, 1)])
def test_holds_with_the_chosen_tail_and_not_without(groups, rank, device):
    """Both the definition and, where it has a kernel, the op (`tests/gpu` emulates it)."""
    functions = [definition]
    if torch._C._dispatch_has_kernel_for_dispatch_key("svf_fast::guard_holds", device.upper()):
        functions.append(torch.ops.svf_fast.guard_holds)
    for name, S in spectra(groups, rank).items():
        tail = guarded_directions(S, groups)
        S = S.to(device)
        needed = tail.numel() > 0
        for holds in functions:
            assert holds(S, None, groups, GUARD_LIMIT).item() != needed, name
            if 0 < tail.shape[1] < rank:
                chosen = tail.to(device)
                assert holds(S, chosen, groups, GUARD_LIMIT).item(), name
                fewer = chosen[:, 1:].contiguous()
                expected = definition(S, fewer, groups, GUARD_LIMIT)
                assert torch.equal(holds(S, fewer, groups, GUARD_LIMIT), expected), name


def test_a_nan_does_not_hold():
    S = torch.tensor([1.0, float("nan"), 1.0])
    assert not definition(S, None, 1, GUARD_LIMIT)
