"""Points of several groups as one SVG, each with its name: which of them is better at what price."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from qdiff.evaluation.chart import COLOURS

WIDTH = 760
LEFT, RIGHT, TOP, BOTTOM = 62, 250, 62, 52
LINE = 14  # pixels that a name takes
RADIUS = 4

Point = tuple[str, float, float]


def scatter_chart(groups: Mapping[str, Sequence[Point]], *, title: str, x_label: str, y_label: str) -> str:
    """Return an SVG of (name, x, y) points, a colour a group, names in a column on the right, in the order of y.

    Neither axis starts at zero: both cover the points. Text takes the page's colour.

    Raises:
        ValueError: no point, or one that is not finite.
    """
    points = [(*point, colour) for (_, group), colour in zip(groups.items(), _colours(groups)) for point in group]
    if not points or not all(math.isfinite(value) for _, x, y, _ in points for value in (x, y)):
        raise ValueError(f"points must be one or more, all finite: got {[point[:3] for point in points]}")
    height = TOP + BOTTOM + max(300, LINE * len(points))
    x_ticks, y_ticks = _ticks([x for _, x, _, _ in points]), _ticks([y for _, _, y, _ in points])

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def up(y: float) -> float:
        return height - BOTTOM - (height - TOP - BOTTOM) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    parts = [_text(LEFT, 22, title, 'font-size="15" font-weight="600"'), _legend(groups)]
    for tick in y_ticks:
        parts.append(_rule(LEFT, WIDTH - RIGHT, up(tick), up(tick)))
        parts.append(_text(LEFT - 10, up(tick) + 4, f"{tick:g}", 'text-anchor="end" fill-opacity="0.75"'))
    for tick in x_ticks:
        parts.append(_rule(across(tick), across(tick), TOP, height - BOTTOM))
        parts.append(_text(across(tick), height - BOTTOM + 20, f"{tick:g}", 'text-anchor="middle" fill-opacity="0.75"'))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, height - 10, x_label, 'text-anchor="middle" fill-opacity="0.75"'))
    turned = f'transform="rotate(-90 18 {height / 2:.1f})" text-anchor="middle" fill-opacity="0.75"'
    parts.append(_text(18, height / 2, y_label, turned))
    points.sort(key=lambda point: -point[2])
    rows = spread([up(y) for _, _, y, _ in points], LINE, TOP, height - BOTTOM)
    for (name, x, y, colour), row in zip(points, rows):
        column, coloured = WIDTH - RIGHT + 14, f'fill="{colour}"'
        parts.append(
            f'<line x1="{across(x):.1f}" y1="{up(y):.1f}" x2="{column}" y2="{row:.1f}" stroke="{colour}" '
            f'stroke-opacity="0.35"/><circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="{RADIUS}" fill="{colour}">'
            f"<title>{escape(name)}: {x:.3g}, {y:.4g}</title></circle>"
            f"{_text(column + 4, row + 4, name, coloured)}"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="12" fill="currentColor">'
        f"{''.join(parts)}</svg>"
    )


def spread(heights: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Move ascending heights apart until neighbours are `gap` away, between top and bottom where there is room."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else max(height, top))
    limit = bottom
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers from below the smallest value to above the largest."""
    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    span = high - low
    if span <= 1e-6 * max(largest, 1.0):  # all as good as equal: what a tick's label could not tell apart
        span = max(largest, 1.0)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda size: abs(span / size - 5))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * index, 12) for index in range(first, max(last, first + 1) + 1)]


def _colours(groups: Mapping[str, Sequence[Point]]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(groups))]


def _legend(groups: Mapping[str, Sequence[Point]]) -> str:
    parts, x = [], LEFT
    for name, colour in zip(groups, _colours(groups)):
        parts.append(f'<circle cx="{x + RADIUS}" cy="40" r="{RADIUS}" fill="{colour}"/>{_text(x + 14, 44, name, "")}')
        x += 30 + 7 * len(name)
    return "".join(parts)


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(text)}</text>'


def _rule(x1: float, x2: float, y1: float, y2: float) -> str:
    line = f'x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"'
    return f'<line {line} stroke="currentColor" stroke-opacity="0.15"/>'
