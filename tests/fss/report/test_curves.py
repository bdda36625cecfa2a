from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import yaml
from matplotlib.figure import Figure

from fss.data import build_episodes
from fss.report.curves import draw_own_curves, plot_curves
from fss.report.runs import ReportedRun, read_runs
from fss.runs.folder import RunFolder
from fss.training.run import train


def test_curves_of_one_run(tiny, tmp_path):
    folder = RunFolder(tmp_path)
    folder.config_file.write_text(yaml.safe_dump(tiny().to_dict()))
    test = {"step": 30, "miou": {"mean": 0.25, "std": 0.05}}
    log = folder.open_log({1: "cat"})
    for step in range(1, 60):
        log.train(
            {
                "step": step,
                "loss": 1 / step,
                "lr": 0.1,
                "backbone_lr": None,
                "step_seconds": 1.0,
                "images_per_second": 2.0,
                "peak_memory_bytes": 5,
                "skipped_steps": 0,
                "unreadable": 0,
            }
        )
    log.validation({"step": 30, "miou": 0.2, "fb_iou": 0.5, "train_miou": 0.4}, {1: 0.2})
    log.close()
    draw_own_curves(folder, {"steps": 59, "test": test})
    full = cv2.imread(str(folder.curves))
    assert full.shape[1] > full.shape[0] > 300
    folder.open_log({1: "cat"}).close()
    draw_own_curves(folder, {"steps": 0, "test": test})
    assert not np.array_equal(full, cv2.imread(str(folder.curves)))


def shown(tiny, tmp_path: Path, *epochs: int | None) -> Figure:
    """The curves of runs whose epochs have these numbers of steps, two validations each."""
    runs = []
    for number, length in enumerate(epochs):
        result = {"epoch_images": 2 * length + 1} if length else {}
        test = {"step": 30, "miou": {"mean": 0.25, "std": 0.05}}
        columns = {"step": [10.0, 30.0], "miou": [0.1, 0.2], "train_miou": [0.3, 0.4]}
        train = {"step": [10.0, 20.0, 30.0], "loss": [3.0, 2.0, 1.0]}
        name = f"run{number}"
        folder = RunFolder(tmp_path / name)
        result = result | {"test": test}
        runs.append(ReportedRun(folder, name, tiny(batch_size=2), result, train, columns))
    return plot_curves(runs)


def test_epochs_above_the_steps(tiny, tmp_path):
    """An epoch is the whole batches that the training images make."""
    figure = shown(tiny, tmp_path, 10, 10)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.get_xlabel() == "step"
        (above,) = axes.child_axes
        assert above.get_xlabel() == "epoch"
        np.testing.assert_allclose(above.get_xlim(), np.array(axes.get_xlim()) / 10)
    assert list(figure.axes[2].get_lines()[0].get_xdata()) == [10, 30]


def test_epochs_where_those_of_the_runs_differ(tiny, tmp_path):
    figure = shown(tiny, tmp_path, 10, 5)
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    assert not any(axes.child_axes for axes in figure.axes)
    first, second = figure.axes[1].get_lines()
    assert list(first.get_xdata()) == [1, 3] and list(second.get_xdata()) == [2, 6]
    assert list(figure.axes[0].get_lines()[1].get_xdata()) == [2, 4, 6]


def test_steps_where_a_run_does_not_know_its_epochs(tiny, tmp_path):
    figure = shown(tiny, tmp_path, 10, None)
    assert {axes.get_xlabel() for axes in figure.axes} == {"step"}
    assert not any(axes.child_axes for axes in figure.axes)
    assert list(figure.axes[1].get_lines()[0].get_xdata()) == [10, 30]


def test_a_run_counts_the_images_of_an_epoch(tiny):
    config = tiny()
    result = train(config)
    images = len(build_episodes(config.data, "train", 1, 0).queries)
    assert result["epoch_images"] == images
    (run,) = read_runs([config.out])
    assert run.steps_per_epoch == images // 2
