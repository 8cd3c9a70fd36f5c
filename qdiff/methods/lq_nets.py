"""Levels that are sums and differences of a learned basis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff.methods.learned_levels import LearnedLevels
from qdiff.methods.registry import register
from qdiff.numerics.codebooks import SortedRows

# The alternation stops at the nearest local optimum, of which there are many: after a few iterations from this many
# bases the best goes on. Twice as many take less than 2 % off the squared error, on layers of emoji-sd and emoji-dit;
# from a basis of even spacing, 2^i s, it ends up to a third higher.
STARTS, TRIAL_ITERATIONS, ITERATIONS = 32, 10, 40
# Elements of the largest basis to start from, over the row's root mean square.
LARGEST_START = 1.5
# Pulls the basis to where it was, relative to the weight of all: a solution where B B^T has none.
RIDGE = 1e-6


@register("lq_nets")
@dataclass(frozen=True)
class LQNets(LearnedLevels):
    """Every row has a basis v in R^bits; its levels are v^T b for all b in {-1, 1}^bits.

    LQ-Nets (arXiv 1807.10029), its quantization error minimization: min over v, B of ||B^T v - w||^2, by turns
        b_k = the code whose level is nearest to w_k        (borders halfway between neighbouring levels)
        v = (B H B^T)^-1 B H w                              (least squares)

    What differs: H, diagonal, holds the mean square of each input where samples of it exist; v is fitted to trained
    weights, once, not kept as a moving average in training; of many starts the best is kept; the levels end as int8
    times the row's scale. A row has one range: the plan's groups only lay out its codes.

    feedback: codes are not each weight's nearest, but make up for one another's errors, as GPTQ's do.
    """

    name: ClassVar[str] = "lq_nets"

    def levels(self, rows: SortedRows, bits: int) -> Float[Tensor, "N L"]:
        codes = signs(bits, rows.values.device)
        starts = torch.rand(STARTS, bits, generator=torch.Generator().manual_seed(0), dtype=codes.dtype)
        trials = rows.rms()[:, None, None] * (LARGEST_START * starts).to(codes.device)
        trials = alternated(rows, trials, codes, TRIAL_ITERATIONS)
        best = rows.error(levels_of(trials, codes)).argmin(1)
        chosen = trials[torch.arange(len(best), device=best.device), best]
        return levels_of(alternated(rows, chosen, codes, ITERATIONS), codes)


def signs(bits: int, device: torch.device) -> Float[Tensor, "L bits"]:
    """Every b in {-1, 1}^bits, counting up: bit i of the row's number."""
    numbers = torch.arange(2**bits, device=device)[:, None]
    return ((numbers >> torch.arange(bits, device=device) & 1) * 2 - 1).double()


def levels_of(basis: Float[Tensor, "*N bits"], codes: Float[Tensor, "L bits"]) -> Float[Tensor, "*N L"]:
    """v^T b for every b, ascending."""
    return (basis @ codes.T).sort(-1).values.float()


def alternated(
    rows: SortedRows, basis: Float[Tensor, "*N bits"], codes: Float[Tensor, "L bits"], iterations: int
) -> Float[Tensor, "*N bits"]:
    """The basis, or several a row, after some of the paper's iterations."""
    bits = codes.shape[1]
    ridge = RIDGE * torch.eye(bits, dtype=codes.dtype, device=codes.device)
    # b b^T of every code, flat: B H B^T is one product with the weights of all cells.
    squares = (codes[:, :, None] * codes[:, None]).flatten(1)
    for _ in range(iterations):
        levels, order = (basis @ codes.T).sort(-1)
        of_level = rows.cells(levels.float())[:2]
        weight, first = torch.empty_like(of_level).scatter_(-1, order.expand_as(of_level), of_level)  # of every code
        gram = (weight @ squares).unflatten(-1, (bits, bits)) + ridge
        basis = torch.linalg.solve(gram, first @ codes + RIDGE * basis)
    return basis
