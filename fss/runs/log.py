"""The logs of a run: two CSV tables and the same numbers for TensorBoard."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from tensorboardX import SummaryWriter

from fss.files import atomic_write, read_text

TRAIN = (
    "step",
    "loss",
    "lr",
    "backbone_lr",
    "step_seconds",
    "images_per_second",
    "peak_memory_bytes",
    "skipped_steps",
    "unreadable",
)
# mIoU and FB-IoU of a validation, mIoU of the training episodes since the one before
VALIDATION = ("step", "miou", "fb_iou", "train_miou")


class RunLog:
    """Appends rows to the logs of a run.

    Args:
        train, validation: the CSV tables.
        events: folder of the same numbers for TensorBoard.
        class_names: of the validated classes by id; each has a column of validation.csv.
        step: step from which the run goes on; rows of later steps, which a killed run may have
            left, are dropped. 0 begins anew.
    """

    def __init__(
        self,
        train: Path,
        validation: Path,
        events: Path,
        class_names: dict[int, str],
        step: int = 0,
    ) -> None:
        self._names = class_names
        self._train, self._validation = train, validation
        _truncate(train, TRAIN, step)
        _truncate(validation, (*VALIDATION, *class_names.values()), step)
        # A step that is logged again after a resume must replace the earlier events.
        self._events = SummaryWriter(str(events), purge_step=step + 1)

    def train(self, row: dict[str, float | None]) -> None:
        """Add a row with the columns `TRAIN`; None leaves a cell empty."""
        _append(self._train, [row[name] for name in TRAIN])
        self._scalars("train", row, int(row["step"] or 0))

    def validation(self, row: dict[str, float], iou: dict[int, float]) -> None:
        """Add a row with the columns `VALIDATION` and the IoU of each class, by its id."""
        _append(self._validation, [*(row[name] for name in VALIDATION), *iou.values()])
        named = {f"class/{self._names[c]}": value for c, value in iou.items()}
        scores = {"miou": row["miou"], "fb_iou": row["fb_iou"], **named}
        self._scalars("validation", scores, int(row["step"]))
        self._scalars("train", {"miou": row["train_miou"]}, int(row["step"]))

    def close(self) -> None:
        """Close the file of TensorBoard."""
        self._events.close()

    def _scalars(self, group: str, values: dict[str, float | None], step: int) -> None:
        for name, value in values.items():
            if name != "step" and value is not None:
                self._events.add_scalar(f"{group}/{name}", value, step)


def read_log(path: Path, growing: bool = False) -> dict[str, list[float]]:
    """Read the columns of a CSV log by name, none before the first row; an empty cell is NaN.

    Args:
        path: of the log.
        growing: the run may be in the middle of writing the last row, which is then left out.

    Raises:
        FileNotFoundError: no log.
        ValueError: no table of numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"run: expected a log at {path}, found none")
    try:
        text = read_text(path)
        header, *rows = csv.reader(io.StringIO(text))
        if growing and rows and not text.endswith("\n"):
            rows.pop()
        for number, row in enumerate(rows, 2):
            if len(row) != len(header):
                raise ValueError(
                    f"line {number}: expected {len(header)} values, got {len(row)}, it is truncated"
                )
        columns = zip(*([float(cell or "nan") for cell in row] for row in rows), strict=True)
        return dict(zip(header, map(list, columns), strict=True)) if rows else {}
    except (csv.Error, ValueError) as error:
        raise ValueError(f"run: {path}: expected a table of numbers ({error})") from error


def _append(path: Path, values: list) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(["" if value is None else value for value in values])


def _truncate(path: Path, header: tuple[str, ...], step: int) -> None:
    """Keep the header and the complete rows up to `step`."""
    rows = []
    if step and path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [r for r in csv.reader(file) if len(r) == len(header) and r[0].isdigit()]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([header, *(row for row in rows if int(row[0]) <= step)])
    with atomic_write(path) as file:
        file.write(table.getvalue().encode())
