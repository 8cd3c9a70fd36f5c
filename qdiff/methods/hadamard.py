"""Group-wise Hadamard rotation: every outlier is spread over the channels around it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from qdiff.methods.contract import Transform
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState
from qdiff.numerics.input_pipeline import rotate


@register("hadamard")
@dataclass(frozen=True)
class Hadamard(Transform):
    """x_s = x Q, W_s = W Q with Q = diag(signs) H / sqrt(b) on every b neighbouring channels: x_s W_s^T = x W^T.

    QuaRot (arXiv 2404.00456, section 3.1 and equation 4; the randomized Hadamard matrix of QuIP#, arXiv 2402.04396).
    Where one channel of a block stands out, its value over sqrt(b) is the largest after it. Data-free: the signs are
    random, the same in every layer. QuaRot rotates the whole width and hides most rotations in the weights around them;
    here each layer rotates its own input in use, in blocks, which costs one small product. Of a convolution the
    channels of each tap are rotated; padding stays zero.

    block: b, a power of two. Where it does not divide the layer's channels (each segment's), the largest that does.
    """

    step: ClassVar[str] = "rotation"
    block: int = 64

    def __post_init__(self) -> None:
        size = self.block
        if isinstance(size, bool) or not isinstance(size, int) or size < 2 or size & (size - 1) or size > 1024:
            raise ValueError(f"hadamard.block must be a power of two from 2 to 1024: got {size!r}")

    def apply(self, state: LayerState) -> None:
        block = math.gcd(self.block, *state.segments)
        if block == 1:
            return  # an odd number of channels
        signs = torch.randint(0, 2, (block,), generator=torch.Generator().manual_seed(0)) * 2 - 1
        state.rotation = signs.to(state.weight.device, torch.int8)
        state.weight = rotate(state.weight, state.rotation)
