"""Histograms of log2 |x| per channel: streaming, mergeable, and still usable after the channels are rescaled.

A smoothing vector chosen after calibration multiplies every channel by its own factor. In log2 that is a shift of the
channel's histogram, so that percentiles and squared errors of the *smoothed* tensor need no second calibration run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor

# Quarter octaves: a value is known to +-9 %; an int8 grid's squared error is flat near its optimum (see the tests).
BINS_PER_OCTAVE = 4
# Sixteen octaves below eight times the first call's largest value: four decades above what an int8 step can see.
OCTAVES = 16
HEADROOM_OCTAVES = 3
BINS = BINS_PER_OCTAVE * OCTAVES
# The tensor's histogram after rescaling, finer, so that shifts by a fraction of a bin survive.
FINE_BINS_PER_OCTAVE = 16


@dataclass(frozen=True)
class LogScale:
    """Where a layer's bins lie: b holds |x| in [2^(low + b/4), 2^(low + (b+1)/4)); the ends take what is beyond."""

    low: float

    @classmethod
    def around(cls, absmax: float) -> LogScale:
        """The scale of a layer whose first activations reach `absmax`."""
        top = math.ceil(math.log2(absmax)) if absmax > 0 else 0
        return cls(low=float(top + HEADROOM_OCTAVES - OCTAVES))

    def count(self, rows: Float[Tensor, "rows channels"]) -> Int32[Tensor, "channels bins"]:
        """How many of each channel's values fall in each bin."""
        channels = rows.shape[1]
        bins = (rows.float().abs().log2_() - self.low).mul_(BINS_PER_OCTAVE).clamp_(0, BINS - 1).to(torch.int64)
        bins += torch.arange(channels, device=rows.device) * BINS
        return bins.flatten().bincount(minlength=channels * BINS).view(channels, BINS).to(torch.int32)

    def values(self, device: torch.device) -> Float[Tensor, " bins"]:
        """The |x| that stands for each bin: its geometric middle."""
        return torch.exp2(self.low + (torch.arange(BINS, device=device) + 0.5) / BINS_PER_OCTAVE)


@dataclass(frozen=True)
class TensorHistogram:
    """Weighted counts of |x| over the rows of a table (timesteps, or one row), one tensor a row.

    values: float32 [bins], ascending.  weights: float32 [rows, bins].  absmax: float32 [rows], exact.
    """

    values: Float[Tensor, " bins"]
    weights: Float[Tensor, "rows bins"]
    absmax: Float[Tensor, " rows"]

    def percentile(self, q: float) -> Float[Tensor, " rows"]:
        """The smallest bound with at least a fraction `q` of the weight at or below it; at most absmax."""
        cumulative = self.weights.cumsum(1)
        enough = cumulative >= q * cumulative[:, -1:]
        return torch.minimum(self.values[enough.to(torch.int8).argmax(1)], self.absmax)

    def squared_error(self, bounds: Float[Tensor, "rows candidates"], levels: int) -> Float[Tensor, "rows candidates"]:
        """Expected sum of squared errors of a grid of +-`levels` steps up to each bound.

        Inside: step^2 / 12, or x^2 where that is less (x rounds to zero).  Outside: (|x| - bound)^2.
        """
        steps = bounds / levels
        x = self.values
        clipping = (x - bounds[..., None]).clamp_min_(0).square_()
        rounding = torch.minimum(steps.square()[..., None] / 12, x.square())
        error = torch.where(x > bounds[..., None], clipping, rounding)
        return torch.einsum("tcb,tb->tc", error, self.weights)


def tensor_histogram(
    counts: Int32[Tensor, "rows channels bins"],
    scale: LogScale,
    channel_absmax: Float[Tensor, "rows channels"],
    factor: Float[Tensor, " channels"],
    channel_weight: Float[Tensor, " channels"],
) -> TensorHistogram:
    """The histogram of `x * factor` over all channels, a channel counting `channel_weight` times.

    A bin never stands for more than its channel's exact absmax.
    """
    values = torch.minimum(scale.values(counts.device), channel_absmax[..., None]) * factor[:, None]
    low = math.floor(scale.low + float(factor.log2().min()))
    octaves = math.ceil(float(factor.log2().max() - factor.log2().min())) + OCTAVES + HEADROOM_OCTAVES
    bins = octaves * FINE_BINS_PER_OCTAVE
    index = ((values.log2() - low) * FINE_BINS_PER_OCTAVE).clamp_(0, bins - 1).to(torch.int64).flatten(1)
    weights = torch.zeros(counts.shape[0], bins, device=counts.device)
    weights.scatter_add_(1, index, (counts * channel_weight[:, None]).flatten(1))
    middles = torch.exp2(low + (torch.arange(bins, device=counts.device) + 0.5) / FINE_BINS_PER_OCTAVE)
    return TensorHistogram(middles, weights, (channel_absmax * factor).amax(1))
