"""Convolution of floating-point activations and quantized weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.numerics.gemm_layout import channels_to_gemm, from_gemm
from qdiff.ops.checks import FLOAT32, FLOATS, check_bias_and_dtype, check_group_size, check_segments, check_tensor
from qdiff.ops.registry import operator
from qdiff.ops.w4a16_linear import check_float_weight, float_weight
from qdiff.ops.w8a8_conv2d import check_geometry, empty_conv_output


def _fake(
    x: Tensor,
    smooth: Tensor | None,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    segments: Sequence[int],
) -> Tensor:
    return empty_conv_output(x, codes.shape[0], kernel, stride, padding, x.dtype)


@operator(_fake)
def w4a16_conv2d(
    x: Tensor,
    smooth: Tensor | None,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    segments: Sequence[int],
) -> Tensor:
    """y = conv2d(x, W) + bias with W = w * scale * smooth, made in float32 and cast to x's dtype once.

    Args:
        x: float32, float16 or bfloat16 [B, C, H, W].
        smooth: float32 [C], the reciprocal smoothing vector, or None for ones.
        codes, multipliers, codebook: 4-bit as `w4a8_conv2d` takes them, or int8 [N, C * kh * kw], None and None: the
            integers w.
        scale: float32 [N].
        group_size: of 4-bit codes; not looked at for 8-bit codes.
        bias: float [N] or None.
        kernel, stride, padding: (rows, columns).
        segments: channel counts that sum to C: the order of the codes.

    Returns:
        [B, N, H', W'] in x's dtype, in channels-last order.
    """
    check_tensor("x", x, FLOATS, (None,) * 4, x.device)
    check_geometry(x.shape, kernel, stride, padding)
    check_segments(segments, x.shape[1])
    if multipliers is not None or codebook is not None:
        check_group_size(group_size, segments)
    taps = kernel[0] * kernel[1]
    if smooth is not None:
        check_tensor("smooth", smooth, FLOAT32, (x.shape[1],), x.device)
        smooth = channels_to_gemm(smooth, segments, taps)
    integers = (codes, multipliers, codebook, scale, group_size)
    check_float_weight(smooth, *integers, None, None, x.shape[1] * taps, x.device)
    check_bias_and_dtype(bias, codes.shape[0], x.dtype, FLOATS, x.device)
    matrix = float_weight(smooth, *integers, None, None)
    weight = from_gemm(matrix, segments, (kernel[0], kernel[1])).to(x.dtype)
    out = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), list(stride), list(padding))
    return out.contiguous(memory_format=torch.channels_last)
