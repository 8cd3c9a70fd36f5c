"""int8 activations with given scales, one a sample and channel segment."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qdiff.numerics.ranges import LEVELS
from qdiff.ops import _quantize_cuda
from qdiff.ops.backend import refuses_levels, runs_kernel
from qdiff.ops.checks import (
    CHECKED,
    FLOAT32,
    FLOATS,
    check_divides,
    check_levels,
    check_segments,
    check_tensor,
    kind_of_call,
    remember,
)
from qdiff.ops.registry import operator
from qdiff.ops.row_blocks import row_blocks

_SMALLEST_SCALE = 1e-30


def _fake(
    x: Tensor,
    scale: Tensor,
    smooth: Tensor | None,
    segments: Sequence[int],
    channel_dim: int,
    levels: int = LEVELS,
) -> Tensor:
    return _empty_codes(x, channel_dim)


@operator(_fake)
def quantize_per_sample(
    x: Tensor,
    scale: Tensor,
    smooth: Tensor | None,
    segments: Sequence[int],
    channel_dim: int,
    levels: int = LEVELS,
) -> Tensor:
    """Quantize x * smooth to int8 with scales that were measured beforehand.

    code = clamp(round(x * r), -levels, levels), half to even, with r[b, c] = smooth[c] / scale[b, segment of c] in
    float32: values beyond the range saturate. It should be the case that |x * smooth - code * scale| <= scale / 2
    (1 + 2^-14) inside the range.

    Args:
        x: float32, float16 or bfloat16 [B, ...], any strides.
        scale: float32 [R, S], not negative, with R dividing B; row r holds for samples r B/R to (r + 1) B/R - 1.
        smooth: float32 [C], the reciprocal smoothing vector, or None for ones.
        segments: S channel counts that sum to C.
        channel_dim: the dimension of x that has the C channels: not 0.
        levels: the largest code, 1 to 127: 2^(b - 1) - 1 for b bits. The kernels know 127 only.

    Returns:
        codes int8 of x's shape; contiguous, in channels-last order when x is [B, C, H, W] with channel_dim 1.
    """
    kind = kind_of_call("quantize_per_sample", (x, scale, smooth), tuple(segments), channel_dim, levels)
    known = CHECKED.get(kind)
    if known is None:
        check_samples(x, scale, smooth, segments, channel_dim)
        check_levels(levels)
        known = remember(kind)
    if runs_kernel("quantize_per_sample", x, refuses_levels(levels)):
        return _quantize_cuda.quantize_per_sample(known, x, scale, smooth, segments, channel_dim)
    codes = _empty_codes(x, channel_dim)
    shape = [x.shape[0]] + [1] * (x.dim() - 1)
    shape[channel_dim] = x.shape[channel_dim]
    factors = _factors(x.shape[0], scale, smooth, segments).view(shape)
    for block in row_blocks(x.shape[0], 4 * x.shape[1:].numel(), x.device, at_least=1):
        v = (x[block] * factors[block]).round_().clamp_(-levels, levels)
        # Cast in x's own order first: where the codes are channels-last and x is not, it is bytes that are transposed.
        codes[block] = v.to(torch.int8)
    return codes


def _factors(batch: int, scale: Tensor, smooth: Tensor | None, segments: Sequence[int]) -> Tensor:
    # [batch, C]. A channel that never fired in calibration may have scale 0; its reciprocal must not make 0 * inf.
    step = torch.cat([column[:, None].expand(-1, width) for column, width in zip(scale.unbind(1), segments)], dim=1)
    step = step.clamp_min(_SMALLEST_SCALE)
    factors = step.reciprocal() if smooth is None else smooth / step
    return factors.repeat_interleave(batch // max(1, scale.shape[0]), dim=0)


def _empty_codes(x: Tensor, channel_dim: int) -> Tensor:
    image = x.dim() == 4 and channel_dim in (1, -3)
    order = torch.channels_last if image else torch.contiguous_format
    return torch.empty(x.shape, dtype=torch.int8, device=x.device, memory_format=order)


def check_samples(x: Tensor, scale: Tensor, smooth: Tensor | None, segments: Sequence[int], channel_dim: int) -> None:
    """Raise a ValueError unless `x` can be quantized with these scales."""
    if x.dtype not in FLOATS or x.dim() < 2:
        raise ValueError(
            f"x: got {x.dtype} {tuple(x.shape)}, expected a float tensor [B, ...] with a channel dimension"
        )
    if not channel_dim % x.dim() > 0 or not -x.dim() <= channel_dim < x.dim():
        raise ValueError(
            f"channel_dim: got {channel_dim} for x {tuple(x.shape)}, expected a dimension other than the batch"
        )
    channels = x.shape[channel_dim]
    check_segments(segments, channels)
    rows = scale.shape[0] if scale.dim() else None
    check_tensor("scale", scale, FLOAT32, (rows, len(segments)), x.device)
    check_divides("scale", scale.shape[0], x.shape[0])
    if smooth is not None:
        check_tensor("smooth", smooth, FLOAT32, (channels,), x.device)
