"""AWQ: salient weight channels, told by their activations, are scaled up before they are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdiff.methods.contract import Transform
from qdiff.methods.registry import register
from qdiff.methods.scaling import best_scaled, factors, scaled
from qdiff.methods.state import LayerState


@register("awq")
@dataclass(frozen=True)
class AWQ(Transform):
    """s = s_X^a with s_X = mean |x_j| a channel, and a = argmin over [0, 1) of ||Q(W diag(s)) (diag(s)^-1 X) - W X||.

    AWQ (arXiv 2306.00978, equations 4 and 5), a by its grid. The paper quantizes weights only; here X is quantized as
    it will be, so that the error is the layer's own, and the same as the paper's with 16-bit activations. As in its
    code, s is normalized (here to a geometric mean of one). Its clipping search is the method "clipping".

    grid: points of the search, a = 0, 1/grid, ...; 20 in the paper.
    Law: never worse than none on the samples (a = 0 is one of the points).
    """

    step: ClassVar[str] = "smooth"
    grid: int = 20

    def __post_init__(self) -> None:
        if isinstance(self.grid, bool) or not isinstance(self.grid, int) or self.grid < 2:
            raise ValueError(f"awq.grid must be an integer of at least 2: got {self.grid!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"samples"})

    def apply(self, state: LayerState) -> None:
        inputs = state.inputs()
        if inputs is None:
            return  # the layer never ran: nothing says which channels are salient
        typical = state.per_channel(inputs.abs().mean(0)).mean(1)
        points = [point / self.grid for point in range(1, self.grid)]
        best = best_scaled(state, [factors(state, typical, a, 0.0) for a in points])
        smoothed = scaled(state, best)
        state.weight, state.smooth = smoothed.weight, smoothed.smooth
