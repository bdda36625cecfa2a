"""What a weight is recognized by once it is decomposed: exactly by a hash, nearly by some sums.

In a layer both are floating point numbers, so that arithmetic on state dicts keeps them: averages
of models, moving or federated, leave what is equal in all of them as it was.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from svf_fast.svd import has_memory

ROUNDING = 0.01
"""Largest relative distance of two weights that are one but for rounding.

A weight is 0.002 from itself in bfloat16, unrelated weights are √2 apart.
"""
_DIGITS = 32  # of the hash
_SUMS = 17  # a prime number: each sum takes elements of all channels and positions
PATTERN = f"[0-9a-f]{{{_DIGITS}}}([0-9a-f]{{{4 * _SUMS}}})?"
"""Of a fingerprint as text; the second part is missing in files of older versions."""


def fingerprint(weight: Tensor) -> Tensor:
    """Summarize a weight of any shape as float32 [49]: 32 digits of a hash, and 17 sums.

    The hash is the first half of a SHA-256 of the shape and the float32 values, a digit below 16 a
    number. The sums are those of the values with random signs, divided by the weight's norm: their
    distance estimates the relative distance of two weights, whatever their scale, which is in S.
    Empty for a weight without values (meta).
    """
    if not has_memory(weight):
        return weight.new_empty(_DIGITS + _SUMS, dtype=torch.float32)
    values = weight.detach().cpu().float().contiguous().flatten()
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    digest.update(values.view(torch.uint8).numpy().data)
    digits = [int(digit, 16) for digit in digest.hexdigest()[:_DIGITS]]
    return torch.tensor([*digits, *_sums(values)], dtype=torch.float32, device=weight.device)


def of_older_version(digest: Tensor) -> Tensor:
    """Turn the first 16 bytes of the hash, all that older versions kept, into [49]; no sums: 0."""
    high, low = digest.float().round() // 16, digest.float().round() % 16
    return torch.cat([torch.stack([high, low], 1).flatten(), high.new_zeros(_SUMS)])


def as_texts(fingerprints: list[Tensor]) -> list[str]:
    """Write fingerprints as hexadecimal digits: the hash, and the sums in float16 if known."""
    rows = torch.stack([row.float() for row in fingerprints]).cpu()  # one copy from a GPU
    texts = []
    for row in rows.nan_to_num():
        digits = "".join(f"{int(digit) % 16:x}" for digit in row[:_DIGITS].round())
        sums = row[_DIGITS:].numpy().astype("<f2").tobytes().hex() if row[_DIGITS:].any() else ""
        texts.append(digits + sums)
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
    if len(a) != len(b) or len(a) == _DIGITS:
        return math.inf
    with np.errstate(invalid="ignore"):
        return float(np.linalg.norm(_read_sums(a) - _read_sums(b)))


def _read_sums(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text[_DIGITS:]), "<f2").astype(np.float64)


def _sums(values: Tensor) -> list[float]:
    bits = np.frombuffer(np.random.RandomState(0).bytes(len(values) // 8 + 1), np.uint8)
    signs = 1 - 2 * torch.from_numpy(np.unpackbits(bits)[: len(values)]).float()
    padded = torch.nn.functional.pad(signs.mul_(values), (0, -len(values) % _SUMS))
    norm = values.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return (padded.reshape(-1, _SUMS).sum(0) / norm).tolist()
