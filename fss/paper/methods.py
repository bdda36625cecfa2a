"""Methods side by side on the same photos: scores, memory and time of each, in several regimes."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fss.config import METHODS, OptimizerConfig, RegimeConfig, TrainConfig
from fss.config.checks import check_positive
from fss.data import build_episodes, build_source, collate_episodes
from fss.evaluation.evaluate import read_episodes
from fss.evaluation.metrics import paired_difference
from fss.evaluation.score import evaluate_matching
from fss.files import atomic_write, parse_json, read_text, read_yaml, write_json
from fss.paper.runs import (
    FAILURES,
    check_made,
    check_same_files,
    conclude_when_stopped,
    failed,
    is_first_process,
    make,
    origin,
)
from fss.processes import launch, lay_out
from fss.runs.checkpoint import check_same_settings
from fss.runs.folder import BaseLearnerFolder, RunFolder
from fss.settings import check_names, config_file, config_names, flat_settings, merged
from fss.training.base_learner import BaseLearnerConfig, BaseLearnerData

MATCHING = "matching"
"""The name of the comparison with the supports that trains nothing, see `fss.models.Matching`."""

_MIB = 2**20
_TIMED = 8  # episodes


@dataclass
class MethodRun:
    """A method in a regime, and what came of it.

    Attributes:
        method: of `METHODS`, or "matching".
        regime: "" for matching.
        folder: of the run.
        config: its settings; of matching those of the data and the test.
        base: the run of its base learner, if that is trained here.
        reason: why it has no result; None if it has one.
        result: of `fss train`, or of `fss eval` for matching.
        episode_seconds: of the test of one episode.
    """

    method: str
    regime: str
    folder: RunFolder
    config: TrainConfig
    base: BaseLearnerConfig | None = None
    reason: str | None = "not run yet"
    result: dict[str, Any] | None = None
    episode_seconds: float | None = None

    @property
    def test(self) -> dict[str, Any]:
        """Return the scores of novel classes."""
        assert self.result is not None
        return self.result["test"] if self.regime else self.result


def compare_methods(
    methods: Sequence[str],
    config: str = "demo",
    regimes: Sequence[str] = ("freeze", "svf"),
    own_optimizer: bool = False,
    out: str = "runs/compare",
    minutes: float | None = None,
    list: bool = False,
    **overrides: Any,
) -> str:
    """Train methods on the same photos, each in several regimes, and compare them in a table.

    All have the data, the backbone, the steps and the test episodes of one configuration, so the
    differences are paired by episode. A head has the width that its authors use, of pascal_METHOD,
    unless the configuration gives `model.channels`. What is finished is kept: the same command goes
    on. A run that fails stands in the table with its error. The table is of the methods of the
    command: name those of an earlier one again, and their runs are taken as they are.

    Args:
        methods: names of `model.name`; "matching" compares query and supports without training.
        config: YAML file of `fss train`, or the name of one that comes with fss: data, backbone,
            optimizer, steps and test of all runs.
        regimes: names of files of fss/configs/regimes, in place of the configuration's regime; the
            first is what the others differ from.
        own_optimizer: train each method with the optimizer that its authors use, from
            pascal_METHOD, in place of the configuration's.
        out: folder of the runs, and of the table: methods.md and methods.json.
        minutes: begin no run after so many.
        list: only list the runs and how far they are.
        overrides: settings of `fss train` by part, over the configuration's.

    Returns the text to print.

    Raises:
        FileNotFoundError: no such configuration; no data there.
        ValueError: an unknown method, regime or setting; a folder with runs of other settings.
        Stopped: after ctrl-C or SIGTERM; the message says how to go on.
    """
    if minutes is not None:
        check_positive("minutes", minutes)
    runs = plan_methods(methods, config, regimes, own_optimizer, out, overrides)
    if list:
        width = max(len(run.folder.path.name) for run in runs)
        return "\n".join(f"{run.folder.path.name:{width}}  {_state(run)}" for run in runs)
    build_source(runs[0].config.data)  # what is missing there would fail every run
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    for run in runs:
        _check_made(run)
    with conclude_when_stopped(lambda: _write(runs, regimes, Path(out)), Path(out) / "methods.md"):
        # finished ones first, so that a table that is written early has them all
        for run in sorted(runs, key=lambda run: _state(run) != "finished"):
            if _state(run) == "finished" or time.monotonic() < end:
                _make(run)
    return _write(runs, regimes, Path(out))


def plan_methods(
    methods: Sequence[str],
    config: str,
    regimes: Sequence[str],
    own_optimizer: bool,
    out: str,
    overrides: dict[str, Any],
) -> list[MethodRun]:
    """List the runs of a comparison; see `compare_methods` for arguments and errors."""
    known = (*METHODS, MATCHING)
    for name, got in (("methods", methods), ("regimes", regimes)):
        if not got or len(set(got)) != len(got):
            raise ValueError(f"{name}: expected different names, at least one; got {[*got]}")
    for method in methods:
        if method not in known:
            raise ValueError(f"methods: expected names of {', '.join(known)}; got {method!r}")
    files = config_names("regimes")
    for regime in regimes:
        if f"regimes/{regime}" not in files:
            listed = ", ".join(name.partition("/")[2] for name in files)
            raise ValueError(f"regimes: expected names of {listed}; got {regime!r}")
    if "regime" in overrides:
        raise ValueError(f"regime: expected names, in regimes; got {overrides['regime']}")
    path = config_file(config)
    values = read_yaml(path)
    check_names(values, TrainConfig, str(path))
    values = merged({"data": {}} | values, overrides)
    runs = []
    for method in methods:
        for regime in regimes if method != MATCHING else [""]:
            folder = Path(out) / "-".join(filter(None, (method, regime)))
            own = overrides.get("optimizer", {}) if own_optimizer else None
            runs.append(_plan(method, regime, values, own, folder))
    return runs


def _plan(
    method: str, regime: str, values: dict[str, Any], own: dict[str, Any] | None, folder: Path
) -> MethodRun:
    """Plan one run; `own` is what goes over its authors' optimizer, None leaves the given one."""
    values = merged(values, {"out": str(folder)})
    if method == MATCHING:
        values = merged(values, {"model": {"name": "baseline", "base_weights": None}})
        config = TrainConfig.from_dict(values)
        config.optimizer = _of_the_head(config.optimizer)
        return MethodRun(method, "", RunFolder(folder), config)
    # in place of the configuration's own, whose layers and batch norms would stay
    values = {**values, **read_yaml(config_file(f"regimes/{regime}"))}
    file = f"pascal_{method}"
    authors = read_yaml(config_file(file)) if file in config_names() else {}
    if own is not None:
        if not authors:
            raise ValueError(f"own_optimizer: {method} has no file {file} of its authors' settings")
        values["optimizer"] = authors.get("optimizer", {}) | own
    model = values.get("model", {}) | {"name": method}
    if "channels" in authors.get("model", {}):
        model.setdefault("channels", authors["model"]["channels"])
    needs = METHODS[method].base_learner
    base = None
    if not needs:
        model["base_weights"] = None
    elif not model.get("base_weights"):
        base_folder = folder.parent / "base"
        model["base_weights"] = str(base_folder)
        base = _base_learner(values, base_folder)
    config = TrainConfig.from_dict(values | {"model": model})
    if config.regime == RegimeConfig("freeze"):
        config.optimizer = _of_the_head(config.optimizer)
    return MethodRun(method, regime, RunFolder(folder), config, base)


