"""How far a symmetric activation grid should reach: magnitudes beyond the bound saturate.

Each function maps a sample of values to a bound [], float32; the grid's step is bound / 127. They differ in what they
give up: a large bound makes the step coarse for every value, a small one clips the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.numerics.grids import Grid, dequantize, quantize

LEVELS = 127
# Bounds that the error search tries, as shares of the largest magnitude: 8 bits gain nothing below a twentieth of it
# even with single outliers 1e4 times the rest, because those few values then carry nearly all of the squared error.
_SHARES = tuple(1.0 - 0.01 * i for i in range(96))


def minmax_bound(values: Tensor) -> Tensor:
    """The largest magnitude: nothing saturates. 0 for no values."""
    return values.float().abs().amax() if values.numel() else torch.zeros((), device=values.device)


def percentile_bound(values: Tensor, percent: float) -> Tensor:
    """The smallest magnitude that at least `percent` of all magnitudes do not exceed; 100 is the largest one.

    Raises:
        ValueError: percent is outside (0, 100].
    """
    _check_percent(percent)
    magnitudes = values.float().abs().flatten()
    if not magnitudes.numel():
        return magnitudes.new_zeros(())
    return magnitudes.kthvalue(_rank(magnitudes.numel(), percent)).values


def histogram_percentile_bound(counts: Tensor, edges: Tensor, percent: float) -> Tensor:
    """The same from a histogram of magnitudes: the upper edge of the bin that the percentile falls in, [...] float32.

    Args:
        counts: whole numbers [..., bins], below 9e10 in all; rows without a count give 0.
        edges: [bins + 1], ascending; bin i holds magnitudes in (edges[i], edges[i + 1]].
        percent: in (0, 100].
    """
    _check_percent(percent)
    if edges.shape != (counts.shape[-1] + 1,):
        raise ValueError(
            f"edges: got {tuple(edges.shape)} for {counts.shape[-1]} bins, expected one edge more than bins"
        )
    reached = counts.long().cumsum(dim=-1)
    total = reached[..., -1:]
    needed = -(-total * round(percent * 10**6) // 10**8)
    bin_index = (reached < needed).sum(dim=-1)
    return torch.where(total[..., 0] > 0, edges.float()[1:][bin_index.clamp_max(counts.shape[-1] - 1)], 0.0)


def mse_bound(values: Tensor) -> Tensor:
    """The share of the largest magnitude that has the least mean squared error, rounding and clipping together."""
    largest = minmax_bound(values)
    if not largest > 0:
        return largest
    candidates = [largest * share for share in _SHARES]
    errors = torch.stack([_squared_error(values.float(), bound / LEVELS) for bound in candidates])
    return candidates[int(errors.argmin())]


def _squared_error(values: Tensor, step: Tensor) -> Tensor:
    grid = Grid(step, torch.zeros_like(step), -LEVELS, LEVELS)
    return (dequantize(quantize(values, grid), grid) - values).square().mean()


def _rank(count: int, percent: float) -> int:
    # In integers: 99.9 / 100 * 1000 is 998.9999... in floating point.
    return min(count, max(1, -(-count * round(percent * 10**6) // 10**8)))


def _check_percent(percent: float) -> None:
    if not 0 < percent <= 100:
        raise ValueError(f"percent: got {percent}, expected more than 0 and at most 100")
