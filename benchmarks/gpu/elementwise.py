"""The element-wise ops against the bandwidth of a copy: results/elementwise.json.

    python -m benchmarks.gpu.elementwise

Maps as in layer 3 of ResNet-50 at 641 px, large enough that no cache holds one. Bytes are those
that an op has to read and write. An op is compared with its definition in float64 on fresh small
maps of odd sizes first; one that fails has no speed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import svf_fast.ops.affine_act as ops
import svf_fast.reference.affine_act as definitions
from benchmarks.files import RESULTS, write_results
from benchmarks.gpu.facts import copy_rate, times
from svf_fast.ops.channel_dot import channel_dot, channel_dot_scale_

SHAPE = {"cuda": (16, 1024, 81, 81), "cpu": (1, 64, 9, 9)}
SMALL = (3, 72, 9, 7)
ROUNDINGS = 4.0  # of the dtype, for a result that rounds once or twice


class Maps(NamedTuple):
    """Random arguments of the ops."""

    y: Tensor
    grad: Tensor
    residual: Tensor
    scale: Tensor
    shift: Tensor
    signs: Tensor  # a scaling that can be repeated
    mask: Tensor  # bits of a ReLU

    @classmethod
    def random(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Maps:
        def draw() -> Tensor:
            x = torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
            return x.contiguous(memory_format=torch.channels_last)

        scale, shift = (torch.randn(shape[1], device=device) for _ in range(2))
        mask = definitions.pack_mask(draw())
        return cls(draw(), draw(), draw(), scale, shift, shift.sign(), mask)

    def double(self) -> Maps:
        return Maps(*(x.double() for x in self[:-1]), self.mask)


class Case(NamedTuple):
    """An op on maps, its definition, and the maps it has to read and write, bits apart."""

    run: Callable[[Maps], Tensor]
    definition: Callable[[Maps], Tensor]
    maps: int
    bits: bool = False


CASES = {
    "affine, ReLU": Case(
        lambda m: ops.affine_act(m.y, m.scale, m.shift)[0],
        lambda m: definitions.affine_act(m.y, m.scale, m.shift),
        2,
    ),
    "affine, residual, ReLU, bits": Case(
        lambda m: ops.affine_act(m.y, m.scale, m.shift, m.residual, mask=True)[0],
        lambda m: definitions.affine_act(m.y, m.scale, m.shift, m.residual),
        3,
        bits=True,
    ),
    "backward from y": Case(
        lambda m: ops.affine_act_backward(m.grad, y=m.y, scale=m.scale, shift=m.shift),
        lambda m: definitions.affine_act_backward(m.grad, m.y, None, m.scale, m.shift),
        3,
    ),
    "backward from bits": Case(
        lambda m: ops.affine_act_backward(m.grad, mask=m.mask, scale=m.scale),
        lambda m: definitions.affine_act_backward(m.grad, None, m.mask, m.scale, None),
        2,
        bits=True,
    ),
    "channel_dot": Case(
        lambda m: channel_dot(m.y, m.grad),
        lambda m: (m.y * m.grad).sum(dim=(0, 2, 3)),
        2,
    ),
    "channel_dot_scale_": Case(
        lambda m: channel_dot_scale_(m.residual, m.y, m.signs),
        lambda m: (m.residual * m.y).sum(dim=(0, 2, 3)),
        3,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    copied = copy_rate(device)
    groups = []
    for name in options.dtypes:
        dtype = getattr(torch, name)
        rows = [measure(case, CASES[case], dtype, device, copied) for case in CASES]
        groups.append({"name": name, "rows": rows, "copy_bytes_per_second": copied})
        for row in rows:
            print(name, {key: value for key, value in row.items() if key != "seconds"})
    settings = {"device": options.device, "shape": SHAPE[device.type]}
    path = options.results / "elementwise.json"
    title = "Element-wise ops"
    print(write_results(path, "elementwise", title, settings, groups))
    return 0


def measure(
    name: str, case: Case, dtype: torch.dtype, device: torch.device, copied: float
) -> dict[str, Any]:
    """Return seconds, bytes and the fraction of a copy's rate, or the reason for none."""
    row: dict[str, Any] = {"peer": name}
    try:
        small = Maps.random(SMALL, dtype, device)
        truth = case.definition(small.double())
        found = case.run(small).double()
        row["error"] = ((found - truth).norm() / truth.norm()).item()
        row["exact"] = row["error"] <= ROUNDINGS * torch.finfo(dtype).eps
        if not row["exact"]:
            return row
        maps = Maps.random(SHAPE[device.type], dtype, device)
        row["seconds"] = times(lambda: case.run(maps), device)
    except Exception as error:  # the other ops go on
        return row | {"reason": f"{type(error).__name__}: {str(error)[:160]}"}
    elements = maps.y.numel()
    row["bytes"] = case.maps * elements * dtype.itemsize + case.bits * elements / 8
    row["fraction_of_copy"] = row["bytes"] / statistics.median(row["seconds"]) / copied
    return row


if __name__ == "__main__":
    sys.exit(main())
