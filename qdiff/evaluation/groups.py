"""For whom is it worse? Figures of each group of pictures, the worst one, the gap, and whether it could be chance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qdiff.evaluation.metrics.finite import finite_rows
from qdiff.evaluation.report import Record

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64, Int64

    from qdiff.evaluation.metrics.contract import Metric

# 4,999 permutations: a p-value of 0.01 is then known to 0.0014 (one standard deviation).
PERMUTATIONS = 4999
SHUFFLED_AT_ONCE = 1 << 22
TEST = f"permutation of group labels, {PERMUTATIONS} draws, sum of squares between groups"


def group_records(
    metric: Metric,
    candidate: Float32[np.ndarray, "n d"],
    groups: Sequence[str | None],
    reference: Float32[np.ndarray, "n d"] | None = None,
    tags: Mapping[str, str] | None = None,
) -> list[Record]:
    """Return the metric of each group (tag "group"), then "<name>_worst_group", "_group_gap" and "_group_p_value".

    groups: of each row; rows without one are left out, and so are rows that are not finite.  reference: rows of the
    reference's pictures of the same prompts, for metrics that compare sets, and for those that look at single pictures
    (CLIP score): then the worst group, the gap and the test are of the change from the reference.

    The p-value is of the hypothesis that the degradation is equal across groups (permutation test, Phipson & Smyth
    2010); metrics that compare sets have none. Nothing is returned for metrics whose figure depends on the number of
    pictures, or for fewer than two groups.

    Raises:
        ValueError: `groups` or `reference` has another length than `candidate`.
    """
    tags = tags or {}
    for name, other in (("groups", groups), ("reference", reference)):
        if other is not None and len(other) != len(candidate):
            raise ValueError(f"{name} must have an entry for each of {len(candidate)} rows: got {len(other)}")
    kept = finite_rows(candidate) & np.array([group is not None for group in groups])
    if reference is not None:
        kept &= finite_rows(reference)
    members = _members(groups, kept, 2 if metric.compares_sets else 1)
    if not metric.splits_by_group or len(members) < 2:
        return []
    records = [
        metric.reduce(
            _part(candidate, rows), None if reference is None else _part(reference, rows), {**tags, "group": group}
        )[0]
        for group, rows in members.items()
    ]
    if metric.compares_sets:
        return records + _spread(metric, records, tags)
    if metric.needs_reference:
        changes = candidate[:, 0].astype(np.float64)
    elif reference is not None:
        changes = candidate[:, 0].astype(np.float64) - reference[:, 0]
    else:
        return records
    means = [Record.mean(metric.record_name, changes[rows], group=group) for group, rows in members.items()]
    p_value = permutation_p_value([changes[rows] for rows in members.values()])
    n = sum(map(len, members.values()))
    test = Record(f"{metric.record_name}_group_p_value", p_value, p_value, p_value, n, tags, {"test": TEST})
    return [*records, *_spread(metric, means, tags), test]


def permutation_p_value(groups: Sequence[Float64[np.ndarray, "n"]]) -> float:
    """Return the share of label permutations that set the groups' means as far apart as they are; the same every time.

    Law: under the null hypothesis (all samples exchangeable) the probability of a value of p or less is at most p.
    """
    sizes = np.array([len(group) for group in groups])
    values = np.concatenate(groups)
    values = values - values.mean()
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    observed = _between(values[None], starts, sizes)[0]
    rng, extreme = np.random.default_rng(0), 0
    step = max(1, SHUFFLED_AT_ONCE // len(values))
    for start in range(0, PERMUTATIONS, step):
        count = min(step, PERMUTATIONS - start)
        shuffled = rng.permuted(np.broadcast_to(values, (count, len(values))), axis=1)
        # Equal up to rounding counts as equal: permutations of few distinct values repeat the observed sum.
        extreme += int((_between(shuffled, starts, sizes) >= observed * (1 - 1e-9)).sum())
    return (1 + extreme) / (1 + PERMUTATIONS)


def _between(values: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Sum of squares between groups, of values with mean zero, laid group after group."""
    return (np.add.reduceat(values, starts, axis=1) ** 2 / sizes).sum(axis=1)


def _part(rows: Float32[np.ndarray, "n d"], which: Int64[np.ndarray, "k"]) -> Float32[np.ndarray, "k d"]:
    """These rows; a view, so that a memory map stays one, where they lie one after another."""
    together = which[-1] - which[0] + 1 == len(which)
    return rows[which[0] : which[-1] + 1] if together else rows[which]


def _members(groups: Sequence[str | None], kept: np.ndarray, fewest: int) -> dict[str, Int64[np.ndarray, "k"]]:
    """Rows of each group that are kept, groups in order of their names; groups with too few are left out aloud."""
    labels = np.array([group or "" for group in groups])
    members = {group: np.flatnonzero(kept & (labels == group)) for group in sorted({g for g in groups if g})}
    small = [group for group, rows in members.items() if len(rows) < fewest]
    if small:
        warnings.warn(
            f"groups without {fewest} finite picture(s) are left out: {', '.join(map(repr, small))}", stacklevel=3
        )
    return {group: rows for group, rows in members.items() if len(rows) >= fewest}


def _spread(metric: Metric, records: Sequence[Record], tags: Mapping[str, str]) -> list[Record]:
    """The worst group's value, and how far it is from the best one's; which they are is in the provenance."""
    ordered = sorted(records, key=lambda record: record.value, reverse=not metric.higher_is_better)
    worst, best = ordered[0], ordered[-1]
    bottom, top = sorted((worst, best), key=lambda record: record.value)
    gap = top.value - bottom.value
    low = gap - math.hypot(top.value - top.low, bottom.high - bottom.value)
    high = gap + math.hypot(top.high - top.value, bottom.value - bottom.low)
    name, n = metric.record_name, sum(record.n for record in records)
    which = {"worst": worst.tags["group"], "best": best.tags["group"]}
    return [
        Record(f"{name}_worst_group", worst.value, worst.low, worst.high, worst.n, tags, which),
        Record(f"{name}_group_gap", gap, max(0.0, low), high, n, tags, which),
    ]
