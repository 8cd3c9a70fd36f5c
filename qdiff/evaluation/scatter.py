"""Points of several groups as one SVG, each with its name: which of them is better at what price."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
    spread,
    text,
)

LEFT, TOP, BOTTOM = 58, 40, 48
LEGEND = 24  # pixels that the names of the groups take
LINE = 15  # pixels that a name takes
SMALL = 8  # so many points fit a chart that is as small as the others of a page
GAP = 18  # between the plot and the column of names

Point = tuple[str, float, float]


def scatter_chart(
    groups: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    names: Sequence[str] = (),
    intervals: Mapping[str, tuple[float, float]] | None = None,
    lower_is_better: bool = False,
    front: bool = False,
    reference: tuple[str, float] | None = None,
) -> str:
    """Return an SVG of (name, x, y) points, a colour a group, names in a column on the right, in the order of y.

    Better is always up: where a lower y is better, the axis is turned. Neither axis starts at zero: both cover the
    points. Text takes the page's colour.

    names: of all groups of a page, so that each has the same colour in every chart; those of `groups` when empty.
    intervals: (low, high) of y by the point's name, drawn as a whisker.  front: draw the Pareto front, the points that
    no other one beats in both a lower x and a better y.  reference: a name and its x, drawn as a vertical line.

    Raises:
        ValueError: no point, or one that is not finite.
    """
    groups = {name: group for name, group in groups.items() if group}
    points = [(*point, group) for group, members in groups.items() for point in members]
    if not points or not all(math.isfinite(value) for _, x, y, _ in points for value in (x, y)):
        raise ValueError(f"points must be one or more, all finite: got {[point[:3] for point in points]}")
    names, intervals = names or list(groups), intervals or {}
    small = len(points) <= SMALL
    legend = any([name for name, _, _ in members] != [group] for group, members in groups.items())
    top, width = TOP + LEGEND * legend, 280 if small else 448
    bottom = top + max(200 if small else 300, LINE * len(points))
    x_ticks = round_ticks(*_extent([x for _, x, _, _ in points] + ([reference[1]] if reference else [])))
    y_ticks = round_ticks(*_extent([y for _, _, y, _ in points] + [end for ends in intervals.values() for end in ends]))
    worst, best = (y_ticks[-1], y_ticks[0]) if lower_is_better else (y_ticks[0], y_ticks[-1])

    def across(x: float) -> float:
        return LEFT + width * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def up(y: float) -> float:
        return bottom - (bottom - top) * (y - worst) / (best - worst)

    parts = [_legend(groups, names)] if legend else []
    for tick in y_ticks:
        parts += [rule(LEFT, up(tick), LEFT + width, up(tick)), _quiet(LEFT - 8, up(tick) + 4, f"{tick:g}", "end")]
    for tick in x_ticks:
        parts += [rule(across(tick), top, across(tick), bottom), _quiet(across(tick), bottom + 18, f"{tick:g}")]
    parts.append(_quiet(LEFT + width / 2, bottom + BOTTOM - 10, x_label))
    parts.append(_quiet(12, (top + bottom) / 2, y_label, attributes=f'transform="rotate(-90 12 {(top + bottom) / 2})"'))
    if reference:
        parts.append(rule(across(reference[1]), top, across(reference[1]), bottom, opacity=0.7, dashes="5 4"))
        # On the side that has room.
        side = 5 if across(reference[1]) < LEFT + width / 2 else -5
        parts.append(_quiet(across(reference[1]) + side, bottom - 6, reference[0], "start" if side > 0 else "end"))
    if front:
        staircase = pareto_front([point[:3] for point in points], lower_is_better=lower_is_better)
        parts.append(_staircase([(across(x), up(y)) for _, x, y in staircase], LEFT + width))
    for (name, x, y, group), row in zip(points, spread([up(point[2]) for point in points], LINE, top, bottom)):
        index = colour_index(group, names)
        low, high = (up(end) for end in intervals.get(name, (y, y)))
        whisker = f'<path d="M{across(x):.1f},{low:.1f}V{high:.1f}" stroke="currentColor" stroke-width="2"/>'
        leader = f"M{across(x):.1f},{up(y):.1f}L{LEFT + width + GAP - 4},{row:.1f}"
        sign = mark(index, across(x), up(y), f"{name}: {x:.3g}, {y:.4g}")
        parts.append(
            coloured(index, [f'<path d="{leader}" stroke="currentColor" stroke-opacity="0.35"/>', whisker, sign])
        )
        parts.append(name_text(LEFT + width + GAP, row + 4, name))
    return document(LEFT + width + GAP + 6 + name_width([point[0] for point in points]), bottom + BOTTOM, title, parts)


def pareto_front(points: Sequence[Point], *, lower_is_better: bool = False) -> list[Point]:
    """Return the (name, x, y) points that no other beats, in the order of x: lower x is better, and higher y.

    lower_is_better: of y. Of points that are equal in both, the first is returned.
    """
    sign = 1 if lower_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point[1], sign * point[2])):
        if not front or sign * point[2] < sign * front[-1][2]:
            front.append(point)
    return front


def _extent(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return min(finite), max(finite)


def _staircase(points: Sequence[tuple[float, float]], right: float) -> str:
    """The best that can be had at each x, from left to right."""
    (x, y), *rest = points
    path = f"M{x:.1f},{y:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest) + f"H{right:.1f}"
    return f'<path class="front" d="{path}" fill="none" stroke="currentColor" stroke-opacity="0.5" stroke-width="1.5"/>'


def _legend(groups: Mapping[str, Sequence[Point]], names: Sequence[str]) -> str:
    parts, x = [], float(LEFT)
    for name in groups:
        index = colour_index(name, names)
        parts += [coloured(index, [mark(index, x + 4, TOP)]), text(x + 14, TOP + 4, name)]
        x += 30 + CHARACTER * len(name)
    return "".join(parts)


def _quiet(x: float, y: float, words: str, anchor: str = "middle", attributes: str = "") -> str:
    return text(x, y, words, f'text-anchor="{anchor}" {QUIET} {attributes}')
