"""What roundings share that learn the levels of a row: the 16-entry codebook, and how codes are chosen from it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from qdiff.methods.contract import RoundedWeight, Rounding
from qdiff.methods.state import LayerState
from qdiff.numerics.codebooks import SortedRows, check_levels, compensated_entries, nearest_entries, to_codebook
from qdiff.recipe import LayerPlan


@dataclass(frozen=True)
class LearnedLevels(Rounding):
    """Every row has its own 2^bits levels, which end as int8 times the row's scale; groups only lay out its codes.

    feedback: codes are not each weight's nearest, but make up for one another's errors, as GPTQ's do.
    """

    name: ClassVar[str]
    feedback: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.feedback, bool):
            raise ValueError(f"{self.name}.feedback must be true or false: got {self.feedback!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"samples", "hessian"} if self.feedback else {"samples"})

    def check(self, plan: LayerPlan) -> None:
        check_levels(self.name, plan)

    @abstractmethod
    def levels(self, rows: SortedRows, bits: int) -> Float[Tensor, "N L"]:
        """The 2^bits levels of every row, in units of its peak, ascending."""

    def preview(self, state: LayerState) -> RoundedWeight:
        """Without feedback."""
        return self._rounded(state, None)

    def round(self, state: LayerState) -> RoundedWeight:
        return self._rounded(state, state.hessian() if self.feedback else None)

    def _rounded(self, state: LayerState, hessian: Float[Tensor, "K K"] | None) -> RoundedWeight:
        rows = SortedRows.of(state.weight, state.importance())
        levels = self.levels(rows, state.plan.weight_bits)
        codebook, scale = to_codebook(levels, rows.peaks)
        entries = codebook[:, : levels.shape[1]]
        if hessian is None:
            codes = nearest_entries(state.weight, entries, scale)
        else:
            codes = compensated_entries(state.weight, entries, scale, hessian, state.plan.name)
        return RoundedWeight(codes, None, scale, codebook)
