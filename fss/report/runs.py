"""The runs of a report, finished or in progress."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from fss.config import TrainConfig
from fss.config.checks import count_steps
from fss.runs.folder import RunFolder


@dataclass(frozen=True)
class ReportedRun:
    """What a report says of a run.

    Attributes:
        folder: of the run.
        name: short, different from the names of the other runs of the report.
        config: its settings.
        result: the content of result.json; None while the run is in progress.
        train, validation: the columns of the logs by name; empty before the first row.
    """

    folder: RunFolder
    name: str
    config: TrainConfig
    result: dict[str, Any] | None
    train: dict[str, list[float]]
    validation: dict[str, list[float]]

    @property
    def step(self) -> int:
        """Return the steps done, as far as the log tells."""
        return int(self.train["step"][-1]) if self.train else 0

    @property
    def best(self) -> tuple[int, float] | None:
        """Return step and mIoU, a fraction, of the best validation so far."""
        if not self.validation:
            return None
        scores = self.validation["miou"]
        place = max(range(len(scores)), key=scores.__getitem__)
        return int(self.validation["step"][place]), scores[place]

    @property
    def trains_singular_values(self) -> bool:
        """Tell whether the singular values train, themselves or by a factor, and no vectors."""
        trained = set(self.config.regime.trained_factors)
        return bool(trained) and trained <= {"S", "S'"}

    @property
    def steps_per_epoch(self) -> int | None:
        """Return how many whole batches the training images make; None of runs that do not say."""
        images = (self.result or {}).get("epoch_images")
        return None if images is None else count_steps("1 epoch", images, self.config.batch_size)

    def checkpoint(self) -> dict[str, Any] | None:
        """Read the tested checkpoint, or the last so far; None before the first.

        Raises:
            FileNotFoundError: a finished run without it.
            ValueError: a damaged file.
        """
        if self.result is not None:
            return self.folder.checkpoint(self.result["test"]["checkpoint"])
        last = self.folder.last
        return self.folder.checkpoint(last.name) if last.is_file() else None

    def episodes(self) -> bytes | None:
        """Read the picture of test episodes, PNG; None if the run drew none.

        Raises:
            ValueError: a damaged file.
        """
        path = self.folder.episodes
        if self.result is None or not path.is_file():
            return None
        try:
            with Image.open(path) as picture:
                picture.load()
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"run: {path} is no picture, it is truncated ({error})") from error
        return path.read_bytes()


def read_runs(folders: Sequence[str | Path]) -> list[ReportedRun]:
    """Read the folders of runs.

    Raises:
        FileNotFoundError: no folder, or one without a file that every run has.
        ValueError: a damaged file, or one folder twice.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("runs: expected at least one folder of a run, got none")
    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(paths):
        if resolved[place] in resolved[:place]:
            raise ValueError(f"runs: expected different folders, got {path} twice")
    read = []
    for path, name in zip(paths, _short_names(resolved), strict=True):
        folder = RunFolder(path)
        finished = folder.state == "finished"
        read.append(read_run(folder, name, folder.result() if finished else None))
    return read


def read_run(folder: RunFolder, name: str, result: dict[str, Any] | None) -> ReportedRun:
    """Read a run of which the result is known already; see `ReportedRun`."""
    config = folder.config()
    train, validation = folder.logs()
    run = ReportedRun(folder, name, config, result, train, validation)
    if result is not None and run.step != result["steps"]:
        raise ValueError(
            f"run: {folder.train_log} ends at step {run.step}, but result.json tells of "
            f"{result['steps']} steps: it is truncated, or of another run"
        )
    return run


def names_instead(names: Iterable[str]) -> dict[str, str]:
    """Return what stands for the names of runs where no installed font can draw them."""
    return {name: f"run {number}" for number, name in enumerate(names, 1)}


def _short_names(paths: list[Path]) -> list[str]:
    """Return the last part of each path; of those that share it, as many as it takes to differ."""
    names = []
    for path in paths:
        parts = 1
        while parts < len(path.parts) and any(
            other.parts[-parts:] == path.parts[-parts:] for other in paths if other != path
        ):
            parts += 1
        name = "/".join(path.parts[-parts:])
        names.append("".join(c if c.isprintable() else "\ufffd" for c in name))
    return names
