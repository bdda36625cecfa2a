"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """A test leaves the environment as it was: what it sets would decide how later ones run."""
    before = dict(os.environ)
    yield
    names = {name for name, _ in before.items() ^ os.environ.items()} - {"PYTEST_CURRENT_TEST"}
    assert not names, f"the test left {sorted(names)} changed in os.environ"


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
