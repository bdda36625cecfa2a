"""What a weight is recognized by once it is decomposed: exactly by a hash, nearly by some sums.

With it goes the basis that S is of, by sums too, where it is not that of ``svf_fast.decompose``.

In a layer both are floating point numbers, so that arithmetic on state dicts keeps them: averages
of models, moving or federated, leave what is equal in all of them as it was.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from svf_fast.svd import Factors, are_of, are_ordered, compose, has_memory

ROUNDING = 0.01
"""Largest relative distance of two weights that are one but for rounding.

A weight is 0.002 from itself in bfloat16, unrelated weights are √2 apart.
"""
_DIGITS = 32  # of the hash
_LARGEST = 65504.0  # in float16
_SUMS = 17  # a prime number: each sum takes elements of all channels and positions
_SIZE = _DIGITS + 2 * _SUMS
PATTERN = f"[0-9a-f]{{{_DIGITS}}}([0-9a-f]{{{4 * _SUMS}}}){{0,2}}"
"""Of a fingerprint as text: hash, sums (missing in files of older versions), and a basis of its own
if it has one."""


def fingerprint(weight: Tensor) -> Tensor:
    """Summarize a weight of any shape as float32 [66]: 32 digits of a hash, 17 sums, and 17 zeros.

    The hash is the first half of a SHA-256 of the shape and the float32 values, a digit below 16 a
    number. The sums are those of the values with random signs, divided by the weight's norm: their
    distance estimates the relative distance of two weights, whatever their scale, which is in S.
    The zeros stand for the basis that :func:`svf_fast.decompose` gives S. Empty for a weight
    without values (meta).
    """
    if not has_memory(weight):
        return weight.new_empty(_SIZE, dtype=torch.float32)
    values = weight.detach().cpu().float().contiguous().flatten()
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    digest.update(values.view(torch.uint8).numpy().data)
    digits = [int(digit, 16) for digit in digest.hexdigest()[:_DIGITS]]
    summary = [*digits, *_sums(values), *[0.0] * _SUMS]
    return torch.tensor(summary, dtype=torch.float32, device=weight.device)


def of_factors(factors: Factors, weight: Tensor, groups: int) -> Tensor:
    """Summarize the weight that known factors compose, and their basis, as float32 [66].

    ``weight``: of the layer they are for. If it is theirs, to rounding, its own hash is kept.
    """
    detached = Factors(*(each.detach() for each in factors))
    if not all(map(has_memory, detached)):
        return fingerprint(detached.U)
    weight = weight.detach()
    if has_memory(weight):
        weight = weight.to(detached.U.device)
    known = has_memory(weight) and are_of(weight, detached, groups)
    found = fingerprint(weight if known else compose(*detached, groups))
    if not are_ordered(detached, groups):
        found[-_SUMS:] = _basis(detached, groups).to(found)
    return found


def of_older_version(kept: Tensor) -> Tensor:
    """Turn what older versions kept into [66]: [49] without a basis, or the hash alone, 16 bytes.

    What is missing is 0. What is [66] stays.
    """
    if kept.shape == (_DIGITS // 2,):
        high, low = kept.float().round() // 16, kept.float().round() % 16
        kept = torch.stack([high, low], 1).flatten()
    if kept.shape not in ((_DIGITS,), (_DIGITS + _SUMS,)):
        return kept
    return torch.cat([kept, kept.new_zeros(_SIZE - len(kept))])


def as_texts(fingerprints: list[Tensor]) -> list[str]:
    """Write fingerprints as hexadecimal digits: the hash; as float16 sums and basis, if any."""
    rows = torch.stack([row.float() for row in fingerprints]).cpu()  # one copy from a GPU
    texts = []
    for row in rows.nan_to_num():
        digits = "".join(f"{int(digit) % 16:x}" for digit in row[:_DIGITS].round())
        weight, basis = row[_DIGITS:].clamp(-_LARGEST, _LARGEST).split(_SUMS)
        known = (weight, basis) if basis.any() else (weight,) if weight.any() else ()
        sums = (each.numpy().astype("<f2").tobytes().hex() for each in known)
        texts.append("".join([digits, *sums]))
    return texts


def hash_of(text: str) -> str:
    """Return the hash of a fingerprint as text."""
    return text[:_DIGITS]


def distance(a: str, b: str) -> float:
    """Estimate the relative distance of two weights from their fingerprints, within a third.

    0 for equal ones; infinite for others if an older version wrote one of them, without sums.
    """
    if hash_of(a) == hash_of(b):
        return 0.0
    if _DIGITS in (len(a), len(b)):
        return math.inf
    with np.errstate(invalid="ignore"):
        return float(np.linalg.norm(_read_sums(a)[:_SUMS] - _read_sums(b)[:_SUMS]))


def basis_distance(a: str, b: str) -> float:
    """Estimate how far the bases that S is of are apart: 0 for the same, about 1 for unrelated."""
    bases = [np.resize(_read_sums(x)[_SUMS:], _SUMS) for x in (a, b)]  # none: 0
    with np.errstate(invalid="ignore"):
        return float(np.linalg.norm(bases[0] - bases[1]))


def _read_sums(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text[_DIGITS:]), "<f2").astype(np.float64)


def _basis(factors: Factors, groups: int) -> Tensor:
    """Sum up the directions ``u_r v_rᵀ`` of known factors, each seen at random, to [17].

    Their order counts, their lengths, and the sign of each, but not that of u_r and v_r alone: two
    directions in each other's place are told by 2 / √(G·R).
    """
    U = factors.U.reshape(groups, -1, factors.U.shape[1]).cpu().float()
    V = factors.V.reshape(groups, U.shape[2], -1).cpu().float()
    random = np.random.RandomState(0)
    rows, columns, order = (
        torch.from_numpy(random.standard_normal((_SUMS, *shape))).float()
        for shape in (U.shape[:2], V.shape[2:], V.shape[:2])
    )
    seen_u = torch.einsum("kgo,gor->kgr", rows, U)
    seen_v = torch.einsum("ki,gri->kgr", columns, V)
    return (order * seen_u * seen_v).sum((1, 2)) / math.sqrt(order.numel())


def _sums(values: Tensor) -> list[float]:
    bits = np.frombuffer(np.random.RandomState(0).bytes(len(values) // 8 + 1), np.uint8)
    signs = 1 - 2 * torch.from_numpy(np.unpackbits(bits)[: len(values)]).float()
    padded = torch.nn.functional.pad(signs.mul_(values), (0, -len(values) % _SUMS))
    norm = values.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return (padded.reshape(-1, _SUMS).sum(0) / norm).tolist()
