"""SmoothQuant: the difficulty of activations migrates into the weight, by the largest magnitudes of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdiff.methods.contract import Transform
from qdiff.methods.registry import register
from qdiff.methods.scaling import SEARCH, best_scaled, check_alpha, factors, largest_inputs, scaled
from qdiff.methods.state import LayerState

# The paper's figure 10 looks at 0.1 to 0.9: below 0.4 activations, above 0.6 weights are hard to quantize.
ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(Transform):
    """x_s = x / s, W_s = W diag(s) with s_j = max |x_j|^alpha / max |W_j|^(1 - alpha).

    SmoothQuant (arXiv 2211.10438, equations 3 and 4). Here every layer has factors of its own, which its quantizer
    applies, where the paper folds them into the normalization before it; they are scaled to a geometric mean of one,
    which changes no relative error. A convolution's W_j runs over all taps.

    alpha: a number, as in the paper (0.5; more for models with larger outliers), or "search": that of `ALPHAS`, or no
           smoothing, with the least output error on the samples.
    Law: alpha = "search" never makes that error worse.
    """

    step: ClassVar[str] = "smooth"
    alpha: float | str = 0.5

    def __post_init__(self) -> None:
        check_alpha("smoothquant", self.alpha)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmax", "samples"} if self.alpha == SEARCH else {"absmax"})

    def apply(self, state: LayerState) -> None:
        if state.statistics is None:
            return  # the layer never ran: there is nothing to smooth
        x = largest_inputs(state)
        if self.alpha == SEARCH:
            best = best_scaled(state, [factors(state, x, a, 1 - a) for a in ALPHAS])
        else:
            best = factors(state, x, float(self.alpha), 1 - float(self.alpha))
        smoothed = scaled(state, best)
        state.weight, state.smooth = smoothed.weight, smoothed.smooth
