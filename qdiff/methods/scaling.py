"""What the methods that scale input channels share: x_s = x * factor, W_s = W / factor, and the trial of candidates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff.methods.state import LayerState

SEARCH = "search"
# Output rows that candidates are tried on: rows are alike.
TRIAL_ROWS = 96
# A channel is rescaled by at most this factor either way, lest a dead channel's noise set a weight group's range.
MAX_FACTOR = 64.0


def check_alpha(method: str, alpha: float | str) -> None:
    """Raise `ValueError` for an exponent that is neither a number in [0, 1] nor to be searched."""
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0 <= alpha <= 1
    if alpha != SEARCH and not number:
        raise ValueError(f"{method}.alpha must be a number in [0, 1] or {SEARCH!r}: got {alpha!r}")


def largest_inputs(state: LayerState) -> Float[Tensor, " C"]:
    """max |x_j| of every channel of what is quantized so far: exact, or of the samples where x was shifted or split."""
    if state.statistics is None:
        raise ValueError(f"{state.plan.name}: scaling channels needs calibration statistics")
    inputs = state.inputs() if state.shift is not None or state.index is not None else None
    if inputs is not None:
        return state.per_channel(inputs.abs().amax(0)).amax(1)
    absmax = state.statistics.channel_absmax.amax(0)
    absmax = absmax if state.index is None else absmax[state.index]
    return absmax if state.smooth is None else absmax * state.smooth


def factors(state: LayerState, x: Float[Tensor, " C"], a: float, b: float) -> Float[Tensor, " C"]:
    """1 / l of every channel, with l_j = x_j^a / w_j^b scaled to a geometric mean of one; w_j = max |W_j|."""
    w = state.per_channel(state.weight.abs().amax(0)).amax(1)
    alive = (x > 0) & (w > 0)
    log = torch.where(alive, a * x.clamp_min(1e-12).log2() - b * w.clamp_min(1e-12).log2(), torch.nan)
    log = (log - log.nanmean()).nan_to_num(0.0)
    return torch.exp2(-log).clamp_(1 / MAX_FACTOR, MAX_FACTOR)


def scaled(state: LayerState, factor: Float[Tensor, " C"] | None) -> LayerState:
    """The layer with a further factor on its input; None changes nothing."""
    if factor is None:
        return state
    smooth = factor if state.smooth is None else state.smooth * factor
    return state.with_weight(state.weight / state.along_k(factor), smooth=smooth)


def best_scaled(
    state: LayerState, candidates: Iterable[Float[Tensor, " C"]], min_gain: float = 0.0
) -> Float[Tensor, " C"] | None:
    """The factor with the least output error on the samples, weights and activations quantized; None if none helps.

    Candidates are tried with the rounding's preview, and the best of them against no factor with the rounding itself:
    it has to take a fraction `min_gain` off the error's norm.
    """
    trial = state.some_rows(TRIAL_ROWS)
    tried = [None, *candidates]
    errors = [_error(scaled(trial, factor), preview=True) for factor in tried]
    best = tried[min(range(len(errors)), key=errors.__getitem__)]
    gained = _error(scaled(trial, best), preview=False) <= (1 - min_gain) ** 2 * _error(trial, preview=False)
    return best if gained else None  # squared norms


def _error(state: LayerState, preview: bool) -> float:
    return state.output_error(state.rounding.preview(state) if preview else state.rounding.round(state))
