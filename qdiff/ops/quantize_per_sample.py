"""int8 activations with given scales, one a sample and channel segment."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qdiff.ops.checks import FLOATS, check_divides, check_segments, check_tensor

LEVELS = 127


@torch.library.custom_op("qdiff::quantize_per_sample", mutates_args=())
def quantize_per_sample(
    x: Tensor, scale: Tensor, smooth: Tensor | None, segments: Sequence[int], channel_dim: int
) -> Tensor:
    """Quantize x * smooth to int8 with scales that were measured beforehand.

    code = clamp(round(x * r), -127, 127), half to even, with r[b, c] = smooth[c] / scale[b, segment of c] in float32:
    values beyond the range saturate. It should be the case that |x * smooth - code * scale| <= scale / 2 (1 + 2^-14)
    inside the range.

    Args:
        x: float32, float16 or bfloat16 [B, ...], any strides.
        scale: float32 [R, S], positive, with R dividing B; row r holds for samples r B/R to (r + 1) B/R - 1.
        smooth: float32 [C], the reciprocal smoothing vector, or None for ones.
        segments: S channel counts that sum to C.
        channel_dim: the dimension of x that has the C channels: not 0.

    Returns:
        codes int8 of x's shape; contiguous, in channels-last order when x is [B, C, H, W] with channel_dim 1.
    """
    _check(x, scale, smooth, segments, channel_dim)
    factors = _factors(scale, smooth, segments)
    per_row = x.shape[0] // max(1, factors.shape[0])
    codes = _empty_codes(x, channel_dim)
    shape = [1] * (x.dim() - 1)
    shape[channel_dim % x.dim() - 1] = -1
    for b in range(x.shape[0]):
        _quantize_into(codes[b], x[b], factors[b // per_row].view(shape))
    return codes


def _factors(scale: Tensor, smooth: Tensor | None, segments: Sequence[int]) -> Tensor:
    counts = torch.tensor(segments, device=scale.device)
    step = scale.repeat_interleave(counts, dim=1, output_size=sum(segments))
    return step.reciprocal() if smooth is None else smooth / step


def _quantize_into(codes: Tensor, x: Tensor, factor: Tensor) -> None:
    v = (x * factor).round_().clamp_(-LEVELS, LEVELS)
    if v.dim() == 3 and not codes.is_contiguous():
        # Cast in x's order first: transposing bytes is a quarter of the traffic of transposing floats.
        v = v.to(torch.int8)
    codes.copy_(v)


def _empty_codes(x: Tensor, channel_dim: int) -> Tensor:
    image = x.dim() == 4 and channel_dim in (1, -3)
    order = torch.channels_last if image else torch.contiguous_format
    return torch.empty(x.shape, dtype=torch.int8, device=x.device, memory_format=order)


@quantize_per_sample.register_fake
def _(x: Tensor, scale: Tensor, smooth: Tensor | None, segments: Sequence[int], channel_dim: int) -> Tensor:
    return _empty_codes(x, channel_dim)


def _check(x: Tensor, scale: Tensor, smooth: Tensor | None, segments: Sequence[int], channel_dim: int) -> None:
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
    check_tensor("scale", scale, [torch.float32], [None, len(segments)], x.device)
    check_divides("scale", scale.shape[0], x.shape[0])
    if smooth is not None:
        check_tensor("smooth", smooth, [torch.float32], [channels], x.device)
