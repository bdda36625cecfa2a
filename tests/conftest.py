"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

os.environ.pop("PYTEST_XDIST_WORKER", None)  # a pytest that a test starts is nobody's worker
if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a test, or a library it calls, sets in the environment does not reach the next one."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (`empty` in Python and in C++ alike), so a read of it shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights: $SVF_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("SVF_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("no real data here: neither $SVF_SHARED nor ../shared is a folder")
    return folder
