"""Metrics that are a mean over pictures, each with a figure of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from qdiff.evaluation.metrics.contract import Metric
from qdiff.evaluation.metrics.finite import finite_rows, left_out
from qdiff.evaluation.report import Record

if TYPE_CHECKING:
    from jaxtyping import Float32

    from qdiff.evaluation.metrics.statistics import Statistics

INTERVAL = "percentile bootstrap over pictures, 2000 resamples"


class PerPicture(Metric):
    """Rows are one number a picture; the record is their mean with its bootstrap interval."""

    splits_by_group = True

    def reduce(
        self,
        candidate: Float32[np.ndarray, "n 1"],
        reference: Float32[np.ndarray, "m 1"] | Statistics | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> list[Record]:
        tags = tags or {}
        kept = finite_rows(candidate)
        if not kept.any():
            raise ValueError(f"{self.name} has no finite figure among {len(candidate)} pictures: nothing to average")
        mean = Record.mean(self.record_name, candidate[kept, 0], **tags)
        provenance = {**self.provenance(), "interval": INTERVAL}
        return [mean.sourced(provenance), *left_out(self.record_name, kept, "candidate", tags)]
