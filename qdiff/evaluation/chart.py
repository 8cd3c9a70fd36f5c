"""A line chart as one SVG: no plotting library, readable inside a page and as a file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from qdiff.evaluation.svg import QUIET, colour_index, coloured, document, mark, name_text, name_width, rule, spread
from qdiff.evaluation.svg import text as svg_text

PLOT, HEIGHT = 290, 280  # of the plot alone, and of the whole: readable at 340 pixels on a phone
LEFT, TOP, BOTTOM = 52, 40, 48

Place = Callable[[float], float]


def line_chart(
    series: Mapping[str, Sequence[float]], *, title: str, x_label: str, y_label: str, names: Sequence[str] = ()
) -> str:
    """Return an SVG of one line for each series over 1, 2, 3 ..., each labelled at its end; y starts at zero.

    series: equally many finite values, none negative, for each name.  names: of all series of a page, so that each has
    the same colour in every chart; those of `series` when empty.  Text takes the page's colour.

    Raises:
        ValueError: no series, no value, unequal lengths, or a value that is negative or not finite.
    """
    count = _check_series(series)
    ticks = nice_ticks(max(max(values) for values in series.values()))
    names = names or list(series)

    def x(index: float) -> float:
        return LEFT + PLOT * (index / max(count - 1, 1))

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / ticks[-1]

    parts = [_axes(ticks, count, x, y), _labels(x_label, y_label)]
    ends = spread([y(values[-1]) for values in series.values()], 18, TOP, HEIGHT - BOTTOM)
    for (name, values), end in zip(series.items(), ends):
        parts.append(_line(name, values, colour_index(name, names), x, y))
        parts.append(rule(LEFT + PLOT, y(values[-1]), LEFT + PLOT + 12, end, opacity=0.4))
        parts.append(name_text(LEFT + PLOT + 15, end + 4, name, 'font-weight="600"'))
    return document(LEFT + PLOT + 20 + name_width(list(series)), HEIGHT, title, parts)


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


def _axes(ticks: Sequence[float], count: int, x: Place, y: Place) -> str:
    parts = []
    for tick in ticks:
        parts.append(rule(LEFT, y(tick), LEFT + PLOT, y(tick), opacity=0.55 if tick == 0 else 0.15))
        parts.append(svg_text(LEFT - 8, y(tick) + 4, f"{tick:g}", f'text-anchor="end" {QUIET}'))
    for step in step_ticks(count):
        parts.append(svg_text(x(step - 1), HEIGHT - BOTTOM + 18, str(step), f'text-anchor="middle" {QUIET}'))
    return "".join(parts)


def _labels(x_label: str, y_label: str) -> str:
    turned = f'transform="rotate(-90 12 {(TOP + HEIGHT - BOTTOM) / 2:.1f})" text-anchor="middle" {QUIET}'
    return svg_text(LEFT + PLOT / 2, HEIGHT - 10, x_label, f'text-anchor="middle" {QUIET}') + svg_text(
        12, (TOP + HEIGHT - BOTTOM) / 2, y_label, turned
    )


def _line(name: str, values: Sequence[float], index: int, x: Place, y: Place) -> str:
    points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in enumerate(values))
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="2" stroke-linejoin="round"/>'
    marks = [mark(index, x(step), y(value), f"{name}, {step + 1}: {value:.4g}") for step, value in enumerate(values)]
    return coloured(index, [line, *marks])
