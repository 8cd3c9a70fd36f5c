"""Histograms of log2 |x| per channel: streaming, mergeable, and still usable after the channels are rescaled.

A smoothing vector chosen after calibration multiplies every channel by its own factor. In log2 that is a shift of the
channel's histogram, so that percentiles and squared errors of the *smoothed* tensor need no second calibration run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

# Quarter octaves: a value is known to +-9 %; an int8 grid's squared error is flat near its optimum (see the tests).
BINS_PER_OCTAVE = 4
# From 64 times the first call's largest value, beyond which values are taken for less than they are, to four decades
# below that value: what is smaller yet is finer than a step.
OCTAVES = 19
HEADROOM_OCTAVES = 6
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
        position = (rows.float().abs().log2_() - self.low).mul_(BINS_PER_OCTAVE)
        bins = position.nan_to_num_(0).clamp_(0, BINS - 1).to(torch.int64)  # NaN is for the caller to find
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
        """Expected sum of squared errors of a grid of +-`levels` steps up to each bound; zero for a bound of zero.

        Within a bin x is taken as evenly spread, and the error of rounding and clipping integrated over it: with
        u = x / step, n = min(round(u), levels) and r = u - n, the integral of r^2 up to u is n / 12 + r^3 / 3.
        """
        used = self.weights.any(0)
        steps = bounds[..., None] / levels
        safe = torch.where(steps > 0, steps, 1.0)
        first = self.values[used] * _BELOW_MIDDLE
        lower, upper = _rounding_integral(first / safe, levels), _rounding_integral(first * _BIN_WIDTH / safe, levels)
        error = (upper - lower).mul_(safe).div_(first * (_BIN_WIDTH - 1)).mul_(steps.square())
        return torch.einsum("tcb,tb->tc", error, self.weights[:, used])

    def edges(self) -> Float[Tensor, " edges"]:
        """Of the bins, ascending: one more than there are bins."""
        return torch.cat([self.values, self.values[-1:] * _BIN_WIDTH]) * _BELOW_MIDDLE

    def mean_square(self) -> Float[Tensor, " rows"]:
        """The weighted mean of x^2; zero for a row without weight."""
        tiny = torch.finfo(torch.float32).tiny
        return self.weights @ self.values.square() / self.weights.sum(1).clamp_min(tiny)

    def density(self, bins: int) -> Float[Tensor, "rows bins"]:
        """The weight in each of `bins` equal bins from zero to absmax, of a density interpolated between the bins here.

        A density that jumped from bin to bin would have all its divergence from a quantized one at the jumps. Near zero
        it is constant: zeros, of which there may be any number, are left out, because every grid has a zero.
        """
        edges = torch.arange(bins + 1, device=self.values.device) / bins * self.absmax[:, None]
        known = torch.nn.functional.pad(self.values[FINE_BINS_PER_OCTAVE:], (1, 0))
        per_unit = (self.weights / self.values).double()[:, FINE_BINS_PER_OCTAVE:]
        per_unit = torch.cat([per_unit[:, :1], per_unit], 1)
        pieces = (per_unit[:, 1:] + per_unit[:, :-1]) / 2 * known.diff()
        place = torch.searchsorted(known, edges, right=True).clamp_(1, len(known) - 1) - 1
        inside, width = edges - known[place], known[place + 1] - known[place]
        start, end = per_unit.gather(1, place), per_unit.gather(1, place + 1)
        below = torch.nn.functional.pad(pieces.cumsum(1), (1, 0)).gather(1, place)
        below += start * inside + (end - start) * inside.square() / (2 * width)
        density, total = below.diff(dim=1).clamp_min_(0), self.weights.sum(1, keepdim=True)
        return (density * (total / density.sum(1, keepdim=True).clamp_min(1e-300))).float()


_BIN_WIDTH = 2 ** (1 / FINE_BINS_PER_OCTAVE)
_BELOW_MIDDLE = _BIN_WIDTH**-0.5
_SPREAD = FINE_BINS_PER_OCTAVE // BINS_PER_OCTAVE


def _rounding_integral(u: Tensor, levels: int) -> Tensor:
    code = u.round().clamp_(max=levels)
    return u.sub_(code).pow_(3).div_(3).add_(code, alpha=1 / 12)


def tensor_histogram(
    counts: Int32[Tensor, "rows channels bins"],
    scale: LogScale,
    channel_absmax: Float[Tensor, "rows channels"],
    factor: Float[Tensor, " channels"],
    channel_weight: Float[Tensor, " channels"],
) -> TensorHistogram:
    """The histogram of `x * factor` over all channels, a channel counting `channel_weight` times.

    A bin never stands for more than its channel's exact absmax; its weight is spread over the quarter octave it covers.
    """
    values = torch.minimum(scale.values(counts.device), channel_absmax[..., None]) * factor[:, None]
    low = math.floor(scale.low + float(factor.log2().min()))
    octaves = math.ceil(float(factor.log2().max() - factor.log2().min())) + OCTAVES + HEADROOM_OCTAVES
    bins = octaves * FINE_BINS_PER_OCTAVE
    position = ((values.log2() - low) * FINE_BINS_PER_OCTAVE).clamp_(0, bins - 2).flatten(1)
    index, weighted = position.to(torch.int64), (counts * channel_weight[:, None]).flatten(1)
    upper = weighted * (position - index)
    weights = torch.zeros(counts.shape[0], bins, device=counts.device)
    weights.scatter_add_(1, index, weighted - upper).scatter_add_(1, index + 1, upper)
    # A bin's quarter octave, whose middle lies between two fine bins: a mean over as many, two on either side.
    spread = torch.nn.functional.avg_pool1d(torch.nn.functional.pad(weights, (1, 2)), _SPREAD, stride=1)
    absmax = (channel_absmax * factor).amax(1)
    return TensorHistogram(_middles(low, bins, counts.device), _within(spread, absmax, low), absmax)


def rows_histogram(
    rows: Float[Tensor, "samples K"],
    of_row: Int64[Tensor, " samples"],
    table_rows: int,
    column_weight: Float[Tensor, " K"],
) -> TensorHistogram:
    """The same from values themselves; a table row that no sample belongs to takes its nearest neighbour's."""
    magnitudes = rows.abs()
    low = math.floor(math.log2(max(float(magnitudes.max()), torch.finfo(torch.float32).tiny))) + 1 - OCTAVES
    bins = OCTAVES * FINE_BINS_PER_OCTAVE
    index = ((magnitudes.log2() - low) * FINE_BINS_PER_OCTAVE).clamp_(0, bins - 1).to(torch.int64)
    index += of_row[:, None] * bins
    weights = torch.zeros(table_rows * bins, device=rows.device)
    weights.index_add_(0, index.flatten(), column_weight.expand_as(rows).flatten())
    absmax = torch.zeros(table_rows, device=rows.device).scatter_reduce_(0, of_row, magnitudes.amax(1), "amax")
    seen = of_row.unique()
    nearest = seen[(torch.arange(table_rows, device=rows.device)[:, None] - seen).abs().argmin(1)]
    weights, absmax = weights.view(table_rows, bins)[nearest], absmax[nearest]
    return TensorHistogram(_middles(low, bins, rows.device), weights, absmax)


def _middles(low: int, bins: int, device: torch.device) -> Float[Tensor, " bins"]:
    return torch.exp2(low + (torch.arange(bins, device=device) + 0.5) / FINE_BINS_PER_OCTAVE)


def _within(
    weights: Float[Tensor, "rows bins"], absmax: Float[Tensor, " rows"], low: int
) -> Float[Tensor, "rows bins"]:
    """What the spreading put above a row's absmax goes into the bin of its absmax."""
    bins = weights.shape[1]
    last = ((absmax.log2() - low) * FINE_BINS_PER_OCTAVE).clamp_(0, bins - 1).to(torch.int64)[:, None]
    inside = torch.arange(bins, device=weights.device) <= last
    return (weights * inside).scatter_add_(1, last, (weights * ~inside).sum(1, keepdim=True))
