"""Levels of least squared error: the Lloyd-Max quantizer, which is k-means in one dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff.methods.contract import RoundedWeight, Rounding
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState
from qdiff.numerics.codebooks import SortedRows, check_levels, compensated_entries, nearest_entries, to_codebook
from qdiff.recipe import LayerPlan

# From the companded start the error is within 0.1 % of its limit after 30, on Gaussian and Laplace rows.
ITERATIONS = 50


@register("lloyd_max")
@dataclass(frozen=True)
class LloydMax(Rounding):
    """Every row has its own 2^bits levels, of least importance-weighted squared error.

    Lloyd (IEEE Trans. Information Theory 28, 1982, "Method I") and Max (IRE Trans. Information Theory 6, 1960,
    equations 4 and 5), until both hold: a border lies halfway between its levels, t_i = (c_i + c_i+1) / 2, and a level
    is the mean of its cell, c_i = sum h_k w_k / sum h_k over t_i-1 < w_k <= t_i. As clustering of weights it is that of
    Deep Compression (arXiv 1510.00149, section 3, equation 2).

    What differs: h_k is the mean square of input k, where samples of it exist; levels start where a fine quantizer's
    would lie (Panter and Dite: density proportional to the cube root of the weights'), which is deterministic and ends
    lower than quantiles or even spacing; and they end as int8 times the row's scale, so that products stay in integers.
    A row has one range: the plan's groups only lay out its codes.

    feedback: codes are not each weight's nearest, but make up for one another's errors, as GPTQ's do.
    """

    feedback: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.feedback, bool):
            raise ValueError(f"lloyd_max.feedback must be true or false: got {self.feedback!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"samples", "hessian"} if self.feedback else {"samples"})

    def check(self, plan: LayerPlan) -> None:
        check_levels("lloyd_max", plan)

    def preview(self, state: LayerState) -> RoundedWeight:
        """Without feedback."""
        return LloydMax().round(state)

    def round(self, state: LayerState) -> RoundedWeight:
        rows = SortedRows.of(state.weight, state.importance())
        levels = best_levels(rows, 2**state.plan.weight_bits)
        codebook, scale = to_codebook(levels, rows.peaks)
        entries = codebook[:, : levels.shape[1]]
        hessian = state.hessian() if self.feedback else None
        if hessian is None:
            codes = nearest_entries(state.weight, entries, scale)
        else:
            codes = compensated_entries(state.weight, entries, scale, hessian, state.plan.name)
        return RoundedWeight(codes, None, scale, codebook)


def best_levels(rows: SortedRows, count: int) -> Float[Tensor, "N L"]:
    """Levels in units of the rows' peaks, ascending."""
    levels = rows.companded(count)
    for _ in range(ITERATIONS):
        weight, first, _ = rows.cells(levels)
        means = first / weight.clamp_min(torch.finfo(weight.dtype).tiny)
        levels = torch.where(weight > 0, means.float(), levels)  # a level without a cell stays where it is
    return levels
