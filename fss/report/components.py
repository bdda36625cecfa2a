"""Where in a photo the components respond whose singular values changed most (Figures 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.colors import SKY
from fss.data import build_episodes, build_source, test_transform
from fss.data.images import read_picture
from fss.models import FewShotModel
from fss.report.episodes import outline, photo_pixels, spread_over_classes
from fss.report.plot import Plot, figure_style, new_figure, save_plot
from fss.report.runs import ReportedRun
from fss.report.spectrum import Spectrum

_SHOWN = 4
_COLORS = "magma"
_SIDE = 240  # pixels of the longer side of a picture in the figure


@dataclass(frozen=True)
class Photo:
    """A photo as the backbone sees it.

    Attributes:
        name: of the photo.
        image: normalized [3, S, S], the photo in its top left corner.
        region: height and width of the photo in `image`.
        pixels: RGB [h, w, 3] between 0 and 1, in the photo's own proportions.
        mask: bool [h, w], the object; None where nobody marked one.
    """

    name: str
    image: Tensor
    region: tuple[int, int]
    pixels: np.ndarray
    mask: Tensor | None


def example_photo(run: ReportedRun, path: str | None) -> Photo:
    """Read a user's photo, or by default the query of the first test episode of the run.

    Raises:
        OSError, ValueError: missing or unreadable photos.
    """
    config = run.config.data
    if path is None:
        source = build_source(config)
        count, seed = run.config.test_episodes, run.config.test_seeds[0]
        episodes = build_episodes(config, "test", count, seed, source)
        item = episodes[spread_over_classes(episodes, 1)[0]]
        image, region = item["query_image"], tuple(item["query_size"].tolist())
        mask = item["query_mask_original"]
        name, size = item["query_name"], tuple(mask.shape)
    else:
        pixels = read_picture(path, "--photo")
        nothing = np.zeros(pixels.shape[:2], dtype=np.uint8)
        image, _, region = test_transform(config)(pixels, nothing, np.random.default_rng(0))
        name, size, mask = Path(path).name, pixels.shape[:2], None
    scale = min(1.0, _SIDE / max(size))
    shown = tuple(max(1, round(scale * side)) for side in size)
    if mask is not None:
        reduced = cv2.resize((mask == 1).numpy().astype(np.uint8), shown[::-1])
        mask = torch.from_numpy(reduced > 0)
    return Photo(name, image, region, photo_pixels(image, list(region), shown), mask)


def default_layers(spectra: Sequence[Spectrum]) -> list[str]:
    """Choose, as the paper, the last 3×3 and the last 1×1 convolution of layer 3.

    Where layer 3 was not converted, those of the last converted stage. If there is neither, its
    last convolution.
    """
    stages = [spectrum.layer.partition(".")[0] for spectrum in spectra]
    stage = "layer3" if "layer3" in stages else stages[-1]
    own = [s for s, place in zip(spectra, stages, strict=True) if place == stage]
    last = {spectrum.kernel: spectrum.layer for spectrum in own}
    chosen = [last[kernel] for kernel in ((3, 3), (1, 1)) if kernel in last]
    return chosen or [own[-1].layer]


def draw_components(
    run: ReportedRun,
    network: FewShotModel,
    spectra: Sequence[Spectrum],
    photo: Photo,
    layers: Sequence[str],
    folder: Path,
    name: str,
) -> Plot:
    """Draw heat maps |v_r| of the components of `layers` whose S_r rose and fell most.

    v_r = V_rᵀ * x, x the layer's input from this photo: u_r S_r v_r is what component r adds to the
    layer's output, so |v_r| is where it acts.

    Args:
        run: its name goes into the caption.
        network: with its trained values.
        spectra: of the run.
        photo: see `example_photo`.
        layers: names in the backbone.
        folder: for the files.
        name: of the files.

    Raises:
        ValueError: a layer that is not among the spectra.
    """
    known = {spectrum.layer: spectrum for spectrum in spectra}
    unknown = [layer for layer in layers if layer not in known]
    if unknown:
        raise ValueError(
            f"--layers: expected convolutions whose singular values {run.name} trained "
            f"({', '.join(known)}), got {unknown[0]}"
        )
    inputs = _inputs(network.backbone, photo.image, layers)
    height, width = photo.pixels.shape[:2]
    ratio = min(max(height / width, 0.6), 1.4)
    with figure_style():
        figure = new_figure(10.4, len(layers) * (2 * (2.05 * ratio + 0.42) + 0.3))
        parts = figure.subfigures(len(layers), 1, squeeze=False)[:, 0]
        for part, layer in zip(parts, layers, strict=True):
            part.patch.set_alpha(0)
            kernel = "×".join(map(str, known[layer].kernel))
            part.suptitle(f"{layer}, {kernel}", fontsize=10, fontweight="bold")
            grid = part.subplots(2, _SHOWN + 1)
            for axes in grid.flat:
                axes.set_axis_off()
            _show_photo(grid[0, 0], photo)
            _draw_layer(grid[:, 1:], network, known[layer], inputs[layer], photo)
            colors = mpl.cm.ScalarMappable(cmap=_COLORS)
            bar = part.colorbar(colors, ax=grid[1, 0], location="left", shrink=0.8, aspect=12)
            bar.set_ticks([0, 1], labels=["0", "max"])
            bar.set_label("|v_r|, each map", fontsize=8)
    text = (
        f"Response to the photo of the components whose singular values changed most in "
        f"{' and '.join(layers)}, {run.name}"
    )
    return save_plot(figure, folder, name, text)


def _draw_layer(
    grid: np.ndarray, network: FewShotModel, spectrum: Spectrum, x: Tensor, photo: Photo
) -> None:
    change = spectrum.after.double() - spectrum.before.double()
    order = change.argsort(descending=True)
    module = network.backbone.get_submodule(spectrum.layer)
    for axes, word, chosen in zip(
        grid, ("rose", "fell"), (order[:_SHOWN], order.flip(0)[:_SHOWN]), strict=True
    ):
        maps = _responses(module, x, spectrum.component[chosen])
        for ax, place, response in zip(axes, chosen.tolist(), maps, strict=False):
            if change[place] == 0 or (change[place] > 0) != (word == "rose"):
                continue
            _show_response(ax, response, photo)
            before, after = float(spectrum.before[place]), float(spectrum.after[place])
            percent = f" ({100 * (after / before - 1):+.2g} %)" if before else ""
            ax.set_title(
                f"r = {place + 1} {word}\n{before:.4g} → {after:.4g}{percent}".replace("-", "−"),
                fontsize=8,
                fontweight="normal",
                loc="center",
            )


@torch.no_grad()
def _inputs(backbone: nn.Module, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Collect the input of each layer for the photo, of its last call."""
    found: dict[str, Tensor] = {}

    def keep(layer: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[layer] = arguments[0].detach().clone()

        return hook

    handles = [
        backbone.get_submodule(layer).register_forward_pre_hook(keep(layer)) for layer in layers
    ]
    backbone.eval()
    backbone(image[None].float())
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def _responses(module: nn.Module, x: Tensor, components: Tensor) -> Tensor:
    """Return |V_rᵀ * x| of these components, [n, h, w]."""
    maps = functional.conv2d(
        x, module.V[components], None, module.stride, module.padding, module.dilation
    )
    return maps[0].abs()


def _show_photo(axes: Any, photo: Photo) -> None:
    axes.imshow(photo.pixels, interpolation="none")
    axes.set_title(photo.name, fontsize=8, fontweight="normal", loc="center")
    if photo.mask is not None:
        outline(axes, photo.mask, SKY)


def _show_response(axes: Any, response: Tensor, photo: Photo) -> None:
    """Show the map over the gray photo, without the padding beside it."""
    side = photo.image.shape[-1]
    full = functional.interpolate(
        response[None, None], (side, side), mode="bilinear", align_corners=True
    )
    part = full[:, :, : photo.region[0], : photo.region[1]]
    size = photo.pixels.shape[:2]
    heat = functional.interpolate(part, size, mode="bilinear", align_corners=True)[0, 0].numpy()
    heat = np.clip(heat / max(float(heat.max()), 1e-12), 0, 1)
    color = mpl.colormaps[_COLORS](heat)[..., :3]
    gray = photo.pixels.mean(axis=2, keepdims=True)
    axes.imshow(np.clip(0.4 * gray + 0.6 * color, 0, 1), interpolation="none")
    if photo.mask is not None:
        outline(axes, photo.mask, SKY)
