"""Files of settings: those of the package by name (`demo`, `regimes/svf`); read and merged."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Container
from pathlib import Path
from typing import Any

from fss.config import TrainConfig
from fss.files import read_yaml

FOLDER = Path(__file__).parent / "configs"


def config_names(part: str = "") -> list[str]:
    """List the names of the files in fss/configs, or in its folder `part`, as "regimes/svf"."""
    paths = (FOLDER / part).glob("*.yaml")
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in paths)


def config_file(name: str) -> Path:
    """Return the file at a path, or the one of this name that comes with the package.

    Raises:
        FileNotFoundError: neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    if name not in config_names() + config_names("regimes"):
        raise FileNotFoundError(
            f"config: expected a YAML file, {', '.join(config_names())}, or regimes/NAME with one "
            f"of {', '.join(n.partition('/')[2] for n in config_names('regimes'))}; got {name!r}"
        )
    return FOLDER / f"{name}.yaml"


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with `changes` over them, part by part."""
    result = dict(values)
    for name, change in changes.items():
        former = result.get(name)
        both = isinstance(change, dict) and isinstance(former, dict)
        result[name] = merged(former, change) if both else change
    return result


def flat_settings(
    values: dict[str, Any], free: Container[str] = (), prefix: str = ""
) -> dict[str, Any]:
    """Return the settings of a configuration by dotted name, without those of `free`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, dict):
            flat |= flat_settings(value, free, f"{name}.")
        elif name not in free:
            flat[name] = value
    return flat


def read_settings(path: Path) -> dict[str, Any]:
    """Read a file with settings of `fss train` and check their names.

    Raises:
        FileNotFoundError, ValueError: no file; not YAML; a name that is no setting.
    """
    if not path.is_file():
        raise FileNotFoundError(f"settings: expected a YAML file at {path}, found none")
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected settings by name, got a {type(values).__name__}")
    check_names(values, TrainConfig, str(path))
    return values


def check_names(values: Any, part: type, where: str) -> None:
    """Raise ValueError for a name that is not a field of the dataclass `part`, or of its parts."""
    types = typing.get_type_hints(part)
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected settings by name, got {values!r}")
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{where}: {name!r} is no setting; expected {', '.join(types)}")
        if dataclasses.is_dataclass(types[name]):
            check_names(value, types[name], f"{where}: {name}")