def _of_the_head(optimizer: OptimizerConfig) -> OptimizerConfig:
    """Leave out what is of the backbone, so that a run without it is the same whatever it is."""
    return dataclasses.replace(optimizer, backbone_lr=None, backbone_weight_decay=None)


def _base_learner(values: dict[str, Any], folder: Path) -> BaseLearnerConfig:
    """Return the settings of a base learner on the photos of a comparison, for as many steps."""
    ignored = ("protocol", "shots", "exclude_novel", "shuffle_test")
    names = {field.name for field in dataclasses.fields(BaseLearnerData)} - set(ignored)
    data = {name: value for name, value in values.get("data", {}).items() if name in names}
    kept = ("backbone", "stem", "stride_on", "width", "weights")
    model = {name: value for name, value in values.get("model", {}).items() if name in kept}
    shared = ("steps", "foreground_weight", "precision", "accelerator", "save_every")
    return BaseLearnerConfig(
        data=BaseLearnerData(**data),
        model=TrainConfig.from_dict({**values, "model": model}).model,
        validation_every=0,
        out=str(folder),
        **{name: values[name] for name in shared if name in values},
    )


def _state(run: MethodRun) -> str:
    if run.regime:
        return run.folder.state
    return "finished" if run.folder.score_file().is_file() else "not started"


