"""Asymmetric activations: the input is centred before it meets a symmetric grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from qdiff.methods.contract import Transform
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState
from qdiff.recipe import check_choice

CENTRES = ("channel", "tensor")
# Of the way to the centre that are tried: what is a token's own range is not at the centre of all of them.
SHARES = (0.25, 0.5, 0.75, 1.0)


@register("shift")
@dataclass(frozen=True)
class Shift(Transform):
    """x_s = x - c, and W c goes to the bias, with c_j = (max x_j + min x_j) / 2: x W^T = (x - c) W^T + W c.

    Outlier Suppression+ (arXiv 2304.09145), its channel-wise shifting: a centre a channel. With one centre for all
    channels it is the zero point of an asymmetric grid: codes of x - c from -127 to 127 are codes of x about c / step.
    Here c is also tried at a fraction of itself (`SHARES`) and kept where it lessens the output error on the samples.
    Zeros that a convolution pads with would move too: such layers are left alone.

    centre: "channel" or "tensor".
    Law: never worse than none on the samples.
    """

    step: ClassVar[str] = "shift"
    centre: str = "channel"

    def __post_init__(self) -> None:
        check_choice("shift.centre", self.centre, CENTRES)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"samples"})

    def apply(self, state: LayerState) -> None:
        inputs = state.raw_inputs()
        if inputs is None or state.padded or state.range is None:
            return  # never ran, or its activations stay as they are
        low, high = state.per_channel(inputs.amin(0)).amin(1), state.per_channel(inputs.amax(0)).amax(1)
        middle = (low + high) / 2 if self.centre == "channel" else ((low.amin() + high.amax()) / 2).expand_as(low)
        candidates: list[Float[Tensor, " C"] | None] = [None, *(share * middle for share in SHARES)]
        trials = [_shifted(state, shift) for shift in candidates]
        errors = [trial.output_error(state.rounding.preview(trial)) for trial in trials]
        best = trials[min(range(len(errors)), key=errors.__getitem__)]
        if best.shift is not None and best.shift.any():
            state.shift, state.bias_change = best.shift, best.bias_change


def _shifted(state: LayerState, shift: Float[Tensor, " C"] | None) -> LayerState:
    if shift is None:
        return state
    bias = state.raw_weight() @ state.along_k(shift)
    bias = bias if state.bias_change is None else bias + state.bias_change
    return state.with_weight(state.weight, shift=shift.contiguous(), bias_change=bias)
