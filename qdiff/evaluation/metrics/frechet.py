"""Frechet distance between two sets of pictures: FID, and the same over other features."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qdiff.evaluation.bootstrap import shifted_interval
from qdiff.evaluation.metrics.finite import left_out
from qdiff.evaluation.metrics.gaussian_influence import influences
from qdiff.evaluation.metrics.of_features import OfFeatures
from qdiff.evaluation.metrics.packages import optional, package
from qdiff.evaluation.metrics.statistics import Statistics
from qdiff.evaluation.report import Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32

INTERVAL = "bootstrap over pictures of the distance's first-order expansion, 2000 resamples"


@dataclass(frozen=True)
class FrechetDistance(OfFeatures):
    """Distance between Gaussian fits of two sets' features (Dowson & Landau 1982; FID: Heusel et al. 2017).

    It is biased upwards for few pictures. Fewer pictures than features leave a covariance singular: the distance is
    still given, with a warning that goes with the record. Pictures of the same prompt and seed are resampled together.
    """

    general = "fd"
    standard = "fid"
    compares_sets = True
    higher_is_better = False
    minimum_pictures = 2

    def reduce(
        self,
        candidate: Float32[np.ndarray, "n d"],
        reference: Float32[np.ndarray, "m d"] | Statistics | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> list[Record]:
        tags, kept = tags or {}, self.kept(candidate, "candidate")
        own = Statistics.of_rows(candidate, self.feature_key, kept=kept)
        notes = left_out(self.record_name, kept, "candidate", tags)
        if isinstance(reference, Statistics):
            self.check_statistics(reference)
            other = reference
            moves = influences(own, other, (candidate, kept))
        else:
            rows = self.reference_rows(reference)
            kept_there = self.kept(rows, "reference")
            other = Statistics.of_rows(rows, self.feature_key, kept=kept_there)
            notes += left_out(self.record_name, kept_there, "reference", tags)
            moves = influences(own, other, (candidate, kept), (rows, kept_there))
            if len(rows) == len(candidate):
                moves = (_over_all(moves[0], kept) + _over_all(moves[1], kept_there),)
        value = self._distance(own, other)
        low, high = shifted_interval(value, *moves)
        record = Record(self.record_name, value, max(0.0, low), high, own.n, tags)
        about = self.provenance() | dict(other.provenance if not other.feature_key else {})
        return [record.sourced(about | self._caution(own, other)), *notes]

    def provenance(self) -> dict[str, str]:
        found = super().provenance()
        return found | {"distance": package("torch_fidelity"), "interval": INTERVAL}

    def check_statistics(self, reference: Statistics) -> None:
        """Raise `ValueError` unless these are, as far as they say it, statistics of this metric's features."""
        if reference.feature_key:
            reference.require(self.feature_key, self.name)
        elif not self.name.startswith(self.standard) or len(reference.mean) != self.features.width:
            raise ValueError(
                f"published statistics of {len(reference.mean)} features are of the published Inception: "
                f"{self.name} compares {self.features.width} others; use fid, fid-legacy-pytorch or "
                "fid-legacy-tensorflow, whichever they were made with"
            )

    def _distance(self, own: Statistics, other: Statistics) -> float:
        fidelity = optional("torch_fidelity.metric_fid", self.name)
        moments = [{"mu": part.mean, "sigma": part.covariance} for part in (own, other)]
        return float(fidelity.fid_statistics_to_metric(*moments, verbose=False)[fidelity.KEY_METRIC_FID])

    def _caution(self, own: Statistics, other: Statistics) -> dict[str, str]:
        fewest = min(part.n for part in (own, other) if part.n)
        if fewest > self.features.width:
            return {}
        text = (
            f"{fewest} pictures are too few for {self.features.width} features: the covariance is singular and the "
            f"distance biased upwards; compare only with figures of as many pictures"
        )
        warnings.warn(f"{self.name}: {text}", stacklevel=3)
        return {"warning": text}


def _over_all(influence: np.ndarray, kept: Bool[np.ndarray, "n"]) -> np.ndarray:
    """Spread influences of the kept pictures over all of them: those left out have none."""
    spread = np.zeros(len(kept))
    spread[kept] = (influence - influence.mean()) * (len(kept) / kept.sum())
    return spread
