"""Inception Score: are single pictures of clear classes, and the set of many?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from qdiff.evaluation.bootstrap import shifted_interval
from qdiff.evaluation.metrics.finite import left_out
from qdiff.evaluation.metrics.inception import inception, random_inception
from qdiff.evaluation.metrics.of_features import OfFeatures
from qdiff.evaluation.metrics.packages import optional, package
from qdiff.evaluation.metrics.registry import register
from qdiff.evaluation.metrics.statistics import chunks
from qdiff.evaluation.report import Record
from qdiff.evaluation.weights import Weights

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64

    from qdiff.evaluation.metrics.statistics import Statistics

SPLITS, SEED = 10, 2020
INTERVAL = "bootstrap over pictures of the score's first-order expansion, 2000 resamples"


@dataclass(frozen=True)
class InceptionScore(OfFeatures):
    """exp of the mean divergence of a picture's classes from those of its split (Salimans et al. 2016), 10 splits.

    At most a tenth of the number of pictures: compare only figures of as many pictures.
    """

    general = "inception-score"
    standard = "inception-score"
    higher_is_better = True
    minimum_pictures = 2 * SPLITS

    @property
    def name(self) -> str:
        label = self.features.name.removeprefix("inception").strip("-")
        return "-".join(filter(None, (self.standard, label)))

    def provenance(self) -> dict[str, str]:
        found = super().provenance()
        return found | {"score": package("torch_fidelity"), "splits": str(SPLITS), "interval": INTERVAL}

    def reduce(
        self,
        candidate: Float32[np.ndarray, "n 1008"],
        reference: Float32[np.ndarray, "m 1008"] | Statistics | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> list[Record]:
        tags, kept = tags or {}, self.kept(candidate, "candidate")
        n = int(kept.sum())
        if n < self.minimum_pictures:
            fewest = self.minimum_pictures
            raise ValueError(f"{self.name} needs {fewest} pictures or more for its {SPLITS} splits: got {n}")
        value = self._score(candidate, np.flatnonzero(kept))
        # The derivative of exp(mean divergence): that through the mean of all classes sums to zero.
        low, high = shifted_interval(value, value * _divergences(candidate, kept))
        record = Record(self.record_name, value, max(1.0, low), high, n, tags)
        return [record.sourced(self.provenance()), *left_out(self.record_name, kept, "candidate", tags)]

    def _score(self, rows: np.ndarray, places: np.ndarray) -> float:
        """As torch-fidelity shuffles and splits, with one split in memory at a time."""
        fidelity = optional("torch_fidelity.metric_isc", self.name)
        shuffled = places[np.random.RandomState(SEED).permutation(len(places))]
        ends = [split * len(places) // SPLITS for split in range(SPLITS + 1)]
        scores = []
        for start, end in itertools.pairwise(ends):
            part = torch.from_numpy(np.asarray(rows[shuffled[start:end]]))
            scores.append(fidelity.isc_features_to_metric(part, 1, False)[fidelity.KEY_METRIC_ISC_MEAN])
        return float(np.mean(scores))


def _divergences(scores: np.ndarray, kept: np.ndarray) -> Float64[np.ndarray, "n"]:
    """Kullback-Leibler divergence of each picture's classes from their mean over all pictures."""
    mean = np.log(sum(np.exp(part).sum(axis=0) for part in _logs(scores, kept)) / kept.sum())
    return np.concatenate([(np.exp(part) * (part - mean)).sum(axis=1) for part in _logs(scores, kept)])


def _logs(scores: np.ndarray, kept: np.ndarray) -> Iterator[Float64[np.ndarray, "c 1008"]]:
    """Logarithms of the classes' probabilities, some thousands of pictures at a time."""
    for chunk in chunks(scores, kept):
        yield torch.from_numpy(chunk).log_softmax(dim=1).numpy()


@register("inception-score")
def _published(weights: Weights, device: torch.device) -> InceptionScore:
    return InceptionScore(inception(weights, device, "inception-score", "legacy_tensorflow", "logits_unbiased"))


@register("inception-score-random")
def _random(weights: Weights, device: torch.device) -> InceptionScore:
    return InceptionScore(random_inception(weights, device, "inception-score-random", "logits_unbiased"))
