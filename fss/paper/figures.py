"""The figures of the paper: files in fss/configs/paper, drawn from the runs that they name.

A figure is a YAML file `F8.yaml`: a `title`, the `data` file of its data set, its `runs`, names of
runs.yaml with the words for each, and what it `draw`s:

    curves      mIoU in training and in validation against the epoch, a panel a run
    changes     of the 30 largest singular values of each block's last convolution, a panel each
    values      the singular values before and after of the last convolution, and their change
    cues        where in photos the components of the last convolution respond whose singular values
                fell and rose most

All but curves are of one run, of its `stage` and of the `kernels` there; `values` may be of the
`largest` so many only.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure as Picture

from fss.config.checks import count_steps
from fss.files import read_yaml
from fss.models import rebuild_model
from fss.paper.plan import Options, PlannedRun
from fss.paper.tables import Table, table_of_runs
from fss.report.components import plot_cues, test_photos
from fss.report.curves import Panel, plot_panels
from fss.report.plot import save_plot
from fss.report.runs import ReportedRun, read_run
from fss.report.spectrum import Spectrum, last_of_blocks, plot_largest, plot_values, read_spectra

_KINDS = ("curves", "changes", "values", "cues")
_SCHEMATIC = {"F1": "the paradigms", "F13": "two ways to implement SVF"}
_PHOTOS = 5


@dataclass(frozen=True)
class Figure:
    """A figure of the paper, see this module; the rows of `table` are its runs."""

    table: Table
    draw: str
    stage: str
    kernels: tuple[tuple[int, int], ...]
    largest: int | None

    @property
    def name(self) -> str:
        """Return the name, F2 to F12."""
        return self.table.name


def is_figure(name: str) -> bool:
    """Tell whether a name is meant as that of a figure."""
    return re.fullmatch(r"[Ff]\d+", name) is not None


def figure_names(folder: Path) -> list[str]:
    """List the figures of a folder in the paper's order."""
    names = [path.stem for path in folder.glob("F*.yaml") if is_figure(path.stem)]
    return sorted(names, key=lambda name: int(name[1:]))


def load_figure(name: str, folder: Path) -> Figure:
    """Read and check a figure and its runs.

    Raises:
        ValueError: no figure of that name, or one of the paper's drawings of an idea; a key, kind
            or run that is not known.
    """
    known, name = figure_names(folder), name.upper()
    if name not in known:
        why = f"{name} is a drawing, of {_SCHEMATIC[name]}" if name in _SCHEMATIC else None
        raise ValueError(
            f"figure: expected one of {', '.join(known)}; "
            + (f"{why}: there is nothing to measure" if why else f"got {name!r}")
        )
    path = folder / f"{name}.yaml"
    values = read_yaml(path)
    keys = {"title", "data", "draw", "runs"}
    if values.get("draw") != "curves":
        keys |= {"stage", "kernels"}
    optional = {"largest"} if values.get("draw") == "values" else set()
    if not keys <= set(values) <= keys | optional or values["draw"] not in _KINDS:
        raise ValueError(
            f"{path}: expected {', '.join(sorted(keys))}, with draw one of {', '.join(_KINDS)}; "
            f"got {', '.join(map(str, values))}, draw {values.get('draw')!r}"
        )
    table = table_of_runs(name, values["title"], values["data"], values["runs"], folder)
    if values["draw"] != "curves" and len(table.rows) != 1:
        raise ValueError(f"{path}: runs: expected one for {values['draw']}, got {len(table.rows)}")
    kernels = tuple(tuple(map(int, kernel.split("x"))) for kernel in values.get("kernels", ()))
    return Figure(table, values["draw"], values.get("stage", ""), kernels, values.get("largest"))


def figure_options(options: Options) -> Options:
    """Choose fold 0 and 1 shot, as the paper's figures, where the options choose none.

    Raises:
        ValueError: several folds or shots.
    """
    for name, chosen in (("folds", options.folds), ("shots", options.shots)):
        if len(chosen) > 1:
            raise ValueError(f"{name}: expected one for a figure, got {list(chosen)}")
    return dataclasses.replace(options, folds=options.folds or (0,), shots=options.shots or (1,))


