"""The page's charts: quality against its price, drift over the steps, and groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qdiff.evaluation.chart import line_chart
from qdiff.evaluation.intervals import interval_chart
from qdiff.evaluation.page.measures import GROUPS, LIKENESS, measure_of, probability
from qdiff.evaluation.page.sheet import Sheet
from qdiff.evaluation.report import Record
from qdiff.evaluation.scatter import scatter_chart

# What stands for quality on the price charts: the first of these that was measured.
QUALITIES = ("lpips_alex", "psnr_db", "ssim", "fid", "latent_relative_error")
# The kinds of price, each by the first of its records that was measured: name, factor, axis.
PRICES: tuple[Mapping[str, tuple[float, str]], ...] = (
    {
        "stored_bytes": (1e-6, "MB stored for the denoiser"),
        "disk_bytes": (1e-6, "MB on disk"),
    },
    {"seconds_per_image": (1.0, "seconds an image"), "seconds_per_step": (1.0, "seconds a step")},
)
DRIFT = "drift/"
GROUP_CHARTS = 3


def price_charts(sheet: Sheet) -> list[str]:
    """Return quality against bytes and against speed, with the Pareto front, where both were measured."""
    quality = next((name for name in QUALITIES if any(_drawn(sheet, name))), None)
    charts = [_price_chart(sheet, quality, price) for price in PRICES] if quality else []
    return [chart for chart in charts if chart]


def _price_chart(sheet: Sheet, quality: str, prices: Mapping[str, tuple[float, str]]) -> str:
    price = next((name for name in prices if any(_drawn(sheet, name))), None)
    if price is None:
        return ""
    (factor, axis), measure = prices[price], measure_of(quality)
    points, intervals = {}, {}
    for candidate in sheet.candidates:
        x, y = sheet.record(price, candidate), sheet.record(quality, candidate)
        if x and y and math.isfinite(y.value):
            points[candidate] = [(candidate, x.value * factor, y.value)]
            if math.isfinite(y.low) and math.isfinite(y.high):
                intervals[candidate] = (y.low, y.high)
    reference = sheet.record(price, sheet.reference)
    return (
        ""
        if not points
        else scatter_chart(
            points,
            title=f"{measure.title} against {'bytes' if 'bytes' in price else 'time'}",
            x_label=axis,
            y_label=measure.label,
            names=sheet.candidates,
            intervals=intervals,
            lower_is_better=measure.better == "lower",
            front=True,
            reference=(sheet.reference, reference.value * factor) if reference else None,
        )
    )


def drift_charts(sheet: Sheet) -> list[str]:
    """Return the latents' error after each step, where it is finite; runs of different lengths have a chart each."""
    by_length: dict[int, dict[str, list[float]]] = {}
    for candidate in sheet.candidates:
        values = sheet.report.series.get(DRIFT + candidate, ())
        if values and all(map(math.isfinite, values)):
            by_length.setdefault(len(values), {})[candidate] = [100 * value for value in values]
    return [
        line_chart(
            series,
            title="Latents against the reference's",
            x_label="denoising step",
            y_label="relative error, %",
            names=sheet.candidates,
        )
        for series in by_length.values()
    ]


def drift_findings(sheet: Sheet) -> list[str]:
    """Return a sentence for each candidate whose latents did not stay finite, which no line can show."""
    sentences = []
    for candidate in sheet.candidates:
        values = sheet.report.series.get(DRIFT + candidate, ())
        step = next((step for step, value in enumerate(values, 1) if not math.isfinite(value)), None)
        if step is not None:
            sentences.append(f"{candidate}: not finite from step {step} on.")
    return sentences


def group_charts(sheet: Sheet) -> list[tuple[str, list[str]]]:
    """Return up to three charts of a measure for each group, each with what the permutation test says of it."""
    names = [name for name in sheet.grouped_names if measure_of(name).family != GROUPS]
    names.sort(key=lambda name: measure_of(name).family != LIKENESS)
    charts: list[tuple[str, list[str]]] = []
    for name in names:
        rows = _worst_first(sheet.groups(name), name)
        if rows and len(charts) < GROUP_CHARTS:
            measure = measure_of(name)
            label = f"{measure.label}, {'more' if measure.better == 'higher' else 'less'} is better"
            svg = interval_chart(rows, title=f"{measure.title} by group", x_label=label, names=sheet.candidates)
            charts.append((svg, group_findings(sheet, name)))
    return charts


def group_findings(sheet: Sheet, name: str) -> list[str]:
    """Return a sentence a candidate: the worst group, the gap, and how often chance alone makes one as large."""
    sentences = []
    for candidate in sheet.candidates:
        gap, p_value = (sheet.record(f"{name}_{part}", candidate) for part in ("group_gap", "group_p_value"))
        if gap:
            worst = f" ({gap.provenance['worst']})" if "worst" in gap.provenance else ""
            chance = f", {chance_of(p_value)}" if p_value else ""
            between = f"{measure_of(name).value(gap.value)} between the best and the worst group"
            sentences.append(f"{candidate}: {between}{worst}{chance}.")
    return sentences


def chance_of(p_value: Record) -> str:
    """Return a p-value as an equation."""
    written = probability(p_value.value)
    return f"p {written}" if written.startswith("<") else f"p = {written}"


def _worst_first(
    groups: Mapping[str, Mapping[str, Record]], name: str
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Finite intervals of each group, the worst group first."""
    rows = {
        f"{group} ({next(iter(records.values())).n:,})": {
            candidate: (record.value, record.low, record.high)
            for candidate, record in records.items()
            if all(map(math.isfinite, (record.value, record.low, record.high)))
        }
        for group, records in groups.items()
    }
    sign = 1 if measure_of(name).better == "higher" else -1

    def mean(row: Mapping[str, tuple[float, float, float]]) -> float:
        return sign * sum(interval[0] for interval in row.values()) / len(row)

    return dict(sorted(((group, row) for group, row in rows.items() if row), key=lambda item: mean(item[1])))


def _drawn(sheet: Sheet, name: str) -> Sequence[bool]:
    records = [sheet.record(name, candidate) for candidate in sheet.candidates]
    return [record is not None and math.isfinite(record.value) for record in records]
