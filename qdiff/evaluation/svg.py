"""The pieces that every chart is drawn with: texts, rules, marks, round ticks and one colour a series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

# Okabe and Ito (2008): told apart with every common kind of colour vision. A page's styles may give `.s1`, `.s2` ...
# other shades, as for a dark background.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
# Pixels that a character takes at FONT_SIZE, about: an SVG cannot measure its texts. Of DejaVu Sans, a wide font.
CHARACTER = 8.0
FONT_SIZE = 13
LONGEST_NAME = 26
QUIET = 'fill-opacity="0.75"'

# Outlines around (0, 0), of about the area of a circle of radius 4. Series differ by shape too.
_SHAPES = ("", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-5L5,3.8H-5z", "M0,-5.2L5.2,0L0,5.2L-5.2,0z", "M0,5L5,-3.8H-5z")


def document(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """Return the SVG of these parts under its title, as a file of its own or part of a page."""
    heading = text(0, 18, title, 'font-size="15" font-weight="600"') if title else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'role="img" aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="{FONT_SIZE}" '
        f'fill="currentColor">{heading}{"".join(parts)}</svg>'
    )


def text(x: float, y: float, words: str, attributes: str = "") -> str:
    """Return one line of text; `attributes` is put in as it is."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(words)}</text>'


def name_text(x: float, y: float, name: str, attributes: str = "") -> str:
    """Return a name, cut where it is long; the whole of it is in its tooltip."""
    if len(name) <= LONGEST_NAME:
        return text(x, y, name, attributes)
    whole = f"<title>{escape(name)}</title>"
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(name[: LONGEST_NAME - 1])}…{whole}</text>'


def name_width(names: Sequence[str]) -> float:
    """Return the pixels that the longest of the names takes."""
    return CHARACTER * max((min(len(name), LONGEST_NAME) for name in names), default=0)


def rule(x1: float, y1: float, x2: float, y2: float, opacity: float = 0.15, dashes: str = "") -> str:
    """Return a thin line in the text's colour."""
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    line = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {line} stroke="currentColor" stroke-opacity="{opacity}"{dashed}/>'


def coloured(index: int, parts: Sequence[str]) -> str:
    """Return the parts in the colour of the index-th series, which they call currentColor."""
    index %= len(COLOURS)
    return f'<g class="s{index + 1}" color="{COLOURS[index]}">{"".join(parts)}</g>'


def mark(index: int, x: float, y: float, tooltip: str = "") -> str:
    """Return the sign of the index-th series at a point."""
    title = f"<title>{escape(tooltip)}</title>" if tooltip else ""
    shape = _SHAPES[index % len(_SHAPES)]
    if not shape:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="currentColor">{title}</circle>'
    return f'<path d="{shape}" transform="translate({x:.1f} {y:.1f})" fill="currentColor">{title}</path>'


def colour_index(name: str, names: Sequence[str]) -> int:
    """Return which colour and shape a series has: a name has the same ones in every chart of the same `names`."""
    return list(names).index(name)


def spread(heights: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Move heights apart, in their order, until neighbours are `gap` away, between top and bottom where there is room.

    The heights may come in any order; the result is in the same one.
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed: list[float] = []
    for index in order:
        placed.append(max(heights[index], placed[-1] + gap) if placed else max(heights[index], top))
    limit = bottom
    for place in range(len(placed) - 1, -1, -1):
        placed[place] = min(placed[place], limit)
        limit = placed[place] - gap
    by_index = dict(zip(order, placed))
    return [by_index[index] for index in range(len(heights))]


def round_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers (a step of 1, 2 or 5 times a power of ten) from below `low` to above `high`."""
    largest = max(abs(low), abs(high))
    span = high - low
    if span <= 1e-6 * max(largest, 1.0):  # all as good as equal: what a tick's label could not tell apart
        span = max(largest, 1.0)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda size: abs(span / size - 5))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * index, 12) for index in range(first, max(last, first + 1) + 1)]
