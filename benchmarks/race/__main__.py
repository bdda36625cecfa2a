"""Races the peers of a level, prints the table and saves it: results/LEVEL.json.

    python -m benchmarks.race --level block
    python -m benchmarks.race --level layer --dtype bfloat16 --peers "official;svf_fast"

Every peer runs on the same inputs: gradients are compared with float64 first, and one that is not
exact has no speed. Then bytes are counted, steps timed in turns and peaks measured. Settings that
are not the defaults are in the file's name.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.files import RESULTS, earlier_groups, write_results
from benchmarks.race.contest import Contest
from benchmarks.race.levels import LEVELS, Level, Settings, defaults
from benchmarks.render import markdown

ROUNDS = {"layer": 11, "block": 11, "backbone": 9, "step": 7, "prior": 5, "vit": 7}
GPU_ROUNDS = 31  # milliseconds each


def main(arguments: list[str] | None = None) -> int:
    options = _arguments(arguments)
    level = LEVELS[options.level]
    settings = dataclasses.replace(defaults(level.name), **_given(options))
    words = [variant(level, settings), *([options.suffix] if options.suffix else [])]
    path = options.results / f"{'-'.join(words)}.json"
    earlier = earlier_groups(path, settings) if options.resume else []
    groups = {group["name"]: group for group in earlier}

    def save(group: dict[str, Any]) -> None:
        groups[group["name"]] = group
        write_results(
            path, level.name, level.title, settings, list(groups.values()), options.suffix
        )

    rounds = options.rounds or (ROUNDS[level.name] if settings.device == "cpu" else GPU_ROUNDS)
    deadline = math.inf if options.seconds is None else time.monotonic() + options.seconds
    for group in level.groups:
        rows = groups[group]["rows"] if group in groups else []
        contest = Contest(level, group, settings, options.peers, options.svd_cache, rows)
        contest.run(rounds, options.peaks, save, deadline)
        print(f"{level.name}: {group}", flush=True)
    print(f"\n{markdown(path)}\nwritten: {path}")
    rows = [row for group in groups.values() for row in group["rows"]]
    return 1 if any(unfinished(row, options.peaks) for row in rows) else 0


def unfinished(row: dict[str, Any], peaks: bool) -> bool:
    """Return whether a row failed, is not exact, or lacks the peak that was to be measured."""
    if "reason" in row:
        return not row.get("skipped")
    return not row["exact"] or (peaks and not row.keys() & {"peak_bytes", "peak_reason"})


def variant(level: Level, settings: Settings) -> str:
    """Return the stem of the results' file: the level, then whatever is not as by default."""
    default, words = Settings(batch=defaults(level.name).batch), [level.name]
    if settings.shots != default.shots:
        words.append(f"{settings.shots}shot")
    if settings.size != default.size:
        words.append(f"{settings.size}px")
    if settings.batch != default.batch:
        words.append(f"batch{settings.batch}")
    if settings.dtype != default.dtype:
        words.append(settings.dtype)
    if settings.channels_last:
        words.append("channels_last")
    if settings.device != default.device:
        words.append(settings.device)
    if (settings.backbone, settings.width) != (default.backbone, default.width):
        words.append(f"{settings.backbone}_{settings.width}")
    return "-".join(words)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--level", choices=list(ROUNDS), required=True)
    for field in dataclasses.fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true", help="memory format of the maps")
        else:
            parser.add_argument(option, type=type(field.default), help="see levels.Settings")
    parser.add_argument("--peers", help="names separated by semicolons (default: all)")
    parser.add_argument("--rounds", type=int, help="timed steps of each peer")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-peak", dest="peaks", action="store_false", help="measure no peaks")
    parser.add_argument("--suffix", help="what the names of the results end with")
    parser.add_argument("--seconds", type=float, help="after them fewer rounds and no peaks")
    parser.add_argument("--svd-cache", type=Path, help="folder of decompositions, kept")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run measured")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    known = LEVELS[options.level].peers
    names = [name.strip() for name in options.peers.split(";")] if options.peers else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--peers: expected some of {'; '.join(known)}, got {'; '.join(unknown)}")
    options.peers = [name for name in names if not (options.no_compile and known[name].compiled)]
    return options


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were named on the command line."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    return {name: value for name, value in values.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
