"""What the ranges share that are read off the measured histograms, at each timestep or over all of them."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from qdiff.calibration.bounds import Estimator
from qdiff.methods.contract import ActivationRange
from qdiff.methods.state import LayerState


@dataclass(frozen=True)
class MeasuredRange(ActivationRange):
    """s = bound / levels with a bound a channel range: one a timestep where the mode is temporal, or one for all.

    estimator, percentile, k:  "minmax", "percentile", "ksigma", "mse" or "kl", as `qdiff.calibration.bounds.Estimator`.
    """

    estimator: str = "mse"
    percentile: float = 0.9999
    k: float = 4.0

    def __post_init__(self) -> None:
        self._estimator.check(self.mode)

    @property
    def _estimator(self) -> Estimator:
        return Estimator(self.estimator, self.percentile, self.k)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmax"} if self.estimator == "minmax" else {"absmax", "histograms"})

    def scales(self, state: LayerState) -> Float[Tensor, "rows S"]:
        return state.measured_steps(self._estimator, per_timestep=self.mode == "temporal")

    def preview(self, state: LayerState) -> Float[Tensor, "rows S"]:
        # A divergence costs ten times as much as a squared error.
        estimator = Estimator("mse") if self.estimator == "kl" else self._estimator
        return state.measured_steps(estimator, per_timestep=self.mode == "temporal")
