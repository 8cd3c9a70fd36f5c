"""The grid that a rounding method chooses codes on: uniform, as the plan of the layer says."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from qdiff.methods.contract import RoundedWeight
from qdiff.methods.state import LayerState
from qdiff.numerics.two_level import codes_of, fit_channel, fit_tensor, fit_two_level
from qdiff.recipe import LayerPlan


@dataclass(frozen=True)
class WeightGrid:
    """w[n, k] ~ steps[n, k] * q[n, k] with steps = scale[n] * multipliers[n, group of k] and low <= q <= high.

    scale: float32 [N], positive.  multipliers: uint8 [N, G] in [1, 15], or None for ones.
    """

    scale: Float[Tensor, " N"]
    multipliers: UInt8[Tensor, "N G"] | None
    low: int
    high: int

    @classmethod
    def fit(
        cls,
        plan: LayerPlan,
        weight: Float[Tensor, "N K"],
        importance: Float[Tensor, " K"] | None = None,
        search: bool = True,
        quick: bool = False,
    ) -> WeightGrid:
        """The grid on which nearest codes err least, each input's error weighted by its importance (ones without)."""
        if plan.stored_bits == 4 and plan.granularity == "group":
            scale, multipliers = fit_two_level(weight, plan.group_size, importance, search, quick, plan.weight_bits)
        else:
            fit = fit_tensor if plan.granularity == "tensor" else fit_channel
            # 5 bits and more gain little from a search, and 46 trials of it are not for comparing candidates.
            _, multipliers, scale = fit(weight, plan.weight_bits, search and not quick, importance)
        low, high = codes_of(plan.weight_bits)
        return cls(scale, multipliers if plan.stored_bits == 4 else None, low, high)

    def steps(self, inputs: int) -> Float[Tensor, "N K"]:
        """The step of each of `inputs` weights a row."""
        if self.multipliers is None:
            return self.scale[:, None].expand(-1, inputs)
        return (self.scale[:, None] * self.multipliers).repeat_interleave(inputs // self.multipliers.shape[1], 1)

    def nearest(self, weight: Float[Tensor, "N K"]) -> Int8[Tensor, "N K"]:
        """The nearest codes, half to even."""
        return (weight / self.steps(weight.shape[1])).round_().clamp_(self.low, self.high).to(torch.int8)

    def rescaled(self, ratio: Float[Tensor, " N"]) -> WeightGrid:
        """The same with every row's scale times so much."""
        return dataclasses.replace(self, scale=self.scale * ratio)

    def rounded(self, codes: Int8[Tensor, "N K"]) -> RoundedWeight:
        """Codes on this grid."""
        return RoundedWeight(codes, self.multipliers, self.scale)


def quick_nearest(state: LayerState) -> RoundedWeight:
    """The nearest codes, of a quick search: what costly roundings have transforms tried with.

    Which transform is best hardly depends on the rounding.
    """
    grid = WeightGrid.fit(state.plan, state.weight, state.importance(), quick=True)
    return grid.rounded(grid.nearest(state.weight))
