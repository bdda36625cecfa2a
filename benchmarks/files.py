"""Files of results: what was measured, with the machine, the commit and the command."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.race.levels import Settings
from fss.files import write_json
from fss.training.provenance import provenance

RESULTS = Path(__file__).with_name("results")


def command() -> str:
    """Return the command line of this process, to be run from the repository."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def write_results(
    path: Path,
    level: str,
    title: str,
    settings: Settings | dict[str, Any],
    groups: list[dict],
    suffix: str | None = None,
) -> Path:
    """Write results with all that is needed to get them again; return the path.

    A suffix, what the file's name ends with, tells a race of its own from the one that counts.
    """
    given = settings if isinstance(settings, dict) else dataclasses.asdict(settings)
    content = {
        "level": level,
        "title": title,
        "settings": given,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **provenance(torch.device(given["device"])),
        "suffix": suffix,
        "command": command(),
        "groups": groups,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return path


def earlier_groups(path: Path, settings: Settings) -> list[dict]:
    """Return the groups of an earlier file of results; none unless it has the same settings."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    return found["groups"] if found["settings"] == dataclasses.asdict(settings) else []
