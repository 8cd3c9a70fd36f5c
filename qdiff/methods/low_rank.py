"""Low-rank outlier absorption: a thin 16-bit branch takes what 4 bits represent worst."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff.methods.contract import Transform
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState, LowRankBranch
from qdiff.numerics.packing import storage_block

# Of the randomized range finder with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061): eight spare
# directions and three iterations leave a residual within 1 % of the SVD's, even of a random matrix (see the tests).
SPARE = 8
POWER_ITERATIONS = 3


@register("low_rank")
@dataclass(frozen=True)
class LowRank(Transform):
    """y = Q(x_s) Q(R) + (x_s L1) L2 with W_s ~ L1 L2 + R: the branch takes the weight's largest singular directions.

    SVDQuant (arXiv 2411.05007, equations 5 and 6 of its section 4): L1 L2 = SVD_r(W_s), then SVD_r(W_s - Q(R)) again
    and again, keeping the best output error. The SVD is weighted by the inputs' root mean square, so that it minimizes
    the output's error rather than the weight's (the activation-induced scale of L2QER, arXiv 2402.02446). Linear layers
    only.

    rank:        of the branch; None: as large as `budget` allows.
    budget:      the branch's bytes over those of the 4-bit layer.
    iterations:  of W_s - Q(R).
    min_gain:    the branch has to earn its bytes: it is dropped where it takes less than this fraction off the output
                 error's norm.
    """

    step: ClassVar[str] = "low_rank"
    rank: int | None = None
    budget: float = 0.10
    iterations: int = 4
    min_gain: float = 0.05

    def __post_init__(self) -> None:
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"low_rank.rank must be a positive integer or None: got {self.rank!r}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"low_rank.budget must be in (0, 1]: got {self.budget!r}")
        if not 0 <= self.min_gain < 1:
            raise ValueError(f"low_rank.min_gain must be in [0, 1): got {self.min_gain!r}")
        if self.iterations < 1:
            raise ValueError(f"low_rank.iterations must be at least 1: got {self.iterations!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"samples"})

    def apply(self, state: LayerState) -> None:
        rank = self.rank_of(state)
        if state.plan.kind != "linear" or rank < 1:
            return
        without = state.output_error(state.rounding.preview(state))
        error, best = min(self._candidates(state, rank), key=lambda candidate: candidate[0])
        if error <= without * (1 - self.min_gain) ** 2:  # squared norms
            state.weight, state.low_rank = best.weight, best.low_rank

    def rank_of(self, state: LayerState) -> int:
        """The rank asked for, or what the budget pays for, at two bytes a number; at most the smaller side."""
        out_features, in_features = state.weight.shape
        if self.rank is not None:
            return min(self.rank, out_features, in_features)
        blocks = in_features // storage_block(state.plan.group_size) if state.plan.stored_bits == 4 else 0
        layer_bytes = out_features * (in_features * state.plan.stored_bits / 8 + (blocks + 1) // 2 + 4)
        return int(self.budget * layer_bytes / (2 * (out_features + in_features)))

    def _candidates(self, state: LayerState, rank: int) -> list[tuple[float, LayerState]]:
        """The branch after every iteration, with its output error."""
        importance = state.importance()
        balance = torch.ones_like(state.weight[0]) if importance is None else importance.sqrt().clamp_min_(1e-6)
        target, candidates = state.weight, []
        for _ in range(self.iterations):
            down, up = leading_part(target * balance, rank)
            # What the branch loses in the precision it is stored in is left to the 4-bit part.
            stored = (matrix.to(state.branch_dtype).float() for matrix in (down / balance, up))
            branch = LowRankBranch(*stored)
            candidate = state.with_weight(state.weight - branch.up @ branch.down, low_rank=branch)
            rounded = candidate.rounding.preview(candidate)
            candidates.append((candidate.output_error(rounded), candidate))
            target = state.weight - rounded.dequantize()
        return candidates


def leading_part(matrix: Float[Tensor, "N K"], rank: int) -> tuple[Float[Tensor, "r K"], Float[Tensor, "N r"]]:
    """(down, up) with up @ down the best approximation of that rank; their norms balanced. Deterministic."""
    columns = min(rank + SPARE, *matrix.shape)
    start = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, singular, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = singular[:rank].sqrt()
    return right[:rank] * root[:, None], (basis @ left[:, :rank]) * root
