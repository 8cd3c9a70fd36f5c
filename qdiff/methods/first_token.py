"""The first text token of cross-attention, kept apart: a huge outlier that is the same for every prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdiff.methods.contract import Transform
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState


@register("first_token")
@dataclass(frozen=True)
class FirstToken(Transform):
    """y_0 = W x_0 + b, computed once in full precision; ranges and errors are of the other tokens alone.

    MixDQ (arXiv 2405.17873), its "BOS-aware quantization": the text encoder's first token attends to nothing but
    itself, so that it is the same for every prompt, and reaches a hundred times the others' magnitude. The paper names
    the layers; here calibration finds them: linear layers of [batch, tokens, C] whose first token is the same in all
    samples and calls. In use each first token is compared with the stored one, so that another (of an image adapter,
    say) is computed as any token is. Other layers are left alone.

    With a range a token (dynamic) this one's outliers never met the others: what is gained there is its own error.
    """

    step: ClassVar[str] = "first_token"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"first_token"})

    def apply(self, state: LayerState) -> None:
        value = None if state.statistics is None else state.statistics.first_token
        if value is not None and state.plan.kind == "linear":
            state.first_token = value, state.raw_weight() @ value
