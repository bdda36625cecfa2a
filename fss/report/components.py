"""Where in photos the components respond whose singular values changed most (Figures 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import svf_fast
from fss.colors import SKY
from fss.data import build_episodes, build_source, test_transform
from fss.data.images import read_picture
from fss.models import FewShotModel
from fss.report.episodes import outline, photo_pixels, spread_over_classes
from fss.report.plot import Plot, figure_style, new_figure, save_plot
from fss.report.runs import ReportedRun
from fss.report.spectrum import Spectrum

_SHOWN = 4  # components that rose, and that fell, in a report
_CUES = 3  # in a figure of the paper
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
    if path is None:
        return test_photos(run, 1)[0]
    pixels = read_picture(path, "--photo")
    nothing = np.zeros(pixels.shape[:2], dtype=np.uint8)
    transform = test_transform(run.config.data)
    sample = transform(pixels, nothing, np.random.default_rng(0))
    return _photo(Path(path).name, sample.image, sample.size, pixels.shape[:2], None)


def test_photos(run: ReportedRun, count: int) -> list[Photo]:
    """Read the queries of so many test episodes of a run, of different classes as far as there are.

    Raises:
        OSError, ValueError: missing or unreadable photos.
    """
    config = run.config
    source = build_source(config.data)
    seed = config.test_seeds[0]
    episodes = build_episodes(config.data, "test", config.test_episodes, seed, source)
    photos = []
    for index in spread_over_classes(episodes, count):
        item = episodes[index]
        mask, region = item["query_mask_original"], tuple(item["query_size"].tolist())
        name = item["query_name"]
        photos.append(_photo(name, item["query_image"], region, tuple(mask.shape), mask))
    return photos


def _photo(
    name: str, image: Tensor, region: tuple[int, int], size: tuple[int, int], mask: Tensor | None
) -> Photo:
    """Make a photo of its image, with pixels and mask at the size at which they are shown."""
    scale = min(1.0, _SIDE / max(size))
    shown = tuple(max(1, round(scale * side)) for side in size)
    if mask is not None:
        reduced = cv2.resize((mask == 1).numpy().astype(np.uint8), shown[::-1])
        mask = torch.from_numpy(reduced > 0)
    return Photo(name, image, region, photo_pixels(image, list(region), shown), mask)


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
    with figure_style():
        height = 2.05 * _height_of(photo) + 0.42
        figure = new_figure(10.4, len(layers) * (2 * height + 0.3), {photo.name: "photo"})
        parts = figure.subfigures(len(layers), 1, squeeze=False)[:, 0]
        for part, layer in zip(parts, layers, strict=True):
            part.patch.set_alpha(0)
            part.suptitle(_layer_title(known[layer]), fontsize=10, fontweight="bold")
            grid = part.subplots(2, _SHOWN + 1)
            for axes in grid.flat:
                axes.set_axis_off()
            _show_photo(grid[0, 0], photo)
            module = network.backbone.get_submodule(layer)
            for axes, chosen in zip(grid[:, 1:], changed_most(known[layer], _SHOWN), strict=True):
                _show_components(axes, module, known[layer], chosen, inputs[layer], photo)
            colors = mpl.cm.ScalarMappable(cmap=_COLORS)
            bar = part.colorbar(colors, ax=grid[1, 0], location="left", shrink=0.8, aspect=12)
            bar.set_ticks([0, 1], labels=["0", "max"])
            bar.set_label("|v_r|, each map", fontsize=8)
    text = (
        f"Response to the photo of the components whose singular values changed most in "
        f"{' and '.join(layers)}, {run.name}"
    )
    return save_plot(figure, folder, name, text)


def plot_cues(network: FewShotModel, spectrum: Spectrum, photos: Sequence[Photo]) -> Figure:
    """Plot, a row a photo, the components of a layer whose S_r fell (a) and rose (b) most.

    See `draw_components` for what the maps show.
    """
    rose, fell = changed_most(spectrum, _CUES)
    module = network.backbone.get_submodule(spectrum.layer)
    with figure_style():
        ratios = [_height_of(photo) for photo in photos]
        height = 1.42 * sum(ratios) + 0.1 * len(photos) + 0.9
        instead = {photo.name: f"photo {number}" for number, photo in enumerate(photos, 1)}
        figure = new_figure(10.4, height, instead)
        figure.suptitle(_layer_title(spectrum), fontsize=10, fontweight="bold")
        parts = figure.subfigures(1, 3, width_ratios=(1, _CUES, _CUES))
        titles = (" ", "(a) singular values that fell most", "(b) that rose most")
        for part, title in zip(parts, titles, strict=True):
            part.patch.set_alpha(0)
            part.suptitle(title, fontsize=9)
        grids = [
            part.subplots(
                len(photos), columns, squeeze=False, gridspec_kw={"height_ratios": ratios}
            )
            for part, columns in zip(parts, (1, _CUES, _CUES), strict=True)
        ]
        for axes in (axes for grid in grids for axes in grid.flat):
            axes.set_axis_off()
        for row, photo in enumerate(photos):
            x = _inputs(network.backbone, photo.image, [spectrum.layer])[spectrum.layer]
            _show_photo(grids[0][row, 0], photo, "" if row else " \n ")
            for grid, chosen in zip(grids[1:], (fell, rose), strict=True):
                _show_components(grid[row], module, spectrum, chosen, x, photo, titled=row == 0)
    return figure


def changed_most(spectrum: Spectrum, count: int) -> tuple[Tensor, Tensor]:
    """Return the places in a spectrum of up to `count` values that rose most, and that fell most.

    By the difference, most first.
    """
    change = spectrum.difference
    rose = change.argsort(descending=True, stable=True)[:count]
    fell = change.argsort(stable=True)[:count]
    return rose[change[rose] > 0], fell[change[fell] < 0]


def change_in_words(before: float, after: float) -> str:
    """Write two values and their difference with as many digits as it takes to see it."""
    change = after - before
    digits = 2 if change == 0 else max(2, 1 - math.floor(math.log10(abs(change))))
    text = f"{before:.{digits}f} → {after:.{digits}f}\n{change:+.{digits}f}"
    return text.replace("-", "−")


def _layer_title(spectrum: Spectrum) -> str:
    return f"{spectrum.layer}, {spectrum.size}"


def _height_of(photo: Photo) -> float:
    """Return the height of a photo over its width, within bounds."""
    return min(max(photo.pixels.shape[0] / photo.pixels.shape[1], 0.6), 1.4)


def _show_components(
    grid: np.ndarray,
    module: nn.Module,
    spectrum: Spectrum,
    chosen: Tensor,
    x: Tensor,
    photo: Photo,
    titled: bool = True,
) -> None:
    """Show maps of the chosen components of a layer whose input is x, with what S_r did."""
    maps = _responses(module, x, spectrum.component[chosen]) if len(chosen) else ()
    for axes, place, response in zip(grid, chosen.tolist(), maps, strict=False):
        _show_response(axes, response, photo)
        if titled:
            words = change_in_words(float(spectrum.before[place]), float(spectrum.after[place]))
            values, difference = words.split("\n")
            axes.set_title(
                f"r = {place + 1}: {difference}\n{values}",
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
    """Return |V_rᵀ * x| of these components, [n, h, w]; of tokens at those of a square photo."""
    if isinstance(module, svf_fast.SVFLinear):
        tokens = (x[0] @ module.V[components].T).abs().T
        side = math.isqrt(tokens.shape[1])  # what comes before the patches is of no place
        return tokens[:, -side * side :].unflatten(1, (side, side))
    maps = functional.conv2d(
        x, module.V[components], None, module.stride, module.padding, module.dilation
    )
    return maps[0].abs()


def _show_photo(axes: Any, photo: Photo, title: str | None = None) -> None:
    """Show a photo under a title, by default its name."""
    axes.imshow(photo.pixels, interpolation="none")
    words = photo.name if title is None else title
    axes.set_title(words, fontsize=8, fontweight="normal", loc="center")
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
