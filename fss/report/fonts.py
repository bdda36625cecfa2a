"""Text of any script in pictures: in fonts that have its characters, else in other words."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

# The usual families of Linux, Windows and macOS for scripts that matplotlib's own font lacks.
_CHINESE = (
    "Noto Sans CJK SC, Noto Sans SC, Source Han Sans SC, Source Han Sans CN, Noto Sans CJK TC, "
    "Noto Sans TC, WenQuanYi Zen Hei, WenQuanYi Micro Hei, Droid Sans Fallback, Microsoft YaHei, "
    "Microsoft JhengHei, SimHei, PingFang SC, PingFang HK, Hiragino Sans GB, Heiti TC, STHeiti"
)
_JAPANESE = (
    "Noto Sans CJK JP, Noto Sans JP, Source Han Sans JP, IPAexGothic, IPAGothic, TakaoGothic, "
    "VL Gothic, Yu Gothic, Meiryo, MS Gothic, Hiragino Sans, Hiragino Kaku Gothic ProN"
)
_KOREAN = (
    "Noto Sans CJK KR, Noto Sans KR, Source Han Sans KR, NanumGothic, Baekmuk Gulim, UnDotum, "
    "Malgun Gothic, Apple SD Gothic Neo, AppleGothic"
)
_THAI = (
    "Noto Sans Thai, Noto Sans Thai Looped, Loma, Garuda, Sarabun, TH Sarabun New, Waree, Norasi, "
    "Leelawadee UI, Tahoma, Thonburi"
)
_MANY = "Arial Unicode MS, Unifont, GNU Unifont, Code2000"
FAMILIES = tuple(", ".join((_CHINESE, _JAPANESE, _KOREAN, _THAI, _MANY)).split(", "))
"""Families of fonts, the preferred first, for what the font of a picture does not have."""


def legible(text: str, font: FontProperties, instead: Mapping[str, str]) -> str:
    """Return a text of which the installed fonts have every character.

    Args:
        text: a line of it.
        font: the preferred one; `FAMILIES` stand in for it.
        instead: words for names in the text that cannot be drawn. Without such, each missing
            character becomes "?".
    """
    if not _missing(text, font):
        return text
    for name in sorted(instead, key=len, reverse=True):
        if name in text and _missing(name, font):
            text = text.replace(name, instead[name])
    absent = _missing(text, font)
    return "".join("?" if character in absent else character for character in text)


def with_fallbacks(text: str, font: FontProperties) -> FontProperties:
    """Return the font followed by those of `FAMILIES` that this text needs."""
    absent = _absent(text, findfont(font))
    needed = []
    for family, path in _installed().items() if absent else ():
        left = _absent("".join(absent), path)
        if left != absent:
            needed.append(family)
            absent = left
    if not needed:
        return font
    extended = font.copy()
    extended.set_family([*font.get_family(), *needed])
    return extended


def _missing(text: str, font: FontProperties) -> set[str]:
    """Return the characters that no font has."""
    absent = _absent(text, findfont(font))
    for path in _installed().values() if absent else ():
        absent = _absent("".join(absent), path)
    return absent


def _absent(text: str, path: str) -> set[str]:
    known = _characters(path)
    return {character for character in text if ord(character) not in known}


@lru_cache(maxsize=64)
def _characters(path: str) -> frozenset[int]:
    return frozenset(get_font(path).get_charmap())


def _installed() -> dict[str, str]:
    """Return the file of each of `FAMILIES` that is installed."""
    there = {entry.name for entry in fontManager.ttflist}
    return {name: findfont(FontProperties(family=name)) for name in FAMILIES if name in there}


class _LegibleRenderer(RendererAgg):
    """Draws text by `legible` and `with_fallbacks`."""

    instead: Mapping[str, str]

    def draw_text(
        self, gc: Any, x: float, y: float, s: str, prop: FontProperties, *args: Any, **kwargs: Any
    ) -> None:
        s = legible(s, prop, self.instead)
        super().draw_text(gc, x, y, s, with_fallbacks(s, prop), *args, **kwargs)

    def get_text_width_height_descent(
        self, s: str, prop: FontProperties, ismath: Any
    ) -> tuple[float, float, float]:
        s = legible(s, prop, self.instead)
        return super().get_text_width_height_descent(s, with_fallbacks(s, prop), ismath)


class LegibleCanvas(FigureCanvasAgg):
    """A canvas for PNG that draws text of any script.

    Args:
        figure: to draw.
        instead: words for names that no installed font can draw.
    """

    def __init__(self, figure: Figure, instead: Mapping[str, str]) -> None:
        super().__init__(figure)
        self.instead = dict(instead)

    def get_renderer(self) -> RendererAgg:
        renderer = super().get_renderer()
        if not isinstance(renderer, _LegibleRenderer):
            renderer = _LegibleRenderer(renderer.width, renderer.height, renderer.dpi)
            renderer.instead = self.instead
            self.renderer = renderer  # the base class gives it again while the size is the same
        return renderer
