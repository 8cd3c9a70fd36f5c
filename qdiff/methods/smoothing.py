"""Per-channel smoothing: part of an activation outlier moves into the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdiff.methods.contract import Transform
from qdiff.methods.registry import register
from qdiff.methods.scaling import SEARCH, best_scaled, check_alpha, factors, largest_inputs, scaled
from qdiff.methods.state import LayerState

# (statistic, a, b) of the candidates. "absmax" with b = 1 - a is SmoothQuant's line, "rms" with b = 0 is AWQ's.
GRID = (
    *(("absmax", a, 1 - a) for a in (0.35, 0.5, 0.65, 0.8)),
    *(("rms", a, 0.0) for a in (0.2, 0.35, 0.5, 0.7)),
    *(("rms", a, a) for a in (0.25, 0.5)),
)


@register("smoothing")
@dataclass(frozen=True)
class Smoothing(Transform):
    """x_s = x / l, W_s = W diag(l), with l_j = x_j^a / w_j^b a channel, scaled to a geometric mean of one.

    SmoothQuant (arXiv 2211.10438, equation 4): x_j, w_j the largest magnitudes, b = 1 - a.  AWQ (arXiv 2306.00978,
    equations 4 and 5): x_j the typical magnitude, b = 0.  SVDQuant (arXiv 2411.05007) searches both exponents. The
    methods "smoothquant" and "awq" are each paper's own line; this one searches both.

    alpha: a number gives SmoothQuant's l with a = alpha; "search" tries both kinds of l, and none, and takes the least
           output error on the samples with weights and activations quantized.
    min_gain: the search leaves a layer alone where it takes less than this fraction off the output error's norm: such a
           gain on few samples does not carry over to others.
    Law: alpha = "search" never makes that error worse.
    """

    step: ClassVar[str] = "smooth"
    alpha: float | str = SEARCH
    min_gain: float = 0.03

    def __post_init__(self) -> None:
        check_alpha("smoothing", self.alpha)
        if not 0 <= self.min_gain < 1:
            raise ValueError(f"smoothing.min_gain must be in [0, 1): got {self.min_gain!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmax", "samples"} if self.alpha == SEARCH else {"absmax"})

    def apply(self, state: LayerState) -> None:
        if state.statistics is None:
            return  # the layer never ran: there is nothing to smooth
        x = {"absmax": largest_inputs(state)}
        if self.alpha != SEARCH:
            best = factors(state, x["absmax"], float(self.alpha), 1 - float(self.alpha))
        else:
            inputs = state.inputs()
            square = x["absmax"].square() if inputs is None else state.per_channel(inputs.square().mean(0)).mean(1)
            x["rms"] = square.sqrt()
            candidates = [factors(state, x[statistic], a, b) for statistic, a, b in GRID]
            found = best_scaled(state, candidates, self.min_gain)
            if found is None:
                return
            best = found
        smoothed = scaled(state, best)
        state.weight, state.smooth = smoothed.weight, smoothed.smooth
