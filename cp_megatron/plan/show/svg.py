"""Parts of pictures in SVG: text, shapes, colours and the file. All sizes are in pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from cp_megatron.plan.show.shapes import Point

LINE, LETTER, SMALL_LETTER = 19, 6.7, 5.6  # of a line and of letters
MANY_COLOURS = 8


def write_picture(path: str, width: float, height: float, elements: Iterable[str]) -> None:
    """Writes a picture of ``elements`` on white to the file ``path``."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        *elements,
        "</svg>",
    ]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def text(x: float, y: float, words: str, attributes: str = "") -> str:
    """Returns a line of text; ``y`` is that of its baseline."""
    space = " " if attributes else ""
    words = escape(words, quote=False)
    return f'<text x="{number(x)}" y="{number(y)}"{space}{attributes}>{words}</text>'


def number(value: float) -> str:
    """Returns a coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def path_of(points: Sequence[Point]) -> str:
    """Returns the path data of a closed polygon."""
    corners = " ".join(f"{number(x)} {number(y)}" for x, y in points)
    return f"M{corners}z"


def rectangle(x0: float, x1: float, y0: float, y1: float) -> str:
    """Returns the path data of a rectangle."""
    return path_of([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def colour(index: int, count: int, shade: float = 0.0) -> str:
    """Returns evenly spaced hues; many ranks share a hue in pairs that differ in lightness.

    The hues are those of OKLCH, which look equally distant (Ottosson 2020,
    bottosson.github.io/posts/oklab).
    """
    lightness, hues, hue = 0.78, count, index
    if count > MANY_COLOURS:
        lightness, hues, hue = (0.86, 0.68)[index % 2], (count + 1) // 2, index // 2
    lightness += shade
    angle = 2 * math.pi * (hue / hues + 0.65)
    a, b = 0.115 * math.cos(angle), 0.115 * math.sin(angle)
    large = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * large - 3.3077115913 * medium + 0.2309699292 * short
    green = -1.2684380046 * large + 2.6097574011 * medium - 0.3413193965 * short
    blue = -0.0041960863 * large - 0.7034186147 * medium + 1.7076147010 * short
    bright = (min(max(part, 0.0), 1.0) for part in (red, green, blue))
    return "#" + "".join(f"{round(255 * _gamma(part)):02x}" for part in bright)


def _gamma(linear: float) -> float:
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
