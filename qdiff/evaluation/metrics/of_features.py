"""Metrics over features of pictures: the part that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from qdiff.evaluation.metrics.contract import Metric, check_batch
from qdiff.evaluation.metrics.features import Features
from qdiff.evaluation.metrics.finite import finite_rows
from qdiff.evaluation.metrics.loading import loading
from qdiff.evaluation.metrics.statistics import Statistics

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, UInt8


@dataclass(frozen=True)
class OfFeatures(Metric):
    """Rows are the features of each picture."""

    features: Features

    # Names: of the metric over any features, and over the published Inception as the literature calls it.
    general: ClassVar[str]
    standard: ClassVar[str]

    @property
    def name(self) -> str:
        return self.features.metric_name(self.general, self.standard)

    @property
    def feature_key(self) -> str:
        return self.features.key

    def provenance(self) -> dict[str, str]:
        return self.features.provenance()

    def prepare(self) -> None:
        with loading(self.features.weights, self.name):
            self.features.load()

    def rows(
        self,
        candidate: UInt8[Tensor, "B 3 height width"],
        reference: UInt8[Tensor, "B 3 height width"] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Float32[Tensor, "B d"]:
        check_batch(self, candidate, reference, prompts)
        return self.features.extract(candidate)

    def kept(self, rows: Float32[np.ndarray, "n d"], whose: str) -> Bool[np.ndarray, "n"]:
        """Return which rows are finite; raises `ValueError` for rows of another width."""
        if rows.ndim != 2 or rows.shape[1] != self.features.width:
            raise ValueError(
                f"{whose} rows of {self.name} must be [pictures, {self.features.width}]: got shape {rows.shape}"
            )
        return finite_rows(rows)

    def reference_rows(self, reference: np.ndarray | Statistics | None) -> Float32[np.ndarray, "m d"]:
        """Return the rows of the reference set; raises `ValueError` where there are none."""
        if isinstance(reference, Statistics):
            raise ValueError(
                f"{self.name} compares single pictures: it needs the reference's pictures, not their statistics"
            )
        if reference is None:
            raise ValueError(f"{self.name} compares two sets of pictures: reference must be given")
        return reference


def tensor_of(rows: Float32[np.ndarray, "n d"], kept: Bool[np.ndarray, "n"]) -> Float32[Tensor, "k d"]:
    """The rows that are kept: a view where that is all of them, so that a memory map stays one."""
    chosen = rows if kept.all() else rows[kept]
    # torch has no read-only tensors.
    return torch.from_numpy(chosen if chosen.flags.writeable else np.array(chosen))
