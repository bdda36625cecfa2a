"""What the values of a set of masks mean: class ids, colors of classes, or one object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fss.data.discovery import name_some
from fss.data.images import decode, is_transparent, pixel_values
from fss.data.imports.names import ClassKey, color_text
from fss.data.masks import VOC_BORDER, color_codes, read_object, voc_colors
from fss.data.pascal import CLASSES
from fss.data.source import IGNORE

Kind = Literal["ids", "colors", "binary"]

_MOST = IGNORE - 1  # classes of a data set
_GRAY = 0x010101
_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
_WHITE_SHARE = 0.9  # of the pixels that are not black, in masks with soft edges
_NEAR = 48  # how far a pixel may be from the color of a class, of 255
_NOISE = 16  # how far compression moves a level, of 255
_FEW = 16  # values of masks of one object without soft edges
_FAR_SHARE = 0.05  # pixels of a mask that may be farther: soft edges


class Values(NamedTuple):
    """The values of a mask [H, W]: gray or class ids, or colors 0xRRGGBB."""

    pixels: NDArray[np.int64]
    is_color: bool
    palette: dict[int, int] | None  # the colors of the indices that occur, of a palette


class Meaning(NamedTuple):
    """How masks are read: the class id of each value, and a sentence for the user.

    `labels` is None where a mask is one object; `classes` names the ids in the order of the values.
    """

    kind: Kind
    labels: dict[int, int] | None
    names: dict[int, str]
    text: str
    as_colors: bool = False


def read_values(path: Path, as_colors: bool = False) -> Values:
    """Read the values of a mask; of a palette the indices, unless `as_colors`.

    Raises:
        ValueError: a file that cannot be decoded, or values that are no whole numbers.
    """

    def values(image: Image.Image) -> tuple[NDArray[Any], dict[int, int] | None]:
        if image.mode != "P" or is_transparent(image):
            return pixel_values(image), None
        indices = np.array(image)
        table = np.array(image.getpalette("RGB"), dtype=np.int64).reshape(-1, 3)
        used = [int(index) for index in np.unique(indices) if index < len(table)]
        return indices, {index: int(color_codes(table[index])) for index in used}

    pixels, palette = decode(path, "mask", values, is_mask=True)
    if palette is not None and as_colors:
        table = np.zeros(256, np.int64)
        table[list(palette)] = list(palette.values())
        return Values(table[pixels], True, None)
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels = np.where(pixels[..., 3:] < 128, 0, pixels[..., :3])
    if pixels.ndim == 3 and (np.ptp(pixels, axis=2) > 0).any():
        return Values(color_codes(pixels.astype(np.int64)), True, None)
    pixels = pixels[..., 0] if pixels.ndim == 3 else pixels
    if pixels.dtype.kind == "f" and not (pixels == np.rint(pixels)).all():
        raise ValueError(
            f"{path}: expected class ids, colors or one object, got fractions from "
            f"{pixels.min():.3g} to {pixels.max():.3g}; --values binary takes those from 0.5 on"
        )
    if pixels.min(initial=0) < 0:
        raise ValueError(f"{path}: expected class ids from 0 on, got {pixels.min()}")
    gray = pixels.astype(np.int64)
    return Values(gray * _GRAY if as_colors else gray, as_colors, palette)


def find_meaning(
    masks: Sequence[Path],
    kind: Kind | None,
    given: dict[ClassKey, str],
    ignored: Sequence[ClassKey],
    root: Path,
    background: ClassKey | None = None,
    is_typed: bool = True,
) -> Meaning:
    """Find out what the values of all masks mean.

    Args:
        masks: the files.
        kind: what the user says they are.
        given: names of classes by id or color, or by their place from 1 where no key was given.
        ignored: ids or colors that are neither background nor a class.
        root: the folder of the masks, for messages.
        background: the id or color that is background, by default 0 or black.
        is_typed: whether the user typed `given`; of a file, keys do not matter where a mask shows
            one object.

    Raises:
        ValueError: values that may mean several things, with the option that decides; a key of a
            value that the masks do not have.
    """
    by_value = background or ignored or (is_typed and any(not key.is_place for key in given))
    if kind == "binary" and not by_value:
        return _binary(given)
    counts: Counter[int] = Counter()
    single: dict[int, Path] = {}
    colored: list[Path] = []
    palettes: dict[int, set[int]] = {}
    lossy = [path for path in masks if path.suffix.lower() in _LOSSY]
    for path in masks:
        found = read_values(path)
        if found.is_color:
            colored.append(path)
        values, areas = np.unique(found.pixels, return_counts=True)
        counts.update(dict(zip(values.tolist(), areas.tolist(), strict=True)))
        objects = [value for value in values.tolist() if value]
        if len(objects) == 1:
            single.setdefault(objects[0], path)
        for index, color in (found.palette or {}).items():
            palettes.setdefault(index, set()).add(color)
    # a palette made anew for each file has its colors in any order
    is_mixed = any(len(colors) > 1 for colors in palettes.values()) or (
        bool(palettes.get(0)) and 0 not in palettes[0] and any(0 in c for c in palettes.values())
    )
    by_color = any(key.is_color for key in given)
    if kind == "binary" and colored:
        raise ValueError(
            f"{colored[0]}: --values binary takes no ID=NAME, COLOR=NAME, --ignored or "
            "--background for masks in colors; give --values colors"
        )
    if kind == "colors" or (kind is None and (colored or is_mixed or by_color)):
        return _colors(masks, given, ignored, root, background)
    if colored:
        raise ValueError(f"{colored[0]}: expected class ids (--values ids), got colors")
    return _grays(counts, single, lossy, kind, given, ignored, root, background, is_typed)


def apply(meaning: Meaning, path: Path) -> NDArray[np.uint8]:
    """Read a mask as class ids [H, W], 255 ignored.

    Raises:
        ValueError: a file that cannot be decoded, or colors that are near those of no class.
    """
    if meaning.labels is None:
        return read_object(path).pixels.astype(np.uint8)
    pixels = read_values(path, meaning.as_colors).pixels
    values, places = np.unique(pixels, return_inverse=True)
    table = np.array([_label(int(value), meaning) for value in values])
    far = table < 0
    if far.any():
        counts = np.bincount(places.ravel(), minlength=len(values))
        if counts[far].sum() > _FAR_SHARE * pixels.size:
            worst = int(values[far][counts[far].argmax()])
            raise ValueError(
                f"{path}: {counts[far].sum()} of {pixels.size} pixels have the color of no class, "
                f"{color_text(worst)} most; name it in --classes, --ignored or --background"
            )
        table[far] = [_nearest(int(value), meaning)[1] for value in values[far]]
    return table.astype(np.uint8)[places].reshape(pixels.shape)


def _label(value: int, meaning: Meaning) -> int:
    """Return the class id of a value, or -1 of a color that is near that of no class."""
    labels = meaning.labels or {}
    if value in labels or not meaning.as_colors:
        return labels.get(value, 0)
    distance, label = _nearest(value, meaning)
    return label if distance <= _NEAR else -1


def _nearest(value: int, meaning: Meaning) -> tuple[int, int]:
    labels = meaning.labels or {}
    return min((_distance(value, code), label) for code, label in labels.items())


def _distance(a: int, b: int) -> int:
    return max(abs((a >> shift & 255) - (b >> shift & 255)) for shift in (0, 8, 16))


def _binary(
    given: dict[ClassKey, str], why: str = "the user says so", labels: dict[int, int] | None = None
) -> Meaning:
    name = next(iter(given.values())) if len(given) == 1 else "object"
    return Meaning("binary", labels, {1: name}, f"one object ({why})")


def _levels(
    counts: Counter[int], white: int, is_soft: bool, void: set[int], base: int, wanted: list[int]
) -> dict[int, int]:
    """Return 1 for the values of the one object, 0 for the background, 255 for ignored ones.

    Args:
        counts: the values of the masks.
        white: the largest value that they may have.
        is_soft: whether values between black and white are mixtures, which go to the nearest.
        void: values that are ignored.
        base: the value of the background.
        wanted: the value of the object where the user names it.

    Raises:
        ValueError: a named value that the masks do not have, or several objects.
    """
    levels = {0, white} | (void & set(counts)) if is_soft else set(counts)
    unknown = [value for value in wanted if value not in levels]
    if unknown:
        raise _no_value(unknown[0], sorted(levels))
    objects = set(wanted) or levels - void - {base}
    if len(objects) != 1:
        raise ValueError(
            "--values binary: expected one object, the masks have the values "
            f"{_listed([str(v) for v in sorted(levels)])}; name that of the object: --classes "
            f"{max(objects, default=white)}=NAME"
        )
    kinds = {v: IGNORE if v in void else int(v in objects) for v in sorted(levels)}
    return {v: kinds[min(levels, key=lambda level: abs(level - v))] for v in counts}


def _no_value(value: int, values: Sequence[int]) -> ValueError:
    return ValueError(
        f"--classes: {value}=NAME: {value} is no value of the masks; these have "
        f"{_listed([str(v) for v in values])}"
    )


def _gray_key(key: ClassKey, option: str) -> int:
    """Return the value of a key in masks of one channel."""
    if not key.is_color:
        return key.value
    gray = key.value & 255
    if key.value != gray * _GRAY:
        raise ValueError(
            f"{option}: {color_text(key.value)} is no value of the masks, which have one channel; "
            "give an id"
        )
    return gray


def _color_key(key: ClassKey) -> int:
    """Return the color of a key in masks of colors, where a number is a gray."""
    return key.value if key.is_color else key.value * _GRAY


def _grays(
    counts: Counter[int],
    single: dict[int, Path],
    lossy: list[Path],
    kind: Kind | None,
    given: dict[ClassKey, str],
    ignored: Sequence[ClassKey],
    root: Path,
    background: ClassKey | None,
    is_typed: bool,
) -> Meaning:
    """Decide between class ids and one object."""
    skipped = {_gray_key(key, "--ignored") for key in ignored}
    wanted = [_gray_key(key, "--classes") for key in given if not key.is_place and is_typed]
    base = _gray_key(background, "--background") if background else 0
    if background and base not in counts:
        raise ValueError(
            f"--background: {base} is no value of the masks; these have "
            f"{_listed([str(value) for value in sorted(counts)])}"
        )
    if background and (base in skipped or base in wanted):
        raise ValueError(f"--background: {base} is named in --classes or --ignored too")
    values = sorted(value for value in counts if value)
    if not values:
        raise ValueError(f"{root}: all masks are black; expected class ids, colors or an object")
    white = 255 if values[-1] < 256 else 65535
    others = [value for value in values if value != white]
    top = values[-1]
    missing = _missing(skipped - set(counts), 0 in counts or background is not None)

    def one_object(why: str, is_soft: bool) -> Meaning:
        if not (skipped or wanted or background):
            return _binary(given, f"{why}{missing}")
        if len(wanted) > 1:
            raise ValueError(
                f"--classes: expected one name, as a mask shows one object ({why}), got "
                f"{', '.join(given.values())}"
            )
        labels = _levels(counts, white, is_soft, skipped, base, wanted)
        parts = {
            text: [str(v) for v in sorted({0, white} if is_soft else counts) if labels.get(v) == k]
            for k, text in ((1, "is the object"), (0, "background"), (IGNORE, "ignored"))
        }
        said = [f"{_listed(found)} {text}" for text, found in parts.items() if found]
        return _binary(given, f"{why}: {', '.join(said)}{missing}", labels)

    if kind == "binary":
        return one_object("the user says so", len(counts) > _FEW)
    if kind is None and white in counts and white not in skipped:
        share = counts[white] / sum(counts[value] for value in values)
        if not others:
            return one_object(f"0 and {white}", False)
        if len(others) > 2 and share >= _WHITE_SHARE:
            return one_object(f"0 and {white}, with soft edges", True)
        alone = white in single
        if len(others) <= 2 and (share >= _WHITE_SHARE or alone):
            example = f", {single[white]} nothing but {white}" if alone else ""
            raise ValueError(
                f"{root}: the masks have the values {', '.join(map(str, values))}{example}: "
                f"{white} may be ignored or an object. --values ids: {white} is ignored; --values "
                "binary: each mask shows one object"
            )
    if lossy and kind is None and white == 255:
        flat = sum(n for value, n in counts.items() if not _NOISE < value < white - _NOISE)
        if counts.total() - flat <= _FAR_SHARE * counts.total() and top > white - _NOISE:
            return one_object(f"0 and {white}, saved with losses", True)
    if lossy and kind is None:
        raise ValueError(
            f"{lossy[0]}: expected masks without losses, got {len(values)} values in files such as "
            "this, of which class ids cannot be read; save them as PNG. --values binary takes what "
            "is brighter than half of white"
        )
    if not background and wanted == [0] and len(set(counts) - skipped) == 2:
        base = next(value for value in values if value not in skipped)
    values = sorted(value for value in counts if value != base)
    void = skipped or ({white} if white in values and (others or kind == "ids") else set())
    classes = [value for value in values if value not in void]
    if not classes:
        raise ValueError(f"{root}: the masks have no value but {sorted(void)}, which is ignored")
    if len(classes) > _MOST:
        raise ValueError(
            f"{root}: expected at most {_MOST} classes, got {len(classes)} values from "
            f"{classes[0]} to {classes[-1]}: numbers of objects, or soft edges? Write class ids, "
            "or give --values binary for one object per photo"
        )
    new = (
        {v: v for v in classes}
        if classes[-1] <= _MOST and classes[0]
        else {v: k for k, v in enumerate(classes, start=1)}
    )
    named = _named(classes, given, lambda value: f"class {value}")
    names = {new[value]: name for value, name in named.items()}
    text = f"class ids {_listed([str(value) for value in classes])}"
    if any(value != label for value, label in new.items()):
        text += f", numbered anew from 1 to {len(classes)}"
    if void & set(counts):
        text += f"; {_listed(sorted(map(str, void & set(counts))))} ignored"
    if base:
        text += f"; {base} is background"
    return Meaning("ids", new | dict.fromkeys(void, IGNORE), names, text + missing)


def _colors(
    masks: Sequence[Path],
    given: dict[ClassKey, str],
    ignored: Sequence[ClassKey],
    root: Path,
    background: ClassKey | None,
) -> Meaning:
    """Number the colors of classes."""
    voc = voc_colors().tolist()
    void = {_color_key(key) for key in ignored}
    base = _color_key(background) if background else 0
    if base in void or (background and base in {key.value for key in given if key.is_color}):
        raise ValueError(f"--background: {color_text(base)} is named in --classes or --ignored too")
    if any(key.is_color for key in given):
        wrong = [name for key, name in given.items() if not key.is_color]
        if wrong:
            raise ValueError(f"--classes: expected a color for each name, got {wrong[0]!r} alone")
        labels = {key.value: k for k, key in enumerate(given, start=1)}
        names = dict(enumerate(given.values(), start=1))
        text = f"the {len(names)} colors given as classes"
        return Meaning(
            "colors", {base: 0} | labels | dict.fromkeys(void, IGNORE), names, text, as_colors=True
        )
    counts: Counter[int] = Counter()
    for path in masks:
        found, areas = np.unique(read_values(path, as_colors=True).pixels, return_counts=True)
        counts.update(dict(zip(found.tolist(), areas.tolist(), strict=True)))
        if len(counts) > 100 * _MOST:
            break
    codes = sorted(code for code in counts if code != base and code not in void)
    if background and base not in counts:
        raise ValueError(
            f"--background: {color_text(base)} is no color of the masks; these have "
            f"{_listed([color_text(code) for code in sorted(counts)])}"
        )
    if not codes:
        raise ValueError(
            f"{root}: the masks have no color but {color_text(base)} and those that are ignored"
        )
    if len(codes) > _MOST:
        often = ", ".join(
            f"{color_text(code)} {count / sum(counts.values()):.1%}"
            for code, count in counts.most_common(8)
        )
        raise ValueError(
            f"{root}: expected a color per class, got {len(codes)} colors: soft edges, or files "
            f"saved with losses? Most frequent: {often}. Name those of classes: --classes "
            f"'{color_text(max(codes, key=counts.__getitem__))}=name' …"
        )
    is_voc = set(codes) <= {*voc[1:21], VOC_BORDER} and (VOC_BORDER in codes or len(codes) > 4)
    if is_voc:
        labels = {code: voc.index(code) for code in codes if code != VOC_BORDER}
        named = {label: CLASSES[label - 1] for label in labels.values()}
        if given:
            named = _named(sorted(named), given, str)
        void |= {VOC_BORDER}
        text = "colors of Pascal VOC, its border ignored"
    else:
        labels = {code: k for k, code in enumerate(codes, start=1)}
        by_code = _named(codes, given, color_text)
        named = {labels[code]: name for code, name in by_code.items()}
        text = f"colors {_listed([color_text(code) for code in codes])}, numbered in this order"
    text += _missing(set(), base in counts, "black")
    if base:
        text += f"; {color_text(base)} is background"
    table = {base: 0} | labels | dict.fromkeys(void, IGNORE)
    return Meaning("colors", table, named, text, as_colors=True)


def _named(values: list[int], given: dict[ClassKey, str], default: Any) -> dict[int, str]:
    """Return the name of each value: by its own key, or by its place among the given names."""
    keyed = {key.value: name for key, name in given.items() if not key.is_place}
    unknown = [value for value in keyed if value not in values]
    if unknown:
        hint = "" if unknown[0] else "; 0 is background unless --background names another value"
        raise ValueError(
            f"--classes: {unknown[0]}={keyed[unknown[0]]} is no value of the masks; these have "
            f"{name_some([str(value) for value in values], Path())}{hint}"
        )
    places = [name for key, name in given.items() if key.is_place]
    if places and len(places) == values[-1]:
        keyed |= {value: places[value - 1] for value in values}
    elif places and len(places) == len(values):
        keyed |= dict(zip(values, places, strict=True))
    elif places:
        raise ValueError(
            f"--classes: expected {len(values)} names for {_listed([default(v) for v in values])}, "
            f"got {len(places)}; or say which: ID=NAME or COLOR=NAME"
        )
    return {value: keyed.get(value, default(value)) for value in values}


def _missing(ignored: set[int], has_background: bool, background: str = "0") -> str:
    """Return a word on values that no mask has: ignored ones, and the background."""
    text = ""
    if ignored:
        text += f"; no mask has {_listed(sorted(map(str, ignored)))}, to be ignored"
    if not has_background:
        text += f"; no mask has {background}: --background VALUE says which value is background"
    return text


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(texts[:12]) + (f" … {texts[-1]} ({len(texts)})" if len(texts) > 12 else "")
