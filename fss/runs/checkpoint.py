"""Checkpoints of a run: complete, portable, and refused where they do not belong."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import torch

from fss.config import TrainConfig, free_settings
from fss.files import atomic_write, causes
from fss.settings import flat_settings

_FORMAT = 1


def signature(config: TrainConfig) -> dict[str, Any]:
    """Collect the settings that a checkpoint's weights depend on; a loader must agree with them."""
    values = config.to_dict()
    return {
        **{
            f"model.{name}": values["model"][name]
            for name in ("name", "backbone", "stem", "stride_on", "width", "channels")
        },
        **{f"regime.{name}": value for name, value in config.regime.signature().items()},
        "data.source": values["data"]["source"],
        "data.fold": values["data"]["fold"],
    }


def save_checkpoint(path: Path, config: TrainConfig, state: dict[str, Any]) -> None:
    """Write `state` with the configuration and its signature.

    All weights are stored, the frozen ones too, so that a checkpoint needs no other file.

    Args:
        path: the file.
        config: of the run.
        state: tensors and plain values; "model" is the state dict.

    Raises:
        OSError: see `write_checkpoint`.
    """
    own = {"format": _FORMAT, "signature": signature(config), "config": config.to_dict()}
    write_checkpoint(path, {**state, **own})


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values; until all is written, the former file stays at `path`.

    Tensors that a GPU keeps in channels_last are written contiguous: a reader adopts the layout
    that it finds.

    Raises:
        OSError: a disk that is full or fails.
    """
    outer = sys.exc_info()[1]  # a run saves also while it ends by an error of another kind
    try:
        with atomic_write(path) as file:
            torch.save(_contiguous(content), file)
    except (OSError, RuntimeError) as error:
        # torch's writer hides the error of the file behind one of its own
        found = list(causes(error, outer))
        cause = next((e for e in found if isinstance(e, OSError)), None)
        if cause is None and ("PytorchStreamWriter" not in str(error) or len(found) > 1):
            raise
        kept = "the one written before is whole" if path.is_file() else "none was written before"
        raise OSError(
            f"checkpoint: {path} cannot be written ({cause.strerror if cause else 'disk full?'}), "
            f"{kept}; make room on the disk, then go on with --resume"
        ) from error


def _contiguous(content: Any) -> Any:
    """Return the content with its tensors [N, C, H, W] contiguous."""
    if isinstance(content, torch.Tensor):
        return content.contiguous() if content.ndim == 4 else content
    if isinstance(content, dict):
        result = copy.copy(content)  # a state dict has attributes of its own
        result.update((name, _contiguous(value)) for name, value in content.items())
        return result
    return content


def load_checkpoint(path: Path, config: TrainConfig | None = None) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Args:
        path: the file.
        config: if given, the checkpoint must be of this model, regime, source and fold.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one of another program, or of another model, regime or fold.
    """
    content = read_checkpoint(path)
    stored = content.get("format") if isinstance(content, dict) else None
    if not isinstance(stored, int) or stored != _FORMAT:
        got = f"format {stored!r}" if isinstance(content, dict) else repr(content)
        raise ValueError(
            f"checkpoint: expected a checkpoint of fss, format {_FORMAT}, at {path}, got {got:.200}"
        )
    wrong = [
        name for name in ("signature", "config", "model") if not isinstance(content.get(name), dict)
    ]
    if wrong:
        raise ValueError(f"checkpoint: {path} is damaged: it holds no {' and no '.join(wrong)}")
    if config is not None:
        check_same(content["signature"], signature(config), path)
    return content


def read_checkpoint(path: Path) -> Any:
    """Read what `write_checkpoint` wrote, onto the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one of another program.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file at {path}, found none")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged files torch.load raises whatever its readers do
        raise ValueError(
            f"checkpoint: {path} cannot be read, it is truncated or was not written by fss; "
            "use another checkpoint or train again "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'})"
        ) from error


@contextmanager
def explain_misfit(path: Path) -> Iterator[None]:
    """Say in the user's words that the content of a checkpoint is not what its reader expects.

    Raises:
        ValueError: replaces what a missing entry, or one of another type or shape, raises.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        line = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"checkpoint: {path} is damaged, or was written by another version of fss "
            f"({type(error).__name__}: {line:.200})"
        ) from error


def check_types(state: dict[str, Any], types: dict[str, type | UnionType]) -> None:
    """Check the entries and their types; raise LookupError or TypeError."""
    for name, expected in types.items():
        if not isinstance(state[name], expected):
            raise TypeError(f"{name}: expected {expected}, got {type(state[name])}")


def check_same(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Check that a checkpoint has the wanted values; raise ValueError with each difference."""
    differences = [
        f"{name}: expected {wanted.get(name)!r}, the checkpoint has {stored.get(name)!r}"
        for name in {**wanted, **stored}
        if wanted.get(name) != stored.get(name)
    ]
    if differences:
        raise ValueError(
            f"checkpoint: {path} belongs to another run: {'; '.join(differences)}. Set these as "
            "in the checkpoint, or give another --out"
        )


def check_same_settings(stored: dict[str, Any], config: Any, between: str, path: Path) -> None:
    """Check that a run would go on with, or is finished with, the settings of a configuration.

    A setting that is newer than the run has its default there.

    Args:
        stored: the settings of the run.
        config: a configuration; its class has `from_dict` and `to_dict`.
        between: which settings may differ, see `free_settings`.
        path: where the stored ones are from.

    Raises:
        ValueError: each difference, or no settings.
    """
    free = free_settings(type(config), between)
    with explain_misfit(path):
        former = type(config).from_dict(stored).to_dict()
    check_same(flat_settings(former, free), flat_settings(config.to_dict(), free), path)


def random_state() -> dict[str, Any]:
    """Collect the states of the random generators of torch, numpy and Python in this process."""
    # The legacy generator is numpy's only global one, which libraries still draw from.
    algorithm, keys, *rest = np.random.get_state()  # noqa: NPY002
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (algorithm, list(map(int, keys)), *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    algorithm, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
