"""The structure of Σ: what trains of it, Σ of that, and the gradients from dΣ."""

from __future__ import annotations

import pytest
import torch

from svf_fast.ops.core import DIAGONAL, Core, turned

CORES = ("diag", "band:1", "band:3", "block:2", "block:4", "lowrank:2")
SIZES = ((1, 7), (3, 5), (2, 8), (1, 2))  # groups, rank; of one, an even and an odd number


def places(core: Core, rank: int) -> torch.Tensor:
    """Which off-diagonal entries train, entry by entry."""
    found = torch.zeros(rank, rank, dtype=torch.bool)
    for i in range(rank):
        for j in range(rank):
            near = (
                abs(i - j) <= core.size if core.kind == "band" else i // core.size == j // core.size
            )
            found[i, j] = i != j and near
    return found


@pytest.mark.parametrize("text", CORES)
def test_a_core_is_what_it_is_written_as(text):
    core = Core.of(text)
    assert str(core) == text
    assert Core.of(core) is core
    assert core.is_diagonal == (text == "diag")
    assert Core.of("diag") == DIAGONAL


@pytest.mark.parametrize(
    "text", ["", "full", "band", "band:0", "band:-1", "block:1", "block:1.5", "lowrank: 2"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="core: expected 'diag', 'band:k', 'block:b' or 'lowrank"):
        Core.of(text)
    with pytest.raises(TypeError, match="core: expected 'diag'"):
        Core.of(3)


@pytest.mark.parametrize("groups, rank", SIZES)
@pytest.mark.parametrize("text", CORES[1:5])
def test_entries_stand_where_the_structure_says(text, groups, rank):
    core = Core.of(text)
    S = torch.full((groups * rank,), 5.0)
    (shape,) = core.shapes(groups, rank)
    assert shape == (groups, int(places(core, rank).sum()))
    matrix = core.matrix(S, [torch.arange(1.0, 1 + shape[0] * shape[1]).reshape(shape)])
    diagonal = torch.eye(rank, dtype=torch.bool)
    assert torch.equal(matrix != 0, (places(core, rank) | diagonal).expand(groups, -1, -1))
    assert (matrix.diagonal(0, 1, 2) == 5).all()
    beside = matrix[:, places(core, rank)].flatten()
    assert len(beside.unique()) == len(beside)  # every entry stands once


@pytest.mark.parametrize("groups, rank", SIZES)
@pytest.mark.parametrize("text", CORES[1:])
def test_gradients_are_those_of_autograd(text, groups, rank):
    torch.manual_seed(1)
    core = Core.of(text)
    S = torch.randn(groups * rank, dtype=torch.float64, requires_grad=True)
    shapes = core.shapes(groups, rank)
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    matrix = core.matrix(S, parts)
    grad = torch.randn_like(matrix)
    expected = torch.autograd.grad(matrix, [S, *parts], grad)
    found = core.gradients(grad, [part.detach() for part in parts])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("text", CORES[1:])
def test_it_starts_as_the_diagonal(text):
    S = torch.randn(15)
    core = Core.of(text)
    parts = core.initial(S, 3)
    assert [tuple(part.shape) for part in parts] == core.shapes(3, 5)
    assert torch.equal(core.matrix(S, parts), S.reshape(3, 5).diag_embed())
    if text == "lowrank:2":
        A, B = parts
        assert A.ne(0).all() and A.abs().max() <= 5**-0.5
        assert not B.any()


def test_what_is_larger_than_the_matrix_is_all_of_it():
    assert Core.of("band:99").shapes(2, 4) == Core.of("block:99").shapes(2, 4) == [(2, 12)]
    assert Core.of("lowrank:99").shapes(2, 4) == [(2, 4, 4)] * 2


def test_of_a_single_value_there_is_only_the_diagonal():
    for text in CORES:
        assert Core.of(text).within(1) == DIAGONAL
        assert Core.of(text).within(2) == Core.of(text)


def test_turned_factors():
    torch.manual_seed(2)
    U, core = torch.randn(8, 3).double(), torch.randn(2, 3, 3).double()
    expected = torch.cat([U[:4] @ core[0], U[4:] @ core[1]])
    torch.testing.assert_close(turned(U, core), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert turned(U.float(), core.float()).dtype == torch.float32
