"""guards_hold: what it says of spectra, layer by layer, and that the kernels say the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svf_fast.ops.guard import guards_hold
from svf_fast.reference.guard import guards_hold as definition
from svf_fast.svd import GUARD_LIMIT, guarded_directions

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(1, 1), (1, 7), (1, 2048), (3, 5), (32, 1), (2, 600)]  # groups, rank


def spectra(groups: int, rank: int) -> dict[str, Tensor]:
    flat = torch.rand(groups * rank) + 0.5
    zero, spread, crossed = flat.clone(), torch.logspace(0, -6, groups * rank), -flat
    zero[rank // 2] = 0
    crossed[0] = 1e-4
    return {"flat": flat, "zero": zero, "spread": spread, "crossed": crossed, "none": 0 * flat}


def chosen(tail: Tensor, groups: int, rank: int) -> Tensor:
    """bool [groups · rank] of the guarded directions [groups, T]."""
    return torch.zeros(groups, rank, dtype=torch.bool).scatter(1, tail, True).flatten()


def table(shapes: list[tuple[int, int]]) -> Tensor:
    rows, first = [], 0
    for groups, rank in shapes:
        rows.append((first, groups))
        first += groups * rank
    return torch.tensor([*rows, (first, 0)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups, rank", SHAPES)
def test_holds_with_the_chosen_tail_and_not_without(groups, rank, device, poisoned_memory):
    """Both the definition and the op, which `tests` run on emulated and interpreted kernels too."""
    layers = table([(groups, rank)]).to(device)
    for name, S in spectra(groups, rank).items():
        tail = guarded_directions(S, groups)
        needed = tail.numel() > 0
        S, none = S.to(device), chosen(tail[:, :0], groups, rank).to(device)
        for holds in (definition, guards_hold):
            assert holds(S, none, layers, GUARD_LIMIT).tolist() == [not needed], name
            if 0 < tail.shape[1] < rank:
                all_of_them = chosen(tail, groups, rank).to(device)
                assert holds(S, all_of_them, layers, GUARD_LIMIT).item(), name
                fewer = chosen(tail[:, 1:], groups, rank).to(device)
                expected = definition(S, fewer, layers, GUARD_LIMIT)
                assert torch.equal(holds(S, fewer, layers, GUARD_LIMIT), expected), name


@pytest.mark.parametrize("device", DEVICES)
def test_every_layer_is_judged_alone(device, poisoned_memory):
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for groups, rank in SHAPES:
        for name, S in spectra(groups, rank).items():
            values, guarded = found.setdefault(name, ([], []))
            values.append(S)
            guarded.append(chosen(guarded_directions(S, groups)[:, :1], groups, rank))
    shapes, layers = SHAPES * len(found), table(SHAPES * len(found)).to(device)
    S = torch.cat([S for values, _ in found.values() for S in values]).to(device)
    guarded = torch.cat([g for _, several in found.values() for g in several]).to(device)
    holds = guards_hold(S, guarded, layers, GUARD_LIMIT)
    assert holds.shape == (len(shapes),) and 0 < holds.sum() < len(shapes)
    assert torch.equal(holds, definition(S, guarded, layers, GUARD_LIMIT))
    one_by_one = [
        guards_hold(values, of, table([shape]).to(device), GUARD_LIMIT)
        for shape, values, of in zip(
            shapes,
            S.split([groups * rank for groups, rank in shapes]),
            guarded.split([groups * rank for groups, rank in shapes]),
        )
    ]
    assert torch.equal(holds, torch.cat(one_by_one))


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_does_not_hold_in_its_layer(device):
    S = torch.tensor([1.0, 1.0, 1.0, torch.nan, 1.0, 1.0], device=device)
    guarded, layers = torch.zeros_like(S, dtype=torch.bool), table([(1, 2), (2, 1), (1, 2)])
    layers = layers.to(device)
    for holds in (definition, guards_hold):
        assert holds(S, guarded, layers, GUARD_LIMIT).tolist() == [True, False, True]
    assert guards_hold(S[:0], guarded[:0], layers[:1] * 0, GUARD_LIMIT).numel() == 0


def test_opcheck_and_one_graph():
    S, guarded, layers = torch.rand(6), torch.zeros(6, dtype=torch.bool), table([(1, 2), (2, 2)])
    torch.library.opcheck(torch.ops.svf_fast.guards_hold.default, (S, guarded, layers, 2.0))
    compiled = torch.compile(guards_hold, fullgraph=True)
    expected = guards_hold(S, guarded, layers, 2.0)
    assert torch.equal(compiled(S, guarded, layers, 2.0), expected)
