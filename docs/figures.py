"""Draws docs/images/block.svg: what autograd keeps of a bottleneck, map by map.

python docs/figures.py
"""

from __future__ import annotations

from pathlib import Path

UNIT, HEIGHT, LEFT = 36, 34, 150  # pixels: of C channels, of a bar, of the names beside it

# Kept maps and their channels in units of C. Each convolution: v, S⊙v, y; batch norm keeps y.
PAPER = [
    ("x", 4), ("v1", 1), ("S⊙v1", 1), ("y1", 1), ("x2", 1), ("v2", 1), ("S⊙v2", 1), ("y2", 1),
    ("x3", 1), ("v3", 1), ("S⊙v3", 1), ("y3", 4),
]  # fmt: skip
FUSED = [("y1", 1), ("y2", 1), ("", 0.125)]
RECOMPUTED = [("y1", 1), ("", 0.125)]
ROWS = [
    ("the paper's layers", PAPER, "#0072B2"),
    ("fused", FUSED, "#E69F00"),
    ("fused, recompute", RECOMPUTED, "#E69F00"),
]


def block() -> str:
    """Draw the figure as SVG; blue and orange of Okabe and Ito, on white."""
    width, height = LEFT + 18 * UNIT + 70, len(ROWS) * (HEIGHT + 18) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" rx="4" fill="#fff"/>',
    ]
    y = 16
    for name, maps, colour in ROWS:
        parts.append(_text(LEFT - 10, y + 22, name, "end"))
        x = LEFT
        for label, channels in maps:
            size = channels * UNIT
            parts.append(
                f'<rect x="{x}" y="{y}" width="{size}" height="{HEIGHT}" fill="{colour}" '
                'fill-opacity="0.3" stroke="#444"/>'
            )
            parts.append(_text(x + size / 2, y + 22, label, "middle", 11))
            x += size
        total = sum(channels for _, channels in maps)
        parts.append(_text(x + 8, y + 22, f"{total:g} C", "start"))
        y += HEIGHT + 18
    note = "Width: channels kept for the backward pass, float32. The narrow bar: a bit per element."
    parts.append(_text(LEFT, y + 14, note, "start", 12))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str, size: int = 13) -> str:
    place = f'x="{x:g}" y="{y}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="#222">{text}</text>'


if __name__ == "__main__":
    (Path(__file__).with_name("images") / "block.svg").write_text(block())
