"""A line chart as one SVG: no plotting library, readable inside a page and as a file of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape

# Okabe and Ito (2008): told apart with every common kind of colour vision.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
WIDTH, HEIGHT = 600, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 110, 44, 52


def line_chart(series: Mapping[str, Sequence[float]], *, title: str, x_label: str, y_label: str) -> str:
    """Return an SVG of one line for each series over 1, 2, 3 ..., each labelled at its end; y starts at zero.

    series: equally many finite values, none negative, for each name.  Text takes the page's colour.

    Raises:
        ValueError: no series, no value, unequal lengths, or a value that is negative or not finite.
    """
    count = _check_series(series)
    ticks = nice_ticks(max(max(values) for values in series.values()))
    top = ticks[-1]

    def x(index: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index / max(count - 1, 1))

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    parts = [_axes(ticks, count, x, y), _labels(title, x_label, y_label)]
    ends = _spread([y(values[-1]) for values in series.values()], gap=18)
    for (name, values), colour, end in zip(series.items(), _cycle(len(series)), ends):
        parts.append(_line(name, values, colour, end, x, y))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="13" fill="currentColor">'
        f"{''.join(parts)}</svg>"
    )


def nice_ticks(highest: float) -> list[float]:
    """Return about five round numbers from 0 to at least `highest` (a step of 1, 2 or 5 times a power of ten)."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10 ** math.floor(math.log10(highest / 4))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda s: (s * 4 < highest * 0.75, s))
    return [round(step * index, 12) for index in range(math.ceil(highest / step - 1e-9) + 1)]


def step_ticks(count: int) -> list[int]:
    """Return the steps of 1 ... count to label: the first, the last, and round ones well between."""
    every = next((size for size in (1, 2, 5, 10, 20, 50, 100) if count <= 10 or count / size <= 6), count)
    between = [step for step in range(every, count, every) if step > 1 and count - step > every / 2]
    return sorted({1, *between, count})


def _check_series(series: Mapping[str, Sequence[float]]) -> int:
    lengths = {len(values) for values in series.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"series must be one or more, equally long and not empty: got lengths {sorted(lengths)}")
    for name, values in series.items():
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError(f"series {name!r} must be finite and not negative: got {list(values)}")
    return lengths.pop()


def _axes(ticks: Sequence[float], count: int, x, y) -> str:  # type: ignore[no-untyped-def]  # two coordinate functions
    parts = []
    for tick in ticks:
        height = f"{y(tick):.1f}"
        opacity = 0.55 if tick == 0 else 0.15
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}" stroke="currentColor" '
            f'stroke-opacity="{opacity}"/><text x="{LEFT - 10}" y="{height}" dy="0.32em" text-anchor="end" '
            f'fill-opacity="0.75">{tick:g}</text>'
        )
    for step in step_ticks(count):
        parts.append(
            f'<text x="{x(step - 1):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle" '
            f'fill-opacity="0.75">{step}</text>'
        )
    return "".join(parts)


def _labels(title: str, x_label: str, y_label: str) -> str:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return (
        f'<text x="{LEFT}" y="22" font-size="15" font-weight="600">{escape(title)}</text>'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle" fill-opacity="0.75">'
        f"{escape(x_label)}</text>"
        f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle" fill-opacity="0.75">'
        f"{escape(y_label)}</text>"
    )


def _line(name: str, values: Sequence[float], colour: str, end: float, x, y) -> str:  # type: ignore[no-untyped-def]
    points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in enumerate(values))
    dots = "".join(
        f'<circle cx="{x(index):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}">'
        f"<title>{escape(name)}, {index + 1}: {value:.4g}</title></circle>"
        for index, value in enumerate(values)
    )
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>{dots}'
        f'<text x="{WIDTH - RIGHT + 12}" y="{end:.1f}" dy="0.32em" fill="{colour}" font-weight="600">'
        f"{escape(name)}</text>"
    )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move label heights apart, in their order, until neighbours are `gap` away from each other."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = list(heights)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    return placed


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
