"""Convolution weights as matrices.

The input axis K of the matrix runs over (segment, tap, channel of the segment): taps are the kernel's positions, row
major; segments are the channel ranges that have their own activation scale (a concatenated skip connection has two). A
linear layer is the case of one segment and one tap. The weights of one segment are thus one contiguous block, whose
product with that segment's patches is one integer product; and with a group size that divides every segment no group
crosses a tap or a segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_gemm(weight: Tensor, segments: Sequence[int]) -> Tensor:
    """Weight [N, C] or [N, C, kh, kw] to the matrix [N, C * kh * kw]; `from_gemm` is its inverse."""
    if sum(segments) != weight.shape[1]:
        raise ValueError(
            f"segments: {tuple(segments)} sum to {sum(segments)}, expected {weight.shape[1]} input channels"
        )
    if weight.dim() == 2:
        return weight
    return torch.cat([part.permute(0, 2, 3, 1).flatten(1) for part in weight.split(list(segments), dim=1)], dim=1)


def from_gemm(matrix: Tensor, segments: Sequence[int], kernel: tuple[int, int]) -> Tensor:
    """Matrix [N, C * kh * kw] to the convolution weight [N, C, kh, kw]."""
    taps = kernel[0] * kernel[1]
    parts = matrix.split([taps * channels for channels in segments], dim=1)
    shaped = (part.unflatten(1, (*kernel, -1)).permute(0, 3, 1, 2) for part in parts)
    return torch.cat(list(shaped), dim=1)


def widen_segments(matrix: Tensor, segments: Sequence[int], widths: Sequence[int], taps: int = 1) -> Tensor:
    """[..., C * taps] with zeros after the channels of every segment, up to its new width.

    For weight matrices and, with one tap, NHWC images: where both are widened, their convolution stays the same.
    """
    out = matrix.new_zeros(*matrix.shape[:-1], taps * sum(widths))
    parts = matrix.split([taps * channels for channels in segments], dim=-1)
    rooms = out.split([taps * width for width in widths], dim=-1)
    for part, room, channels, width in zip(parts, rooms, segments, widths):
        room.unflatten(-1, (taps, width))[..., :channels] = part.unflatten(-1, (taps, channels))
    return out


def channels_to_gemm(values: Tensor, segments: Sequence[int], taps: int) -> Tensor:
    """Per-channel values [C] to the K axis [C * taps]: each segment's channels repeated for every tap."""
    return torch.cat([part.repeat(taps) for part in values.split(list(segments))])
