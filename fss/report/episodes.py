"""Pictures of a run: episodes with their predictions, and curves over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from fss.colors import BLUE, GREEN, ORANGE
from fss.data import IGNORE, MEAN, STD, EpisodeDataset, collate_episodes
from fss.evaluation.evaluate import predict
from fss.evaluation.metrics import foreground_iou
from fss.files import atomic_write
from fss.runs.folder import RunFolder
from fss.runs.log import read_log

# Legible on a white page and on a dark one: the picture has no background of its own.
_GREY = "#808080"


def draw_episodes(
    path: Path,
    model: nn.Module,
    episodes: EpisodeDataset,
    class_names: dict[int, str],
    count: int,
    device: torch.device,
) -> None:
    """Draws up to `count` test episodes as rows: supports, query, truth, prediction.

    The rows show different classes as far as there are any among the episodes, then more of each.
    """
    chosen = spread_over_classes(episodes, count)
    shots = episodes.shots
    columns = shots + 3
    items = [episodes[index] for index in chosen]
    shapes = [item["query_mask_original"].shape for item in items]
    ratio = min(max(float(np.median([width / height for height, width in shapes])), 0.7), 1.6)
    size = (2.4 * ratio * columns, 2.65 * len(items))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(items), columns, squeeze=False)
    for axes, item in zip(grid, items, strict=True):
        truth = item["query_mask_original"]
        prediction = predict(model, _to(collate_episodes([item]), device))[0].cpu()
        name = class_names[item["class_id"]]
        photo = photo_pixels(item["query_image"], item["query_size"].tolist(), tuple(truth.shape))
        supports = zip(axes, item["support_images"], item["support_masks"], strict=False)
        for shot, (ax, image, mask) in enumerate(supports):
            region = _covered(mask)
            pixels = photo_pixels(image, region, tuple(region))
            _show(ax, pixels, f"support {shot + 1}: {name}" if shots > 1 else f"support: {name}")
            outline(ax, mask[: region[0], : region[1]] == 1, ORANGE)
        query, true, predicted = axes[shots:]
        _show(query, photo, "query")
        # Grey photos leave colour to the masks, which then show on any photo.
        grey = photo.mean(axis=2, keepdims=True).repeat(3, axis=2)
        _show(true, grey, "truth")
        _fill(true, truth == 1, BLUE)
        _show(predicted, grey, f"prediction: IoU {100 * foreground_iou(prediction, truth):.0f} %")
        _fill(predicted, (prediction == 1) & (truth != IGNORE), ORANGE)
        outline(predicted, truth == 1, BLUE)
    figure.supxlabel("orange: support mask, prediction · blue: truth", fontsize=10, color=_GREY)
    _save(figure, path, transparent=True)


def draw_curves(folder: RunFolder) -> None:
    """Draws a run's training loss, its validation mIoU and FB-IoU and its mIoU in training."""
    train, validation = read_log(folder.train_log), read_log(folder.validation_log)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    loss, iou = figure.subplots(1, 2)
    if train:
        window = max(1, len(train["loss"]) // 20)
        style = {"alpha": 0.35, "linewidth": 1} if window > 1 else {"linewidth": 2}
        loss.plot(train["step"], train["loss"], color=BLUE, **style)
        if window > 1:
            smooth = np.convolve(train["loss"], np.ones(window) / window, "valid")
            loss.plot(train["step"][window - 1 :], smooth, color=BLUE, linewidth=2)
            label = f"dark: mean of {window} log rows"
            loss.text(0.98, 0.95, label, ha="right", va="top", color=BLUE, transform=loss.transAxes)
    loss.set(title="training", xlabel="step", ylabel="cross-entropy (nats per pixel)")
    marks = {"markersize": 4} if len(validation.get("step", [])) < 40 else {"marker": ""}
    for name, label, colour, marker in (
        ("miou", "mIoU", ORANGE, "o"),
        ("fb_iou", "FB-IoU", GREEN, "s"),
        ("train_miou", "mIoU in training, base classes", BLUE, "D"),
    ):
        if name in validation:
            percent = [100 * value for value in validation[name]]
            style = {"marker": marker, **marks}
            iou.plot(validation["step"], percent, color=colour, label=label, **style)
    if validation:
        best = int(np.argmax(validation["miou"]))
        step, score = validation["step"][best], 100 * validation["miou"][best]
        iou.axhline(score, color=ORANGE, linewidth=1, linestyle=":")
        iou.legend(loc="best", title=f"best mIoU {score:.1f} % at step {step:.0f}")
    iou.set(title="validation, novel classes; training", xlabel="step", ylabel="IoU (%)")
    iou.set_ylim(bottom=0)
    for ax in (loss, iou):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    _save(figure, folder.curves)


def spread_over_classes(episodes: EpisodeDataset, count: int) -> list[int]:
    """Numbers of episodes, taking each class's first, then each one's second, and so on."""
    by_class: dict[int, list[int]] = {}
    for index in range(min(len(episodes), 50 * count)):
        by_class.setdefault(episodes.draw(index).class_id, []).append(index)
    ranked = sorted(
        (rank, class_id, index)
        for class_id, indices in by_class.items()
        for rank, index in enumerate(indices)
    )
    return [index for _, _, index in ranked[:count]]


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _covered(mask: Tensor) -> list[int]:
    """Height and width of a test mask [H, W] without the padding below and to the right."""
    valid = mask != IGNORE
    return [int(valid.any(axis).nonzero().max()) + 1 for axis in (1, 0)]


def photo_pixels(image: Tensor, region: list[int], size: tuple[int, ...]) -> np.ndarray:
    """A normalised image [3, H, W] as RGB [*size, 3] between 0 and 1, its padding left out."""
    pixels = functional.interpolate(
        image[None, :, : region[0], : region[1]],
        size=size,
        mode="bilinear",
        align_corners=True,
    )[0]
    return np.clip(pixels.permute(1, 2, 0).numpy() * STD + MEAN, 0, 1)


def _show(ax: Axes, pixels: np.ndarray, title: str) -> None:
    ax.imshow(pixels, interpolation="bilinear")
    ax.set_title(title, fontsize=12, color=_GREY)
    ax.set_axis_off()


def _fill(ax: Axes, mask: Tensor, colour: str) -> None:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    layer = np.zeros((*mask.shape, 4))
    layer[mask.numpy()] = (red, green, blue, 0.6)
    ax.imshow(layer, interpolation="nearest")


def outline(ax: Axes, mask: Tensor, colour: str) -> None:
    """Draws the border of a bool mask [h, w] over a photo of that size."""
    if mask.any():
        # A frame of background closes the outline of an object that the photo cuts off.
        framed = np.pad(mask.numpy().astype(float), 1)
        rows, columns = (np.arange(side) - 1 for side in framed.shape)
        ax.contour(columns, rows, framed, [0.5], colors="white", linewidths=2.6)
        ax.contour(columns, rows, framed, [0.5], colors=colour, linewidths=1.4)
        ax.set_xlim(-0.5, mask.shape[1] - 0.5)
        ax.set_ylim(mask.shape[0] - 0.5, -0.5)


def _save(figure: Figure, path: Path, transparent: bool = False) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110, transparent=transparent)
