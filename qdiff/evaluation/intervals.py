"""Values with their intervals, a row a group and a lane a series: who is worse off, and whether it could be chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from qdiff.evaluation.svg import (
    CHARACTER,
    QUIET,
    colour_index,
    coloured,
    document,
    mark,
    name_text,
    name_width,
    round_ticks,
    rule,
    text,
)

PLOT = 290
LANE, PADDING = 13, 9  # pixels of a series in its row, and around a row's lanes
TOP, BOTTOM = 36, 46
KEY_LINE = 20

Interval = tuple[float, float, float]


def interval_chart(
    rows: Mapping[str, Mapping[str, Interval]], *, title: str, x_label: str, names: Sequence[str] = ()
) -> str:
    """Return an SVG of (value, low, high) for each series of each row; the axis covers them and starts anywhere.

    rows: series by name, for each row's name.  names: of all series of a page, so that each has the same colour in
    every chart; those of the first row when empty.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    values = [value for row in rows.values() for interval in row.values() for value in interval]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"rows must hold one interval or more, all finite: got {dict(rows)}")
    shown = [name for name in names or list(next(iter(rows.values()))) if any(name in row for row in rows.values())]
    names = names or shown
    left = name_width(list(rows)) + 16
    key, top = _key(shown, names, left + PLOT)
    ticks = round_ticks(min(values), max(values))
    height = LANE * len(shown) + 2 * PADDING
    bottom = top + height * len(rows)

    def across(value: float) -> float:
        return left + PLOT * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [key]
    for tick in ticks:
        parts.append(rule(across(tick), top, across(tick), bottom))
        parts.append(text(across(tick), bottom + 18, f"{tick:g}", f'text-anchor="middle" {QUIET}'))
    parts.append(text(left + PLOT / 2, bottom + BOTTOM - 8, x_label, f'text-anchor="middle" {QUIET}'))
    for index, (row, series) in enumerate(rows.items()):
        start = top + height * index
        parts.append(rule(0, start, left + PLOT, start))
        parts.append(name_text(0, start + height / 2 + 4, row))
        for lane, name in enumerate(shown):
            if name in series:
                y = start + PADDING + LANE * (lane + 0.5)
                parts.append(_interval(f"{row}, {name}", series[name], colour_index(name, names), y, across))
    return document(left + PLOT + 18, bottom + BOTTOM, title, parts)


def _interval(name: str, interval: Interval, index: int, y: float, across: Callable[[float], float]) -> str:
    value, low, high = interval
    line = f'<path d="M{across(low):.1f},{y:.1f}H{across(high):.1f}" stroke="currentColor" stroke-width="2"/>'
    return coloured(
        index, [line, mark(index, across(value), y, f"{name}: {value:.4g}, from {low:.4g} to {high:.4g} (95 %)")]
    )


def _key(shown: Sequence[str], names: Sequence[str], width: float) -> tuple[str, float]:
    """What each colour stands for, and where the plot starts below; nothing for a single series."""
    if len(shown) < 2:
        return "", TOP
    parts, x, y = [], 0.0, float(TOP)
    for name in shown:
        needed = 30 + CHARACTER * len(name)
        if x > 0 and x + needed > width:
            x, y = 0.0, y + KEY_LINE
        index = colour_index(name, names)
        parts += [coloured(index, [mark(index, x + 5, y)]), text(x + 14, y + 4, name)]
        x += needed
    return "".join(parts), y + KEY_LINE
