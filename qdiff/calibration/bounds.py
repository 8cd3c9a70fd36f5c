"""From the histogram of a layer's input to the largest magnitude that its integer grid should represent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff.calibration.histogram import TensorHistogram
from qdiff.recipe import check_choice

ESTIMATORS = ("minmax", "percentile", "mse", "ksigma", "kl")
# Clip ratios tried by "mse" and "kl": down to 0.05 of absmax (of outliers thirty times the rest, with few bits), in
# steps that the flat optimum does not feel (see the tests).
CLIP_RATIOS = tuple(0.97**exponent for exponent in range(99))
# Bins of equal width of "kl": as in TensorRT.
KL_BINS = 2048


@dataclass(frozen=True)
class Estimator:
    """How far a symmetric grid should reach. Law: never beyond the largest magnitude seen, and zero only where it is.

    name:        "minmax" (the largest magnitude), "percentile", "ksigma" (k standard deviations about zero, where the
                 grid's centre is), "mse" (least expected squared error), or "kl" (least divergence).
    percentile:  the fraction of magnitudes within the bound, for "percentile".
    k:           for "ksigma".
    """

    name: str
    percentile: float = 0.9999
    k: float = 4.0

    def check(self, owner: str) -> None:
        """Raise `ValueError` for an unknown estimator, a percentile that is no fraction in (0, 1], or k <= 0."""
        check_choice(f"{owner}.estimator", self.name, ESTIMATORS)
        if not 0 < self.percentile <= 1:
            raise ValueError(
                f"{owner}.percentile must be a fraction in (0, 1]: got {self.percentile!r}; 99.99 % is 0.9999"
            )
        if not 0 < self.k < float("inf"):
            raise ValueError(f"{owner}.k must be a positive number of standard deviations: got {self.k!r}")

    def bound(self, histogram: TensorHistogram, levels: int) -> Float[Tensor, " rows"]:
        """The bound of every row, float32; the grid has +-`levels` steps up to it."""
        if self.name == "minmax":
            return histogram.absmax
        if self.name == "percentile":
            return histogram.percentile(self.percentile)
        if self.name == "ksigma":
            return torch.minimum(self.k * histogram.mean_square().sqrt(), histogram.absmax)
        return (
            least_squares_bound(histogram, levels) if self.name == "mse" else least_divergence_bound(histogram, levels)
        )


def least_squares_bound(histogram: TensorHistogram, levels: int) -> Float[Tensor, " rows"]:
    """The clip of absmax with the least expected squared error, by a search over `CLIP_RATIOS`."""
    candidates = histogram.absmax[:, None] * torch.tensor(CLIP_RATIOS, device=histogram.absmax.device)
    error = histogram.squared_error(candidates, levels)
    return candidates.gather(1, error.argmin(1, keepdim=True))[:, 0]


def least_divergence_bound(histogram: TensorHistogram, levels: int) -> Float[Tensor, " rows"]:
    """The clip of absmax at which the quantized distribution tells most of the true one: min KL(P || Q).

    TensorRT's calibration (S. Migacz, "8-bit inference with TensorRT", GTC 2017): P is the histogram up to the bound,
    with everything beyond in its last bin; Q has levels + 1 values, each spread evenly over the bins of P that it
    stands for, those of P that are empty left out. Here the bins of P are made from bins of log2 |x|.
    """
    p = histogram.density(KL_BINS)
    columns = [_divergence(p, max(levels + 1, round(ratio * KL_BINS)), levels + 1) for ratio in CLIP_RATIOS]
    best = torch.stack(columns, 1).argmin(1)
    return histogram.absmax * torch.tensor(CLIP_RATIOS, device=p.device)[best]


def _divergence(p: Float[Tensor, "rows bins"], kept: int, values: int) -> Float[Tensor, " rows"]:
    inside = p[:, :kept]
    clipped = inside.clone()
    clipped[:, -1] += p[:, kept:].sum(1)
    group = (torch.arange(kept, device=p.device) * values // kept).expand_as(inside)
    filled = (inside > 0).float()
    sums = p.new_zeros(len(p), values).scatter_add_(1, group, inside)
    counts = p.new_zeros(len(p), values).scatter_add_(1, group, filled)
    q = (sums / counts.clamp_min(1)).gather(1, group) * filled
    # An empty bin of Q where P has its clipped weight: not infinite, but worse than any other candidate.
    tiny = torch.finfo(torch.float32).tiny
    p_share, q_share = (x / x.sum(1, keepdim=True).clamp_min(tiny) for x in (clipped, q))
    return torch.special.xlogy(p_share, p_share / q_share.clamp_min(tiny)).sum(1)
