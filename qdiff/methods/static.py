"""One activation step for the whole trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from qdiff.calibration.bounds import check_estimator
from qdiff.methods.contract import ActivationRange
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState


@register("static")
@dataclass(frozen=True)
class Static(ActivationRange):
    """s = bound / 127 with one bound a channel range, over all timesteps.

    estimator:   "minmax", "percentile" or "mse", as in `qdiff.calibration.bounds`.
    percentile:  the fraction of magnitudes within the bound, for "percentile".
    """

    mode: ClassVar[str] = "static"
    estimator: str = "mse"
    percentile: float = 0.9999

    def __post_init__(self) -> None:
        check_estimator("static", self.estimator, self.percentile)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmax"} if self.estimator == "minmax" else {"absmax", "histograms"})

    def scales(self, state: LayerState) -> Float[Tensor, "1 S"]:
        return state.measured_steps(self.estimator, self.percentile, per_timestep=False)
