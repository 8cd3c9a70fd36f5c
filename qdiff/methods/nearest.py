"""Nearest rounding on the two-level grid."""

from __future__ import annotations

from dataclasses import dataclass

from qdiff.methods.contract import RoundedWeight, Rounding
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState
from qdiff.methods.weight_grid import WeightGrid


@register("nearest")
@dataclass(frozen=True)
class Nearest(Rounding):
    """Every weight takes the nearest point of its group's grid; the grid's scale is searched.

    q = clip(round(w / (s m)), -2^(b-1), 2^(b-1) - 1), with s m = argmin sum_k E[x_k^2] (w_k - s m q_k)^2 over clip
    ratios: a range search on squared error, each input weighted by its mean square where samples of it exist (the
    diagonal of X X^T, half the Hessian of OBQ, arXiv 2208.11580).

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
        importance = state.importance() if self.search else None
        grid = WeightGrid.fit(state.plan, state.weight, importance, self.search, quick)
        return grid.rounded(grid.nearest(state.weight))
