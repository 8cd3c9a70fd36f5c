"""Per-channel smoothing: part of an activation outlier moves into the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff.methods.contract import RoundedWeight, Transform
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState

SEARCH = "search"
# Output rows that candidates are tried on: rows are alike.
TRIAL_ROWS = 96
# (statistic, a, b) of the candidates. "absmax" with b = 1 - a is SmoothQuant's line, "rms" with b = 0 is AWQ's.
GRID = (
    *(("absmax", a, 1 - a) for a in (0.35, 0.5, 0.65, 0.8)),
    *(("rms", a, 0.0) for a in (0.2, 0.35, 0.5, 0.7)),
    *(("rms", a, a) for a in (0.25, 0.5)),
)
# A channel is rescaled by at most this factor either way, lest a dead channel's noise set a weight group's range.
MAX_FACTOR = 64.0


@register("smoothing")
@dataclass(frozen=True)
class Smoothing(Transform):
    """x_s = x / l, W_s = W diag(l), with l_j = x_j^a / w_j^b a channel, scaled to a geometric mean of one.

    SmoothQuant (arXiv 2211.10438, equation 4): x_j, w_j the largest magnitudes, b = 1 - a.  AWQ (arXiv 2306.00978,
    equations 4 and 5): x_j the typical magnitude, b = 0.  SVDQuant (arXiv 2411.05007) searches both exponents.

    alpha: a number gives SmoothQuant's l with a = alpha; "search" tries both kinds of l, and none, and takes the least
           output error on the samples with weights and activations quantized.
    min_gain: the search leaves a layer alone where it takes less than this fraction off the output error's norm: such a
           gain on few samples does not carry over to others.
    Law: alpha = "search" never makes that error worse.
    """

    alpha: float | str = SEARCH
    min_gain: float = 0.03

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool) and 0 <= self.alpha <= 1
        if self.alpha != SEARCH and not number:
            raise ValueError(f"smoothing.alpha must be a number in [0, 1] or {SEARCH!r}: got {self.alpha!r}")
        if not 0 <= self.min_gain < 1:
            raise ValueError(f"smoothing.min_gain must be in [0, 1): got {self.min_gain!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmax", "samples"} if self.alpha == SEARCH else {"absmax"})

    def apply(self, state: LayerState) -> None:
        if state.statistics is None:
            return  # the layer never ran: there is nothing to smooth
        if self.alpha != SEARCH:
            candidate = smoothed(state, factors(state, "absmax", float(self.alpha), 1 - float(self.alpha)))
        else:
            candidate = self._best(state)
        state.weight, state.smooth = candidate.weight, candidate.smooth

    def _best(self, state: LayerState) -> LayerState:
        trial = state.some_rows(TRIAL_ROWS)
        candidates = [None, *(factors(state, *point) for point in GRID)]
        errors = [_error(smoothed(trial, factor), preview=True) for factor in candidates]
        best = candidates[min(range(len(errors)), key=errors.__getitem__)]
        if _error(smoothed(trial, best), preview=False) > (1 - self.min_gain) ** 2 * _error(trial, preview=False):
            best = None  # squared norms
        return smoothed(state, best)


def factors(state: LayerState, statistic: str, a: float, b: float) -> Float[Tensor, " C"]:
    """1 / l of every channel: what its activations are multiplied by."""
    if state.statistics is None:
        raise ValueError(f"{state.plan.name}: smoothing needs calibration statistics")
    x = state.statistics.channel_absmax.amax(0)
    inputs = state.inputs()
    if statistic == "rms" and inputs is not None:
        x = state.per_channel(inputs.square().mean(0)).mean(1).sqrt()
    w = state.per_channel(state.weight.abs().amax(0)).amax(1)
    alive = (x > 0) & (w > 0)
    log = torch.where(alive, a * x.clamp_min(1e-12).log2() - b * w.clamp_min(1e-12).log2(), torch.nan)
    log = (log - log.nanmean()).nan_to_num(0.0)
    return torch.exp2(-log).clamp_(1 / MAX_FACTOR, MAX_FACTOR)


def smoothed(state: LayerState, factor: Float[Tensor, " C"] | None) -> LayerState:
    """The layer with a further smoothing factor (1 / l) on its input."""
    if factor is None:
        return state
    smooth = factor if state.smooth is None else state.smooth * factor
    return state.with_weight(state.weight / state.along_k(factor), smooth=smooth)


def _error(state: LayerState, preview: bool) -> float:
    rounded: RoundedWeight = state.rounding.preview(state) if preview else state.rounding.round(state)
    return state.output_error(rounded)
