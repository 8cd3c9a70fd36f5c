"""What a layer does to its input before it is quantized, and what that makes of its weight.

    x_s = ((x - shift)[index] * smooth) Q        Q block diagonal: diag(signs) H / sqrt(b), H a Hadamard matrix

Each of the four steps may be missing. For every weight W_s of x_s there is one of the raw input x, up to a bias:
x_s @ W_s.T = x @ fold(W_s).T - shift @ fold(W_s).T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qdiff.numerics.gemm_layout import channels_to_gemm


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(size): float32 [size, size], symmetric and its own inverse."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"size: got {size}, expected a power of two")
    with torch.inference_mode(False):  # it outlives the caller's mode
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / size**0.5).to(device)


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """x Q: the last axis in blocks of b, each times diag(signs) H / sqrt(b). signs: [b] of +-1. Float32."""
    block = len(signs)
    return (x.unflatten(-1, (-1, block)) * signs.float() @ hadamard(block, x.device)).flatten(-2)


def unrotate(x: Tensor, signs: Tensor) -> Tensor:
    """x Q^T, the inverse of `rotate`."""
    block = len(signs)
    return (x.unflatten(-1, (-1, block)).float() @ hadamard(block, x.device) * signs).flatten(-2)


@dataclass(frozen=True)
class InputPipeline:
    """The four steps of one layer, each None where it is missing.

    shift: float32 [C].  index: int64 [C'].  smooth: float32 [C'].  rotation: int8 [b], b divides every segment.
    C' = C without an index; with one the layer has a single segment.
    """

    shift: Tensor | None = None
    index: Tensor | None = None
    smooth: Tensor | None = None
    rotation: Tensor | None = None

    def channels(self, x: Tensor) -> Tensor:
        """x [..., C] to x_s [..., C'], in float32."""
        x = x.float()
        if self.shift is not None:
            x = x - self.shift
        if self.index is not None:
            x = x.index_select(-1, self.index)
        if self.smooth is not None:
            x = x * self.smooth
        return x if self.rotation is None else rotate(x, self.rotation)

    def rows(self, rows: Tensor, segments: Sequence[int], taps: int, shifted: bool = True) -> Tensor:
        """The same of rows [R, K] in GEMM layout, of raw segments; `shifted` off leaves out the shift."""
        if self.shift is not None and shifted:
            rows = rows - channels_to_gemm(self.shift, segments, taps)
        if self.index is not None:
            rows = rows.unflatten(-1, (taps, -1)).index_select(-1, self.index).flatten(-2)
        if self.smooth is not None:
            rows = rows * channels_to_gemm(self.smooth, self.segments(segments), taps)
        # K is made of whole blocks: channels of one tap and segment are neighbours.
        return rows if self.rotation is None else rotate(rows, self.rotation)

    def fold(self, weight: Tensor, segments: Sequence[int], taps: int) -> Tensor:
        """The weight [N, K] of the raw input that acts as `weight` [N, K'] does on x_s, but for the shift's bias."""
        if self.rotation is not None:
            weight = unrotate(weight, self.rotation)
        if self.smooth is not None:
            weight = weight * channels_to_gemm(self.smooth, self.segments(segments), taps)
        if self.index is not None:
            split = weight.unflatten(-1, (taps, -1))
            whole = split.new_zeros(*split.shape[:-1], sum(segments))
            weight = whole.index_add_(-1, self.index, split).flatten(-2)
        return weight

    def segments(self, raw: Sequence[int]) -> tuple[int, ...]:
        """The channel counts of x_s for those of the raw input."""
        return tuple(raw) if self.index is None else (len(self.index),)
