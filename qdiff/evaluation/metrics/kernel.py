"""Kernel distance between two sets of pictures: KID, and the same over other features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from qdiff.evaluation.bootstrap import shifted_interval
from qdiff.evaluation.metrics.finite import ROWS_AT_ONCE, left_out
from qdiff.evaluation.metrics.of_features import OfFeatures, tensor_of
from qdiff.evaluation.metrics.packages import optional, package
from qdiff.evaluation.report import Record

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64

    from qdiff.evaluation.metrics.statistics import Statistics

# As clean-fid and torch-fidelity: 100 random subsets of at most 1,000 pictures.
SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020
# Influences are means over at most as many others: their own error is then far below that of the distance.
OTHERS = 2000
INTERVAL = "bootstrap over pictures of the distance's first-order expansion, 2000 resamples; and the draw of subsets"


@dataclass(frozen=True)
class KernelDistance(OfFeatures):
    """Squared maximum mean discrepancy, polynomial kernel of degree 3 (KID: Binkowski et al. 2018): unbiased.

    It means the same for few pictures as for many, and may be slightly negative for sets that are alike.
    """

    general = "kd"
    standard = "kid"
    compares_sets = True
    splits_by_group = True
    higher_is_better = False
    minimum_pictures = 2

    def provenance(self) -> dict[str, str]:
        found = super().provenance()
        settings = {"distance": package("torch_fidelity"), "subsets": f"{SUBSETS} of at most {SUBSET_SIZE}"}
        return found | settings | {"interval": INTERVAL}

    def reduce(
        self,
        candidate: Float32[np.ndarray, "n d"],
        reference: Float32[np.ndarray, "m d"] | Statistics | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> list[Record]:
        tags, rows = tags or {}, self.reference_rows(reference)
        kept, kept_there = self.kept(candidate, "candidate"), self.kept(rows, "reference")
        notes = left_out(self.record_name, kept, "candidate", tags)
        notes += left_out(self.record_name, kept_there, "reference", tags)
        paired = len(candidate) == len(rows) and kept.all() and kept_there.all()
        own, other = tensor_of(candidate, kept), tensor_of(rows, kept_there)
        if min(len(own), len(other)) < self.minimum_pictures:
            raise ValueError(
                f"{self.name} needs {self.minimum_pictures} pictures or more of both: got {len(own)} and {len(other)}"
            )
        value, draw_error = self._distance(own, other)
        moves = self._influences(own.numpy(), other.numpy())
        low, high = shifted_interval(value, *((moves[0] + moves[1],) if paired else moves))
        low, high = value - math.hypot(value - low, draw_error), value + math.hypot(high - value, draw_error)
        record = Record(self.record_name, value, low, high, len(own), tags)
        return [record.sourced(self.provenance()), *notes]

    def _distance(self, own: Tensor, other: Tensor) -> tuple[float, float]:
        """The distance, and the 95 % half-width that the random choice of subsets leaves it with."""
        fidelity = optional("torch_fidelity.metric_kid", self.name)
        size = min(SUBSET_SIZE, len(own), len(other))
        subsets = 1 if size == len(own) == len(other) else SUBSETS  # all subsets are the same
        found = fidelity.kid_features_to_metric(
            own, other, kid_subsets=subsets, kid_subset_size=size, rng_seed=SEED, verbose=False
        )
        error = 1.96 * found[fidelity.KEY_METRIC_KID_STD] / math.sqrt(subsets)
        return found[fidelity.KEY_METRIC_KID_MEAN], error

    def _influences(
        self, own: np.ndarray, other: np.ndarray
    ) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "m"]]:
        kernel = optional("torch_fidelity.metric_kid", self.name).kernel_poly
        first = _mean_kernel(kernel, own, own, True) - _mean_kernel(kernel, own, other, False)
        second = _mean_kernel(kernel, other, other, True) - _mean_kernel(kernel, other, own, False)
        return 2 * (first - first.mean()), 2 * (second - second.mean())


def _mean_kernel(kernel: Any, rows: np.ndarray, others: np.ndarray, same: bool) -> Float64[np.ndarray, "n"]:
    """Mean of kernel(row, other) over up to `OTHERS` others, evenly chosen; of a set with itself, over other rows."""
    chosen = np.unique(np.linspace(0, len(others) - 1, min(OTHERS, len(others))).round().astype(int))
    anchors = np.asarray(others[chosen])
    means = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = kernel(np.asarray(rows[start : start + ROWS_AT_ONCE]), anchors).astype(np.float64)
        itself = np.arange(start, start + len(block))[:, None] == chosen if same else np.zeros(block.shape, dtype=bool)
        means.append(np.where(itself, 0, block).sum(axis=1) / (~itself).sum(axis=1))
    return np.concatenate(means)
