"""Draws docs/images/own-pictures.jpg: sunflowers by the example of others, tuned and untuned.

python docs/own_pictures.py resnet50.safetensors

The file is of an ImageNet ResNet-50. The photos are also tuned on, without their
masks, as `fss predict` does. Prints the IoU of each photo, and the seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from fss.evaluation.metrics import foreground_iou
from fss.report.plot import figure_style, new_figure
from fss.segment.pictures import overlay
from fss.segment.segmenter import FewShotSegmenter, Segmentation

IMAGES = Path(__file__).with_name("images")
SUPPORTS = ((1,), (1, 8))
QUERIES = (2, 3, 4, 5, 6)
STEPS = 20
COLOR = "#0072B2"

Row = tuple[str, list[int], list[Segmentation]]


def load(number: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Load a photo and its mask."""
    mask = Image.open(IMAGES / "sunflower-masks" / f"{number}.png")
    photo = Image.open(IMAGES / "sunflowers" / f"{number}.jpg")
    return np.array(photo.convert("RGB")), np.array(mask) > 0


def iou(result: Segmentation, number: int) -> float:
    """Compute the IoU of the mask that was found with the true one of a photo."""
    return foreground_iou(*(torch.from_numpy(x).long() for x in (result.mask, load(number)[1])))


def segment(segmenter: FewShotSegmenter) -> list[Row]:
    """Segment the queries by the example of one and of two supports, untuned and tuned."""
    pictures = [load(number)[0] for number in QUERIES]
    rows: list[Row] = []
    for supports in SUPPORTS:
        images, masks = zip(*[load(number) for number in supports], strict=True)
        segmenter.adapter(None)
        segmenter.support(list(images), list(masks))
        rows.append(("untuned", list(supports), segmenter(pictures)))
        tuning = segmenter.tune(STEPS, unlabeled=pictures)
        print(tuning)
        rows.append(("S tuned", list(supports), segmenter(pictures)))
    return rows


def draw(rows: list[Row]) -> Figure:
    """Draw a line for each way, the supports at its left."""
    with figure_style():
        figure = new_figure(2.0 * (len(QUERIES) + 1), 1.75 * len(rows))
        grid = figure.subplots(len(rows), len(QUERIES) + 1)
        for line, (name, supports, found) in zip(grid, rows, strict=True):
            shown = [np.array(overlay(*load(number), color=COLOR)) for number in supports]
            gap = np.full_like(shown[0][:12], 255)
            line[0].imshow(np.concatenate([part for each in shown for part in (each, gap)][:-1]))
            line[0].set_title(f"{len(supports)} shown: {name}", fontsize=9)
            for axes, number, result in zip(line[1:], QUERIES, found, strict=True):
                axes.imshow(np.array(result.overlay(COLOR)))
                axes.set_title(f"IoU {iou(result, number):.2f}", fontsize=9)
            for axes in line:
                axes.set_axis_off()
    return figure


if __name__ == "__main__":
    found = segment(FewShotSegmenter(weights=sys.argv[1], device="cpu"))
    for name, supports, results in found:
        values = [iou(r, n) for r, n in zip(results, QUERIES, strict=True)]
        print(f"{len(supports)} supports, {name}:", " ".join(f"{value:.3f}" for value in values))
    draw(found).savefig(IMAGES / "own-pictures.jpg", dpi=110, pil_kwargs={"quality": 88})
