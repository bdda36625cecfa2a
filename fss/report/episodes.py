"""A picture of test episodes with their predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional

from fss.colors import BLUE, ORANGE
from fss.data import IGNORE, MEAN, STD, EpisodeDataset, collate_episodes
from fss.evaluation.evaluate import predict
from fss.evaluation.metrics import foreground_iou
from fss.report.plot import new_figure, write_png

# Legible on a white page and on a dark one: the picture has no background of its own.
_GREY = "#808080"


@mpl.rc_context({"text.parse_math": False})
def draw_episodes(
    path: Path,
    model: nn.Module,
    episodes: EpisodeDataset,
    class_names: dict[int, str],
    count: int,
    device: torch.device,
) -> None:
    """Draw up to `count` test episodes as rows: supports, query, truth, prediction.

    The rows show different classes as far as there are any among the episodes, then more of each.
    """
    chosen = spread_over_classes(episodes, count)
    shots = episodes.shots
    columns = shots + 3
    items = [episodes[index] for index in chosen]
    shapes = [item["query_mask_original"].shape for item in items]
    ratio = min(max(float(np.median([width / height for height, width in shapes])), 0.7), 1.6)
    size = (2.4 * ratio * columns, 2.65 * len(items))
    instead = {name: f"class {class_id}" for class_id, name in class_names.items()}
    figure = new_figure(*size, instead)
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
        # Gray photos leave color to the masks, which then show on any photo.
        gray = photo.mean(axis=2, keepdims=True).repeat(3, axis=2)
        _show(true, gray, "truth")
        _fill(true, truth == 1, BLUE)
        _show(predicted, gray, f"prediction: IoU {100 * foreground_iou(prediction, truth):.0f} %")
        _fill(predicted, (prediction == 1) & (truth != IGNORE), ORANGE)
        outline(predicted, truth == 1, BLUE)
    figure.supxlabel("orange: support mask, prediction · blue: truth", fontsize=10, color=_GREY)
    write_png(figure, path, dpi=110, background="none")


def spread_over_classes(episodes: EpisodeDataset, count: int) -> list[int]:
    """Choose episodes by number: the first of each class, then the second of each, and so on."""
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
    """Return height and width of a test mask [H, W] without the padding below and to the right."""
    valid = mask != IGNORE
    return [int(valid.any(axis).nonzero().max()) + 1 for axis in (1, 0)]


def photo_pixels(image: Tensor, region: list[int], size: tuple[int, ...]) -> np.ndarray:
    """Convert a normalized image [3, H, W] to RGB [*size, 3] from 0 to 1, without its padding."""
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


def _fill(ax: Axes, mask: Tensor, color: str) -> None:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    layer = np.zeros((*mask.shape, 4))
    layer[mask.numpy()] = (red, green, blue, 0.6)
    ax.imshow(layer, interpolation="nearest")


def outline(ax: Axes, mask: Tensor, color: str) -> None:
    """Draw the border of a bool mask [h, w] over a photo of that size."""
    if mask.any():
        # A frame of background closes the outline of an object that the photo cuts off.
        framed = np.pad(mask.numpy().astype(float), 1)
        rows, columns = (np.arange(side) - 1 for side in framed.shape)
        ax.contour(columns, rows, framed, [0.5], colors="white", linewidths=2.6)
        ax.contour(columns, rows, framed, [0.5], colors=color, linewidths=1.4)
        ax.set_xlim(-0.5, mask.shape[1] - 0.5)
        ax.set_ylim(mask.shape[0] - 0.5, -0.5)
