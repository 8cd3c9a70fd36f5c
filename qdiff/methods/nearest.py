"""Nearest rounding on the two-level grid."""

from __future__ import annotations

from dataclasses import dataclass

from qdiff.methods.contract import RoundedWeight, Rounding
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState
from qdiff.numerics.two_level import fit_channel, fit_tensor, fit_two_level, round_two_level


@register("nearest")
@dataclass(frozen=True)
class Nearest(Rounding):
    """Every weight takes the nearest point of its group's grid; the grid's scale is searched.

    q = clip(round(w / (s m)), -2^(b-1), 2^(b-1) - 1), with s m = argmin sum_k E[x_k^2] (w_k - s m q_k)^2 over clip
    ratios: a range search on squared error, each input weighted by its mean square where samples of it exist (the
    diagonal of the Hessian X X^T of OBQ, arXiv 2208.11580, equation 2).

    search: off takes min-max ranges, and no weighting.
    """

    search: bool = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"samples"}) if self.search else frozenset()

    def round(self, state: LayerState) -> RoundedWeight:
        return self._round(state, quick=False)

    def preview(self, state: LayerState) -> RoundedWeight:
        return self._round(state, quick=True)

    def _round(self, state: LayerState, quick: bool) -> RoundedWeight:
        plan, weight = state.plan, state.weight
        importance = state.importance() if self.search else None
        if plan.stored_bits == 4 and plan.granularity == "group":
            scale, multipliers = fit_two_level(
                weight, plan.group_size, importance, self.search, quick, plan.weight_bits
            )
            codes = round_two_level(weight, scale, multipliers, plan.group_size, plan.weight_bits)
            return RoundedWeight(codes, multipliers, scale)
        fit = fit_tensor if plan.granularity == "tensor" else fit_channel
        # 8 bits gain little from a search, and 46 trials of it are not for comparing candidates.
        codes, multipliers, scale = fit(weight, plan.weight_bits, self.search and not quick, importance)
        return RoundedWeight(codes, multipliers if plan.stored_bits == 4 else None, scale)
