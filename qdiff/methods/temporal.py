"""An activation step for every stage of denoising: a table over the timestep's value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from qdiff.calibration.bounds import Estimator
from qdiff.methods.contract import ActivationRange
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState


@register("temporal")
@dataclass(frozen=True)
class Temporal(ActivationRange):
    """s(t) = bound(t) / levels, a bound a timestep and channel range, measured at the calibrated timesteps.

    The table of TDQ (arXiv 2306.02316, section 3.2) without its network: there s(t) is learned, here it is measured; in
    use it is interpolated at the running timestep's value. Channel ranges are those of split skip connections
    (Q-Diffusion, arXiv 2302.04304, section 4.2).

    estimator, percentile, k:  "minmax", "percentile", "ksigma", "mse" or "kl", as `qdiff.calibration.bounds.Estimator`.
    """

    mode: ClassVar[str] = "temporal"
    estimator: str = "mse"
    percentile: float = 0.9999
    k: float = 4.0

    def __post_init__(self) -> None:
        self._estimator.check("temporal")

    @property
    def _estimator(self) -> Estimator:
        return Estimator(self.estimator, self.percentile, self.k)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmax"} if self.estimator == "minmax" else {"absmax", "histograms"})

    def scales(self, state: LayerState) -> Float[Tensor, "T S"]:
        return state.measured_steps(self._estimator, per_timestep=True)

    def preview(self, state: LayerState) -> Float[Tensor, "T S"]:
        # A divergence costs ten times as much as a squared error.
        estimator = Estimator("mse") if self.estimator == "kl" else self._estimator
        return state.measured_steps(estimator, per_timestep=True)