def _check_made(run: MethodRun) -> None:
    """Check that what is in the folders of a run has the settings that are asked for."""
    if run.regime:
        check_made(run.folder, run.config)
    elif _state(run) == "finished":
        file = run.folder.score_file()
        stored = parse_json(read_text(file), file).get("config", {})
        check_same_settings(stored, run.config, "finished", file)
        check_same_files(stored, run.config, file)
    if run.base is not None:
        check_made(BaseLearnerFolder(run.base.out), run.base)


def _make(run: MethodRun) -> None:
    """Train or resume a run, or match; on failure, store the message in `run.reason`."""
    print(f"\n{run.folder.path.name}: {_state(run)}", file=sys.stderr)
    try:
        if not run.regime:
            run.result = _match(run)
        else:
            if run.base is not None and run.folder.state != "finished":
                make(BaseLearnerFolder(run.base.out), run.base)
            make(run.folder, run.config)
            run.result = run.folder.result()
            run.episode_seconds = _episode_seconds(run)
        run.reason = None
    except FAILURES as error:
        run.reason = failed(error)
        print(f"{run.folder.path.name}: {run.reason}", file=sys.stderr)


def _match(run: MethodRun) -> dict[str, Any]:
    """Score the backbone's weights by matching, on the test episodes of the other runs."""
    file = run.folder.score_file()
    if file.is_file():
        return parse_json(read_text(file), file)
    file.parent.mkdir(parents=True, exist_ok=True)
    return evaluate_matching(run.config, file, run.folder.test_episodes)


def _episode_seconds(run: MethodRun) -> float:
    """Return the median time of testing one episode, without its loading; measured once."""
    file = run.folder.path / "episode_seconds.json"
    if file.is_file():
        return float(parse_json(read_text(file), file)["episode_seconds"])
    config = run.config
    fabric = launch(config.accelerator, 1, 1, config.precision)
    network, _ = run.folder.network(f"{config.checkpoint}.pt")
    network = fabric.setup(lay_out(network.eval(), fabric.device))
    episodes = build_episodes(config.data, "test", _TIMED + 1, config.test_seeds[0])
    seconds = []
    with torch.no_grad():
        for index in range(_TIMED + 1):
            batch = fabric.to_device(collate_episodes([episodes[index]]))
            begin = time.perf_counter()
            network(*(batch.get(name) for name in network.module.inputs)).logits.sum().item()
            seconds.append(time.perf_counter() - begin)
    write_json(file, {"episode_seconds": statistics.median(seconds[1:])})
    return statistics.median(seconds[1:])


