"""An activation step for every stage of denoising: a table over the timestep's value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdiff.methods.measured_range import MeasuredRange
from qdiff.methods.registry import register


@register("temporal")
@dataclass(frozen=True)
class Temporal(MeasuredRange):
    """s(t) = bound(t) / levels, a bound a timestep and channel range, measured at the calibrated timesteps.

    The table of TDQ (arXiv 2306.02316) without its network: there s(t) is learned, here it is measured; in use it is
    interpolated at the running timestep's value. Channel ranges are those of split skip connections (Q-Diffusion, arXiv
    2302.04304, section 3.3.2, equations 6 to 8).

    estimator, percentile, k:  "minmax", "percentile", "ksigma", "mse" or "kl", as `qdiff.calibration.bounds.Estimator`.
    """

    mode: ClassVar[str] = "temporal"
