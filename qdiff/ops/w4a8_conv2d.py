"""Convolution of int8 activations and 4-bit weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qdiff.numerics.packing import expand_weight
from qdiff.ops import _gemm
from qdiff.ops.backend import KERNEL_BLOCK, refuses_conv, runs_kernel
from qdiff.ops.checks import CHECKED, check_group_size, check_int4_weight, kind_of_call, remember
from qdiff.ops.registry import operator
from qdiff.ops.w8a8_conv2d import check_conv_input, empty_conv_output, int8_conv2d


def _fake(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    segments: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    return empty_conv_output(x_codes, codes.shape[0], kernel, stride, padding, out_dtype)


@operator(_fake)
def w4a8_conv2d(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    segments: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """y[b] = (sum over segments s of conv2d(x_codes[b, s], w[s]) * x_scale[b, s]) * scale + bias + shift[b] + residual

    w, the codes times their group's multiplier or looked up in their row's codebook, is an int8 matrix [N, K]; from
    there on this is `w8a8_conv2d`.

    Args:
        x_codes: int8 [B, C, H, W]; channels-last is fastest.
        x_scale: float32 [R, S], R dividing B: row r holds for B / R samples.
        codes: uint8 [N, K/2], as `qdiff.numerics.packing` lays them out, over the axis K = C * kh * kw in the order of
            `qdiff.numerics.gemm_layout`.
        multipliers: uint8 [N, ceil(G/2)], laid out there as well, G = K / group_size; or None with a codebook.
        codebook: int8 [N, 16], or None with multipliers.
        scale: float32 [N].
        group_size: of the layout; even, divides every segment; 32 is fastest on a GPU.
        bias: float [N] or None.
        shift: float [B, N], added to every pixel of a sample, or None.
        residual: out_dtype [B, N, H', W'] or None; channels-last is fastest.
        kernel, stride, padding: (rows, columns).
        segments: S channel counts that sum to C.
        out_dtype: of the result, or int32 for the segments' sums of products: scales and the rest are then not looked
            at.

    Returns:
        out_dtype [B, N, H', W'] in channels-last order.
    """
    inputs, weights, added = (x_codes, x_scale), (codes, multipliers, codebook, scale), (bias, shift, residual)
    geometry = (kernel, stride, padding, segments)
    kind = kind_of_call("w4a8_conv2d", (*inputs, *weights, *added), group_size, *map(tuple, geometry), out_dtype)
    known = CHECKED.get(kind)
    if known is None:
        check_conv_input(*inputs, codes.shape[0], *added, *geometry, out_dtype)
        check_group_size(group_size, segments)
        check_int4_weight(*weights, group_size, x_codes.shape[1] * kernel[0] * kernel[1], x_codes.device)
        known = remember(kind, refuses_conv(segments))
    rest = (scale, *added, *geometry, out_dtype)
    on_kernel = runs_kernel("w4a8_conv2d", x_codes, known.refusal)
    if on_kernel and group_size == KERNEL_BLOCK:
        return _gemm.conv2d(known, x_codes, x_scale, codes, multipliers, codebook, *rest)
    weight = expand_weight(codes, multipliers, codebook, group_size)
    if on_kernel:  # it unpacks no other groups
        return _gemm.conv2d(known, x_codes, x_scale, weight, None, None, *rest)
    return int8_conv2d(x_codes, x_scale, weight, *rest)
