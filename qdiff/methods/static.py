"""One activation step for the whole trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from qdiff.calibration.bounds import Estimator
from qdiff.methods.contract import ActivationRange
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState


@register("static")
@dataclass(frozen=True)
class Static(ActivationRange):
    """s = bound / levels with one bound a channel range, over all timesteps.

    estimator, percentile, k:  "minmax", "percentile", "ksigma", "mse" or "kl", as `qdiff.calibration.bounds.Estimator`.
    """

    mode: ClassVar[str] = "static"
    estimator: str = "mse"
    percentile: float = 0.9999
    k: float = 4.0

    def __post_init__(self) -> None:
        self._estimator.check("static")

    @property
    def _estimator(self) -> Estimator:
        return Estimator(self.estimator, self.percentile, self.k)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmax"} if self.estimator == "minmax" else {"absmax", "histograms"})

    def scales(self, state: LayerState) -> Float[Tensor, "1 S"]:
        return state.measured_steps(self._estimator, per_timestep=False)

    def preview(self, state: LayerState) -> Float[Tensor, "1 S"]:
        # A divergence costs ten times as much as a squared error.
        estimator = Estimator("mse") if self.estimator == "kl" else self._estimator
        return state.measured_steps(estimator, per_timestep=False)
