"""One activation step for the whole trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdiff.methods.measured_range import MeasuredRange
from qdiff.methods.registry import register


@register("static")
@dataclass(frozen=True)
class Static(MeasuredRange):
    """s = bound / levels with one bound a channel range, over all timesteps.

    estimator, percentile, k:  "minmax", "percentile", "ksigma", "mse" or "kl", as `qdiff.calibration.bounds.Estimator`.
    """

    mode: ClassVar[str] = "static"
