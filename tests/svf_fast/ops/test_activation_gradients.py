"""activation_gradients on the CPU: the way back through an activation, and dS on both sides."""

from __future__ import annotations

import pytest
import torch

from svf_fast.ops.activation_gradients import activation_gradients
from svf_fast.reference.affine_act import affine_act_backward
from tests.svf_fast.ops.test_gram import DENSE, DTYPES, affine, maps
from tests.svf_fast.ops.test_scale_gradient import check, readings


@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_sides_of_an_activation(dtype, layout, groups, poisoned_memory) -> None:
    grad, y = (maps((2, 6, 5, 7), dtype, layout) for _ in range(2))
    scale, shift = affine(6, dtype)
    before, after = (readings((6 // groups, 6 // groups), groups, dtype) for _ in range(2))
    expected = affine_act_backward(grad, y, None, scale, shift)
    for sides in ((before, after), (before, None), (None, after), (None, None)):
        g, *found = activation_gradients(grad.clone(), y, scale, shift, *sides)
        assert torch.equal(g, expected) and g.stride() == grad.stride()
        assert [dS is None for dS in found] == [side is None for side in sides]
        if sides[0] is not None:
            check(found[0], g, y, before)
        if sides[1] is not None:
            check(found[1], y, grad, after, scale, shift)


def test_opcheck_and_memory_safety() -> None:
    raw = torch.ops.svf_fast
    a = torch.randn(2, 4, 3, 3)
    scale, shift = torch.randn(2, 4)
    own = readings((4, 4), 1, torch.float32)
    sides = (own, []), ([], own), (own, own)
    for before, after in sides:
        arguments = a.clone(), torch.randn_like(a), scale, shift, before, after
        torch.library.opcheck(raw.activation_gradients_.default, arguments)
    with pytest.raises(RuntimeError, match="left, right and S, or nothing"):
        raw.activation_gradients_(a, a.clone(), scale, shift, own[:2], [])
