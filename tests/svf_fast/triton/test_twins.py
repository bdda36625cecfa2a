"""The Triton twins of the CUDA ops pass the tests of the ops."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from svf_fast.reference import affine_act as affine_definition
from svf_fast.reference import channel_dot as dot_definition
from svf_fast.triton import affine_act, channel_dot, guard, maps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # cpu: Triton's interpreter

# Without what takes the interpreter minutes, and half of the dtypes, as of the emulated kernels.
CHOSEN = {
    "affine_act": (
        "(any or special or matches or in_place or backward)"
        " and not (any_shape or sliced or more or float64 or float16)"
    ),
    "channel_dot": (
        "nan_and_infinity or different_layouts or large_cancelling or matches"
        " and not (sliced or expanded or dtype0 or dtype3 or shape5 or shape4 and contiguous)"
        " and not (shape6 and (channels_last or dtype2))"
    ),
    "guard": "not opcheck",
    "quantize": "not (opcheck or gram or refusals or whatever or float64 or 150)",
}


def run(root: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done


@pytest.mark.parametrize(
    "op, least", [("affine_act", 90), ("channel_dot", 80), ("guard", 8), ("quantize", 90)]
)
def test_the_op(op: str, least: int, root: Path) -> None:
    options = [
        "-q",
        "-x",
        "-p",
        "tests.svf_fast.triton_twins",
        "-p",
        "no:cacheprovider",
        "-k",
        CHOSEN[op],
    ]
    done = run(root, "-m", "pytest", *options, root / f"tests/svf_fast/ops/test_{op}.py")
    found = re.search(r"(\d+) passed", done.stdout)
    assert found and int(found[1]) >= least, done.stdout


def strided(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> Tensor:
    x = torch.randn(shape, device=DEVICE).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


@pytest.mark.parametrize("last", [False, True])
def test_float64_is_computed_by_the_definition(last: bool) -> None:
    y, grad, residual = (strided((2, 5, 3, 4), torch.float64, last) for _ in range(3))
    scale, shift = torch.randn(2, 5, dtype=torch.float64, device=DEVICE)
    expected = affine_definition.affine_act(y, scale, shift, residual, scale)
    out, mask = affine_act.affine_act(y, scale, shift, residual, scale, True, True)
    assert torch.equal(out, expected) and out.stride() == y.stride()
    assert torch.equal(mask, affine_definition.pack_mask(out))
    in_place = y.clone(memory_format=torch.preserve_format)
    again = affine_act.affine_act_(in_place, scale, shift, residual, scale, True, True)
    assert torch.equal(in_place, out) and torch.equal(again, mask)
    for given in ((y, None, scale, shift), (None, mask, scale, None)):
        truth = affine_definition.affine_act_backward(grad, *given)
        got = affine_act.affine_act_backward(grad, *given)
        assert torch.equal(got, truth) and got.stride() == grad.stride()
        mine = grad.clone(memory_format=torch.preserve_format)
        affine_act.affine_act_backward_(mine, *given)
        assert torch.equal(mine, truth)
    dot = dot_definition.channel_dot(y, grad)
    assert torch.equal(channel_dot.channel_dot(y, grad), dot)
    scaled = y * scale[:, None, None]
    assert torch.equal(channel_dot.channel_dot_scale_(y, grad, scale), dot)
    assert torch.equal(y, scaled)


def test_blocks_that_lie_in_the_last_row_of_an_image_and_the_first_of_the_next() -> None:
    """The values are exact: rows are longer than a block, whatever that is in the interpreter."""
    positions = 3 * affine_act.rule(torch.float32)["BLOCK"] + 5
    y = torch.randint(-9, 10, (3, 2, positions), device=DEVICE).float()
    scale, shift = (torch.tensor(values, device=DEVICE) for values in ([2.0, -3.0], [1.0, 5.0]))
    out, mask = affine_act.affine_act(y, scale, shift, None, None, True, True)
    assert torch.equal(out, affine_definition.affine_act(y, scale, shift))
    assert torch.equal(mask, affine_definition.pack_mask(out))
    expected = affine_definition.affine_act_backward(out, y, None, scale, shift)
    assert torch.equal(affine_act.affine_act_backward(out, y, None, scale, shift), expected)
    assert torch.equal(affine_act.affine_act_backward(out, None, mask, scale, None), expected)


def test_rows_of_a_map() -> None:
    assert [maps.divide_up(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    contiguous, last = (strided((2, 3, 4, 5), torch.float32, last) for last in (False, True))
    assert maps.rows_of(contiguous) == (2, 3, 20, False)
    assert maps.rows_of(last) == (2, 3, 20, True)
    assert maps.rows_of(contiguous[:, :1].contiguous()) == (1, 1, 40, False)
    assert maps.rows_of(contiguous[..., :1, :1].contiguous()) == (2, 3, 1, True)
    assert maps.with_strides_of(last, last) is last
    assert maps.with_strides_of(last, contiguous).stride() == contiguous.stride()


def test_memory_is_safe_behind_the_python_checks() -> None:
    gaps, vector = torch.zeros(2, 6, 4, device=DEVICE)[:, ::2], torch.zeros(3, device=DEVICE)
    bits = torch.zeros(16, dtype=torch.uint8, device=DEVICE)
    for call in (
        lambda: affine_act.affine_act_(gaps, vector, vector, None, None, True, False),
        lambda: affine_act.affine_act_backward_(gaps, gaps, None, vector, vector),
        lambda: affine_act.affine_act_backward(gaps, None, bits, None, None),
        lambda: channel_dot.channel_dot_scale_(gaps, gaps, vector),
    ):
        with pytest.raises(ValueError, match="contiguous or channels_last"):
            call()
    storage = torch.zeros(100, device=DEVICE)
    a, v = storage[:24].view(2, 3, 4), storage[4:28].view(2, 3, 4)
    with pytest.raises(ValueError, match="share no memory"):
        channel_dot.channel_dot_scale_(a, v, vector)
    S, guarded = torch.ones(4, device=DEVICE), torch.zeros(4, dtype=torch.bool, device=DEVICE)
    layers = torch.tensor([[0, 1], [4, 0]], device=DEVICE)
    for wrong in ((S.double(), guarded, layers), (S, guarded[:3], layers), (S, guarded, layers.T)):
        with pytest.raises(ValueError, match="guards_hold: .*expected"):
            guard.guards_hold(*wrong, 2.0)


def test_vectors_of_sixteen_bytes_and_no_spills(root: Path) -> None:
    """Of channels_last maps with 8·n channels, and contiguous ones with long rows."""
    script = (
        "import torch\n"
        "from svf_fast.triton import affine_act, channel_dot, check\n"
        "for module in (affine_act, channel_dot):\n"
        "    for problem in module.problems():\n"
        "        vectors = problem.channels % 8 == 0 or problem.positions > 1024\n"
        "        for arch in check.ARCHITECTURES:\n"
        "            config = problem.candidates(arch)[0]\n"
        "            if problem.dtype == torch.bfloat16 and vectors:\n"
        "                kernel = check.usages(problem, config, arch)[0]\n"
        "                print(kernel.kernel, kernel.spilled, kernel.ptx.count('.v4.b32'))\n"
    )
    environment = {"TRITON_INTERPRET": "0"}
    rows = [line.split() for line in run(root, "-c", script, **environment).stdout.splitlines()]
    assert {row[0] for row in rows} == {
        *("affine_act_kernel", "affine_act_backward_kernel"),
        *("channel_dot_columns_kernel", "channel_dot_rows_kernel"),
    }
    for kernel, spilled, vectors in rows:
        assert spilled == "0" and int(vectors) >= 2, kernel
