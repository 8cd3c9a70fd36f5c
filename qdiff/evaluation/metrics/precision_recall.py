"""Precision and recall of one set of pictures against another: fidelity and coverage apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from qdiff.evaluation.metrics.efficientnet import efficientnet_lite0
from qdiff.evaluation.metrics.finite import left_out
from qdiff.evaluation.metrics.inception import inception
from qdiff.evaluation.metrics.of_features import OfFeatures, tensor_of
from qdiff.evaluation.metrics.packages import optional, package
from qdiff.evaluation.metrics.registry import register
from qdiff.evaluation.report import Record
from qdiff.evaluation.weights import Weights

if TYPE_CHECKING:
    from jaxtyping import Float32

    from qdiff.evaluation.metrics.statistics import Statistics

NEIGHBOURS = 3
# Distances in memory at a time, 200 MB of them, however many pictures there are; and of how many rows at most.
DISTANCES_AT_ONCE, ROWS_AT_ONCE = 50_000_000, 1000
INTERVAL = "bootstrap over pictures, 2000 resamples, the neighbourhoods held fixed"


@dataclass(frozen=True)
class PrecisionRecall(OfFeatures):
    """Share of candidates within the neighbourhood of a reference, and the reverse (Kynkaanniemi et al. 2019).

    A neighbourhood reaches to the third nearest picture of the same set. Over pooled Inception features, as Dhariwal &
    Nichol (2021) have it; the original is over VGG-16.
    """

    general = "precision-recall"
    standard = "precision-recall"
    compares_sets = True
    higher_is_better = True
    minimum_pictures = NEIGHBOURS + 1

    @property
    def record_name(self) -> str:
        return self.name.replace("precision-recall", "precision").replace("-", "_")

    def provenance(self) -> dict[str, str]:
        found = super().provenance()
        return found | {"score": package("torch_fidelity"), "neighbours": str(NEIGHBOURS), "interval": INTERVAL}

    def reduce(
        self,
        candidate: Float32[np.ndarray, "n d"],
        reference: Float32[np.ndarray, "m d"] | Statistics | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> list[Record]:
        tags, rows = tags or {}, self.reference_rows(reference)
        kept, kept_there = self.kept(candidate, "candidate"), self.kept(rows, "reference")
        if min(kept.sum(), kept_there.sum()) <= NEIGHBOURS:
            raise ValueError(
                f"{self.name} needs more than {NEIGHBOURS} pictures of both: got {kept.sum()} and {kept_there.sum()}"
            )
        fidelity = optional("torch_fidelity.metric_prc", self.name)
        found = fidelity.prc_features_to_metric(
            tensor_of(candidate, kept),
            tensor_of(rows, kept_there),
            prc_neighborhood=NEIGHBOURS,
            prc_batch_size=max(1, min(ROWS_AT_ONCE, DISTANCES_AT_ONCE // max(len(candidate), len(rows)))),
            save_cpu_ram=True,
            verbose=False,
        )
        precision, recall = found[fidelity.KEY_METRIC_PRECISION], found[fidelity.KEY_METRIC_RECALL]
        recall_name = self.record_name.replace("precision", "recall")
        return [
            _share(self.record_name, precision, int(kept.sum()), tags).sourced(self.provenance()),
            _share(recall_name, recall, int(kept_there.sum()), tags).sourced(self.provenance()),
            *left_out(self.record_name, kept, "candidate", tags),
            *left_out(self.record_name, kept_there, "reference", tags),
        ]


def _share(name: str, share: float, n: int, tags: Mapping[str, str]) -> Record:
    return Record.mean(name, np.arange(n) < round(share * n), **tags)


@register("precision-recall")
def _published(weights: Weights, device: torch.device) -> PrecisionRecall:
    return PrecisionRecall(inception(weights, device, "precision-recall"))


@register("precision-recall-efficientnet-lite0")
def _efficientnet(weights: Weights, device: torch.device) -> PrecisionRecall:
    return PrecisionRecall(efficientnet_lite0(device))
