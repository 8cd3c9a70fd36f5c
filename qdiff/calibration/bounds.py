"""From a layer's statistics to the largest magnitude its int8 grid should represent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff.calibration.histogram import TensorHistogram
from qdiff.calibration.statistics import LayerStatistics
from qdiff.numerics.ranges import LEVELS as ACTIVATION_LEVELS
from qdiff.recipe import check_choice

ESTIMATORS = ("minmax", "percentile", "mse")
# Clip ratios tried by "mse": down to 0.15 of absmax, in steps that the flat optimum does not feel (see the tests).
CLIP_RATIOS = tuple(0.97**exponent for exponent in range(63))


def check_estimator(owner: str, estimator: str, percentile: float) -> None:
    """Raise `ValueError` for an unknown estimator, or a percentile that is no fraction in (0, 1]."""
    check_choice(f"{owner}.estimator", estimator, ESTIMATORS)
    if not 0 < percentile <= 1:
        raise ValueError(f"{owner}.percentile must be a fraction in (0, 1]: got {percentile!r}; 99.99 % is 0.9999")


def activation_bounds(
    statistics: LayerStatistics,
    segments: Sequence[int],
    estimator: str,
    per_timestep: bool,
    smooth: Float[Tensor, " channels"] | None = None,
    channel_weight: Float[Tensor, " channels"] | None = None,
    percentile: float = 0.9999,
) -> Float[Tensor, "rows segments"]:
    """The clipping bound of x * smooth for every channel range: float32 [T, S], or [1, S] for all timesteps at once.

    estimator:       "minmax" (the largest magnitude), "percentile", or "mse" (least expected squared error).
    channel_weight:  float32 [C], what a squared error in each channel does to the output; for percentile and mse.
    Law: a bound is never above the largest magnitude seen, and is zero only where that is.
    """
    check_estimator("range", estimator, percentile)
    if estimator == "minmax":
        absmax = statistics.absmax(segments, smooth)
        return absmax if per_timestep else absmax.amax(0, keepdim=True)
    columns, start = [], 0
    for channels in segments:
        part = slice(start, start + channels)
        histogram = statistics.histogram(part, smooth, channel_weight, per_timestep)
        columns.append(
            histogram.percentile(percentile) if estimator == "percentile" else least_squares_bound(histogram)
        )
        start += channels
    return torch.stack(columns, 1).to(statistics.channel_absmax.device)


def least_squares_bound(histogram: TensorHistogram) -> Float[Tensor, " rows"]:
    """The clip of absmax with the least expected squared error, by a search over `CLIP_RATIOS`."""
    ratios = torch.tensor(CLIP_RATIOS, device=histogram.absmax.device)
    candidates = histogram.absmax[:, None] * ratios
    error = histogram.squared_error(candidates, ACTIVATION_LEVELS)
    return candidates.gather(1, error.argmin(1, keepdim=True))[:, 0]
