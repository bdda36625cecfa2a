"""Plots that follow the page: files for slides and papers, SVG for a light or a dark page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fss.colors import SERIES
from fss.files import atomic_write
from fss.report.fonts import LegibleCanvas

INK = "#24292f"
"""Text and axes: this color in PNG files; in SVG that of the text around or, alone, by theme."""

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ud800-\udfff]")
"""Characters that have no place in XML, and so none in a page that is to be well-formed."""

MARKERS = "osD^vP"
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_THEMES = (
    "svg { color: #24292f; background: transparent } "
    "@media (prefers-color-scheme: dark) { svg { color: #dfe3e8 } }"
)


@dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Attributes:
        name: of its files, without ending.
        text: what it shows, in words.
        svg: markup for the page, which takes the color of its text.
    """

    name: str
    text: str
    svg: Markup


def series_style(number: int) -> dict[str, object]:
    """Return color, marker and dashes of the n-th run, the same in all plots, unlike other runs."""
    count = len(SERIES)
    dashes = _DASHES[number // count % len(_DASHES)]
    return {
        "color": SERIES[number % count],
        "marker": MARKERS[number % count],
        "linestyle": dashes,
    }


@contextmanager
def figure_style() -> Iterator[None]:
    """Give plots drawn within no background, frames of two sides and text that stays text."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: dict[str, object] = dict.fromkeys((*inked, "grid.color"), INK)
    settings |= {
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "font.family": "sans-serif",
        "font.size": 9,
        "grid.alpha": 0.18,
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "text.parse_math": False,
    }
    with mpl.rc_context(settings):
        yield


def new_figure(width: float, height: float, instead: Mapping[str, str] | None = None) -> Figure:
    """Make a figure of these inches; the page shows it 100 pixels an inch wide.

    Args:
        width, height: of the figure.
        instead: words for names that no installed font can draw, in PNG; SVG keeps the names.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    LegibleCanvas(figure, instead or {})
    return figure


def legend_above(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """Put the legend of `axes` above the whole figure, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(labels)))


def write_png(figure: Figure, path: Path, dpi: int = 200, background: str = "white") -> None:
    """Write a figure as PNG on a background color, or on "none"."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi, facecolor=background)


def save_plot(figure: Figure, folder: Path, name: str, text: str) -> Plot:
    """Write NAME.png (on white, 200 dpi) and NAME.svg (no background, light and dark).

    Args:
        figure: drawn within `figure_style`.
        folder: where the files go.
        name: unique in the page.
        text: what the picture shows, for those who cannot see it.
    """
    write_png(figure, folder / f"{name}.png")
    figure.set_layout_engine("none")  # it lies as the PNG does, at half the time
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    settings = {"svg.hashsalt": name, "svg.fonttype": "none"}
    with mpl.rc_context(settings), warnings.catch_warnings():
        # whoever shows the file chooses the fonts
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    source = CONTROL.sub("\ufffd", buffer.getvalue().decode())
    root = _cleaned(ElementTree.fromstring(source), name, text)
    page = Markup(_without_namespaces(root))
    style = ElementTree.Element(f"{_SVG}style")
    style.text = _THEMES
    root.insert(0, style)
    ElementTree.register_namespace("", _SVG[1:-1])
    ElementTree.register_namespace("xlink", _HREF[1 : _HREF.index("}")])
    with atomic_write(folder / f"{name}.svg") as file:
        file.write(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
    return Plot(name, text, page)


def _cleaned(root: ElementTree.Element, name: str, text: str) -> ElementTree.Element:
    """Remove metadata and unused ids; begin the others with the plot's name, for one page."""
    for metadata in root.findall(f"{_SVG}metadata"):
        root.remove(metadata)
    source = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', source))
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in used:
            element.set("id", f"{name}-{own}")
        for key, value in element.attrib.items():
            value = re.sub(INK, "currentColor", value, flags=re.IGNORECASE)
            value = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", value)
            if key == _HREF and value.startswith("#"):
                value = f"#{name}-{value[1:]}"
            element.set(key, value)
    root.set("role", "img")
    root.set("aria-label", text)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    return root


def _without_namespaces(root: ElementTree.Element) -> str:
    """Return the markup as HTML takes it, where svg needs no namespace and href no prefix."""
    copy = ElementTree.fromstring(ElementTree.tostring(root))
    for element in copy.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if _HREF in element.attrib:
            element.set("href", element.attrib.pop(_HREF))
    return ElementTree.tostring(copy, encoding="unicode")
