"""Convolution of int8 activations and 4-bit weights with two-level scales."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qdiff.numerics.packing import expand_int4
from qdiff.ops.checks import check_group_size, check_int4_weight
from qdiff.ops.w8a8_conv2d import check_conv_input, empty_conv_output, int8_conv2d


@torch.library.custom_op("qdiff::w4a8_conv2d", mutates_args=())
def w4a8_conv2d(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    multipliers: Tensor,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    segments: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """y[b] = (sum over segments s of conv2d(x_codes[b, s], (m * q)[s]) * x_scale[b, s]) * scale + bias

    m * q, the codes times their group's multiplier, is an int8 matrix [N, K]; from there on this is `w8a8_conv2d`.

    Args:
        x_codes: int8 [B, C, H, W]; channels-last is fastest.
        x_scale: float32 [R, S], R dividing B: row r holds for B / R samples.
        codes: uint8 [N, K/2], multipliers: uint8 [N, ceil(G/2)], as `qdiff.numerics.packing` lays them out, over the
            axis K = C * kh * kw in the order of `qdiff.numerics.gemm_layout`; G = K / group_size.
        scale: float32 [N].
        group_size: even, divides every segment.
        bias: float [N] or None.
        kernel, stride, padding: (rows, columns).
        segments: S channel counts that sum to C.
        out_dtype: of the result.

    Returns:
        out_dtype [B, N, H', W'] in channels-last order.
    """
    check_conv_input(x_codes, x_scale, codes.shape[0], bias, kernel, stride, padding, segments, out_dtype)
    check_group_size(group_size, segments)
    k = x_codes.shape[1] * kernel[0] * kernel[1]
    check_int4_weight(codes, multipliers, scale, group_size, k, x_codes.device)
    weight = expand_int4(codes, multipliers, group_size)
    return int8_conv2d(x_codes, x_scale, weight, scale, bias, kernel, stride, padding, segments, out_dtype)


@w4a8_conv2d.register_fake
def _(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    multipliers: Tensor,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    segments: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    return empty_conv_output(x_codes, codes.shape[0], kernel, stride, padding, out_dtype)
