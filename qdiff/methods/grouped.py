"""Timesteps in groups, an activation step a group: the partition with the least quantization error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff.calibration.histogram import TensorHistogram
from qdiff.methods.contract import ActivationRange
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState

# Ratio of neighbouring bounds that groups choose from: the flat optimum does not feel it, as in the "mse" estimator.
SPACING = 0.97
# The least bound tried, as a share of the smallest absmax of a timestep.
LOWEST = 0.05


@register("grouped")
@dataclass(frozen=True)
class Grouped(ActivationRange):
    """s(t) = s_g for all t of group g, with groups and steps that minimize sum_t E[(x - Q(x; s_g(t)))^2] / E[x^2].

    ADP-DM (arXiv 2305.18723; APQ-DM in its last version), its group-wise quantization functions: every timestep is
    assigned to one of them. There all of them quantize, weighted by importances that add up to one, which are trained
    together with the steps and an entropy term that drives all but one to zero. Here groups are stretches of
    neighbouring timesteps, because ranges move slowly over time, and the best of all such partitions is found exactly,
    by dynamic programming over the measured histograms. Every timestep counts by its relative error. Each channel range
    of a split skip has a partition of its own.

    A table like that of "temporal", constant within a group; between the last timestep of a group and the first of the
    next the running layer interpolates, as it does with every table.

    groups: how many; no more are made than there are timesteps. With one, a static range; with all, a temporal one.
    """

    mode: ClassVar[str] = "temporal"
    groups: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"grouped.groups must be a positive whole number: got {self.groups!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmax", "histograms"})

    @property
    def least_timesteps(self) -> int:
        return self.groups

    def scales(self, state: LayerState) -> Float[Tensor, "T S"]:
        levels = state.plan.activation_levels
        bounds = [self._bounds(histogram, levels) for histogram in state.input_histograms(per_timestep=True)]
        table = torch.stack(bounds, 1) / levels
        return torch.where(table > 0, table, 1.0).to(state.weight.device)

    def _bounds(self, histogram: TensorHistogram, levels: int) -> Float[Tensor, " T"]:
        """The bound of each timestep's group; zero where nothing was ever but zero."""
        silent = histogram.absmax == 0
        if silent.all():
            return histogram.absmax
        candidates = _candidates(histogram.absmax[~silent])
        error = histogram.squared_error(candidates.expand(len(silent), -1), levels)
        energy = histogram.mean_square() * histogram.weights.sum(1)
        errors = error / torch.where(energy > 0, energy, 1.0)[:, None]
        bounds = torch.zeros_like(histogram.absmax)
        for first, end, best in partition(errors.double(), self.groups):
            bounds[first:end] = candidates[best]
        return bounds


def _candidates(absmax: Float[Tensor, " T"]) -> Float[Tensor, " candidates"]:
    largest, smallest = absmax.max(), absmax.min() * LOWEST
    count = int((torch.log(smallest / largest) / torch.log(torch.tensor(SPACING))).ceil()) + 1
    return largest * SPACING ** torch.arange(count)


def partition(errors: Float[Tensor, "T candidates"], groups: int) -> list[tuple[int, int, int]]:
    """The stretches [first, end) of rows, at most `groups`, and the one column of each, with the least sum of errors.

    Law: exact. cost[i, j] = min_c sum_{i <= t < j} errors[t, c]; best[g, j] = min_i best[g - 1, i] + cost[i, j].
    """
    steps = len(errors)
    sums = torch.cat([errors.new_zeros(1, errors.shape[1]), errors.cumsum(0)])
    cost, column = (sums[None] - sums[:, None]).min(2)
    cost = cost.masked_fill(torch.ones(steps + 1, steps + 1).tril().bool(), torch.inf)
    best, cuts = cost[0], []
    for _ in range(min(groups, steps) - 1):
        best, cut = (best[:, None] + cost).min(0)
        cuts.append(cut)
    found, end = [], steps
    for cut in reversed(cuts):
        first = int(cut[end])
        found.append((first, end, int(column[first, end])))
        end = first
    return [(0, end, int(column[0, end])), *reversed(found)]
