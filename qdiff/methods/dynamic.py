"""Activation steps measured in use, a token at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdiff.methods.contract import ActivationRange
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState


@register("dynamic")
@dataclass(frozen=True)
class Dynamic(ActivationRange):
    """A step a token, s = max |x_s| / 127, computed when the layer runs.

    ZeroQuant's token-wise quantization of activations (arXiv 2206.01861). Linear layers only: a convolution's patches
    overlap and would need a scale each.
    """

    mode: ClassVar[str] = "dynamic"

    def scales(self, state: LayerState) -> None:
        return None
