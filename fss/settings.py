"""The files of settings that come with the package, by name: `demo`, `regimes/svf`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "configs"


def config_names(part: str = "") -> list[str]:
    """Names of the files in fss/configs; of those in its folder `part`, as "regimes/svf"."""
    paths = (FOLDER / part).glob("*.yaml")
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in paths)


def config_file(name: str) -> Path:
    """The file at a path, or the one of this name that comes with the package.

    Raises:
        FileNotFoundError: neither is there.
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