def _write(runs: Sequence[MethodRun], regimes: Sequence[str], out: Path) -> str:
    """Write methods.json and methods.md, in one process only; return the table."""
    rows = [_row(run, runs, regimes[0]) for run in runs]
    made = next((run.result for run in runs if run.result is not None and run.regime), None)
    result = {
        "rows": rows,
        "settings": flat_settings(runs[0].config.to_dict()),
        "source": {n: made[n] for n in ("machine", "versions", "commit")} if made else None,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    text = "\n".join(markdown(result)) + "\n"
    if is_first_process():
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "methods.json", result)
        with atomic_write(out / "methods.md") as file:
            file.write(text.encode())
    return text


def _row(run: MethodRun, runs: Sequence[MethodRun], first: str) -> dict[str, Any]:
    """Return what the table says of a run, scores in percent."""
    row: dict[str, Any] = {"method": run.method, "regime": run.regime, "not_run": run.reason}
    if run.result is None:
        return row
    test = run.test
    row |= {name: 100 * test[name]["mean"] for name in ("miou", "fb_iou")}
    row["miou_values"] = [100 * value for value in test["miou"]["values"]]
    if run.regime:
        found = run.result
        row |= found["parameters"] | {"step_seconds": found["step_seconds_median"]}
        row |= {"saved_bytes": found["saved_bytes_per_step"], "peak": found["peak_memory_bytes"]}
        row["episode_seconds"] = run.episode_seconds
    origin = next((r for r in runs if (r.method, r.regime) == (run.method, first)), None)
    if origin is not None and origin is not run and origin.result is not None:
        before, after = (read_episodes(r.folder.test_episodes)[:, [1, 4, 5]] for r in (origin, run))
        row["difference"] = [100 * value for value in paired_difference(before, after)]
    return row


def markdown(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table, from what methods.json holds."""
    rows, settings = result["rows"], result["settings"]
    first = next((row["regime"] for row in rows if row["regime"]), "")
    less = f"− {first}, 95 %" if first else "−"
    head = ["method", "regime", "trains: head", "backbone", "mIoU", less, "FB-IoU"]
    head += ["saved MiB", "peak MiB", "s/step", "s/episode"]
    yield f"| {' | '.join(head)} |"
    yield "| --- | --- |" + " ---: |" * (len(head) - 2)
    for row in rows:
        cells = [row["method"], row["regime"] or "nothing trained"]
        if row["not_run"]:
            yield f"| {' | '.join(cells + ['–'] * (len(head) - 2))} |"
            continue
        for name in ("trained_head", "trained_backbone"):
            cells.append(f"{row.get(name, 0):,}")
        cells += [f"**{row['miou']:.1f}**", "", f"{row['fb_iou']:.1f}"]
        if "difference" in row:
            middle, low, high = row["difference"]
            cells[-2] = f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"
        for name, unit, digits in (
            ("saved_bytes", _MIB, 0),
            ("peak", _MIB, 0),
            ("step_seconds", 1, 2),
            ("episode_seconds", 1, 2),
        ):
            value = row.get(name)
            cells.append("–" if value is None else f"{value / unit:.{digits}f}")
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield (
        f"Novel classes of {settings['data.source']}, fold {settings['data.fold']}, "
        f"{settings['data.shots']}-shot, {settings['data.size']} px, {settings['model.backbone']}; "
        f"{settings['steps']} steps of {settings['batch_size']}; percent, the mean of "
        f"{len(settings['test_seeds'])} × {settings['test_episodes']} episodes, a seed each. The "
        "difference is that of all episodes together, paired, with its interval over episodes; "
        "each run is one training, and how trainings vary is not in it. "
        "Saved: what autograd keeps of a step. Peak: of the device; on a CPU of the process, with "
        "what earlier runs left in it. An episode is timed alone, without its loading."
    )
    left = [(row, row["not_run"]) for row in rows if row["not_run"]]
    for row, reason in left:
        name = " ".join(filter(None, (row["method"], row["regime"])))
        yield f"Not run: {name}: {reason}.".replace("..", ".")
    yield from origin(result)