def draw_figure(figure: Figure, runs: Sequence[PlannedRun], options: Options) -> str:
    """Draw a figure from those of its runs that are there, as NAME.png and NAME.svg.

    Args:
        figure: to draw.
        runs: all of them, as planned.
        options: `folder` is where the files go.

    Returns lines about each run, the command for those that are missing, and the files.

    Raises:
        FileNotFoundError, ValueError: a damaged run.
    """
    (fold,), (shots,) = options.folds, options.shots
    table = figure.table
    lines = [f"{figure.name}: {table.title}; {table.data.name}, fold {fold}, {shots}-shot"]
    if options.scale_down:
        lines.append("Scaled down: this shows that the figure works and says nothing of the paper.")
    there: dict[str, ReportedRun] = {}
    for number, run in enumerate(runs, 1):
        state = run.state if run.reason is None else run.reason
        if run.folder.state != "not started":
            there[run.row.label] = reported = _read(run, options)
            state = run.folder.state
            if reported.result is None:
                state += f", step {reported.step:,} of {reported.config.steps:,}"
        lines.append(f"{number:3d}  {run.row.run}: {run.row.label}; {state}")
    picture = None
    if not there:
        lines.append("Not drawn: none of its runs is there.")
    try:
        picture = _picture(figure, runs, there)
        if there and picture is None:
            lines.append("Not drawn: its run has no checkpoint yet.")
    except FileNotFoundError as error:
        lines.append(f"Not drawn: {error}.")
    if picture is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        plot = save_plot(picture, options.folder, figure.name, table.title)
        lines += [f"Drawn: {options.folder / plot.name}{ending}" for ending in (".png", ".svg")]
    lines += _missing(figure, runs, options)
    return "\n".join(lines)


def _read(planned: PlannedRun, options: Options) -> ReportedRun:
    """Read a run; its photos are where `options` say, if they do."""
    folder = planned.folder
    result = folder.result() if folder.state == "finished" else None
    run = read_run(folder, planned.row.label, result)
    root = options.settings.get("data", {}).get("root", run.config.data.root)
    data = dataclasses.replace(run.config.data, root=root)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))


def _missing(figure: Figure, runs: Sequence[PlannedRun], options: Options) -> Iterator[str]:
    """Yield a line with the command that makes or finishes what is missing."""
    unfinished = [run for run in runs if run.folder.state != "finished"]
    if not unfinished:
        return
    words = ["fss", "reproduce", figure.name, "--rows", *(str(r.row.run) for r in unfinished)]
    if options.folds != (0,):
        words += ["--folds", *map(str, options.folds)]
    if options.shots != (1,):
        words += ["--shots", *map(str, options.shots)]
    if options.out != Options.out:
        words += ["--out", options.out]
    root = options.settings.get("data", {}).get("root")
    words += ["--scale-down"] if options.scale_down else ["--data.root", root or "FOLDER"]
    kind = "begun" if all(r.folder.state == "in progress" for r in unfinished) else "missing"
    verb = "is" if len(unfinished) == 1 else "are"
    yield (
        f"{len(unfinished)} of {len(runs)} runs {verb} {kind}; with the same settings: "
        f"{shlex.join(words)}"
    )


def _picture(
    figure: Figure, runs: Sequence[PlannedRun], there: dict[str, ReportedRun]
) -> Picture | None:
    """Plot a figure; None without any run or checkpoint.

    Raises:
        FileNotFoundError: photos, or pretrained singular values, that are nowhere.
    """
    if not there:
        return None
    if figure.draw == "curves":
        return plot_panels([_panel(figure, run, there.get(run.row.label)) for run in runs])
    ((label, run),) = there.items()
    checkpoint = run.checkpoint()
    if checkpoint is None:
        return None
    state = checkpoint["model"]
    spectra = read_spectra(run, state)
    layers = [_layers(figure, spectra, kernel) for kernel in figure.kernels]
    if figure.draw == "changes":
        chosen = [layer for found in layers for layer in found]
        columns = min(len(chosen), 3 if len(chosen) > 4 else 2)
        return plot_largest({0: spectra}, [label], chosen, columns)
    last = [found[-1] for found in layers]
    if figure.draw == "values":
        return plot_values({0: spectra}, [label], last, figure.largest)
    (spectrum,) = (spectrum for spectrum in spectra if spectrum.layer == last[0])
    network = rebuild_model(run.config, state, as_trained=False)
    return plot_cues(network, spectrum, test_photos(run, _PHOTOS))


def _panel(figure: Figure, planned: PlannedRun, run: ReportedRun | None) -> Panel:
    """Make the panel of a run; of one in progress, an epoch is as long as the paper's.

    Of one with a number of steps of its own it is not known before the end.
    """
    if run is None:
        return Panel(planned.row.label, None, missing=planned.reason or "not trained yet")
    length: float | None = run.steps_per_epoch
    if length is None:
        images = figure.table.data.images["filtered"][planned.fold]
        per_epoch = count_steps("1 epoch", images, run.config.batch_size)
        if run.config.steps == figure.table.data.epochs * per_epoch:
            length = per_epoch
    return Panel(planned.row.label, run, length)


def _layers(figure: Figure, spectra: Sequence[Spectrum], kernel: tuple[int, int]) -> list[str]:
    """List the last convolutions of this size of the blocks of the figure's stage."""
    found = last_of_blocks(spectra, figure.stage, kernel)
    if not found:
        raise ValueError(
            f"{figure.name}: expected a {'×'.join(map(str, kernel))} convolution with trained "
            f"singular values in {figure.stage}, the run has none"
        )
    return found
