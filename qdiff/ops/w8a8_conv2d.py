"""Convolution of int8 activations and int8 weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.numerics.integer_matmul import int_matmul
from qdiff.ops import _gemm
from qdiff.ops.backend import refuses_conv, runs_kernel
from qdiff.ops.checks import (
    CHECKED,
    FLOAT32,
    FLOATS,
    INT8,
    OUT_DTYPES,
    check_bias_and_dtype,
    check_divides,
    check_int8_weight,
    check_segments,
    check_tensor,
    kind_of_call,
    remember,
)
from qdiff.ops.registry import operator

# Bytes of int8 patches and of their float32 products at once on a CPU, all cores together. Measured at 32 x 256 x 16 x
# 16: 1 to 8 MiB are within 5 %, less pays for many small products.
_BLOCK_BYTES = 1 << 21


def _fake(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
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
def w8a8_conv2d(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    segments: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """y[b] = (sum over segments s of conv2d(x_codes[b, s], codes[s]) * x_scale[b, s]) * scale + bias + shift[b]
    + residual

    Each segment's convolution is exact in int32; everything after it is float32, in that order, with one cast at the
    end. Padding is with code 0, which is the value 0. Groups and dilation are 1.

    Args:
        x_codes: int8 [B, C, H, W]; channels-last is fastest.
        x_scale: float32 [R, S], R dividing B: row r holds for B / R samples.
        codes: int8 [N, C * kh * kw] in the order of `qdiff.numerics.gemm_layout`.
        scale: float32 [N].
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
    added, geometry = (bias, shift, residual), (kernel, stride, padding, segments)
    kind = kind_of_call("w8a8_conv2d", (x_codes, x_scale, codes, scale, *added), *map(tuple, geometry), out_dtype)
    known = CHECKED.get(kind)
    if known is None:
        check_conv_input(x_codes, x_scale, codes.shape[0], *added, *geometry, out_dtype)
        check_int8_weight(codes, scale, x_codes.shape[1] * kernel[0] * kernel[1], x_codes.device)
        known = remember(kind, refuses_conv(segments))
    if runs_kernel("w8a8_conv2d", x_codes, known.refusal):
        return _gemm.conv2d(known, x_codes, x_scale, codes, None, None, scale, *added, *geometry, out_dtype)
    return int8_conv2d(x_codes, x_scale, codes, scale, *added, *geometry, out_dtype)


def int8_conv2d(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    segments: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """The reference on checked arguments, for any integer weight that fits int8 [N, K]."""
    out = empty_conv_output(x_codes, weight.shape[0], kernel, stride, padding, out_dtype)
    nhwc = out.permute(0, 2, 3, 1)
    padded = x_codes.permute(0, 2, 3, 1)
    if any(padding):
        padded = F.pad(padded, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    windows = [_windows(part, kernel, stride) for part in padded.split(list(segments), dim=3)]
    taps = kernel[0] * kernel[1]
    weights = [part.contiguous() for part in weight.split([taps * channels for channels in segments], dim=1)]
    row_bytes = max(part.shape[1] for part in weights) + 4 * weight.shape[0]
    blocks = _blocks(nhwc.shape, row_bytes, x_codes.device)
    if out_dtype == torch.int32:
        for images, band in blocks:
            nhwc[images, band] = sum(_accumulators(x[images, band], w) for x, w in zip(windows, weights))
        return out
    scales = x_scale.repeat_interleave(out.shape[0] // max(1, x_scale.shape[0]), dim=0)[:, :, None, None, None]
    bias = None if bias is None else bias.float()
    shift = None if shift is None else shift.float()[:, None, None]
    residual = None if residual is None else residual.permute(0, 2, 3, 1)
    for images, band in blocks:
        y = _segment(windows[0][images, band], weights[0], scales[images, 0])
        for s in range(1, len(segments)):
            y += _segment(windows[s][images, band], weights[s], scales[images, s])
        y.mul_(scale)
        if bias is not None:
            y += bias
        if shift is not None:
            y += shift[images]
        if residual is not None:
            y += residual[images, band]
        nhwc[images, band] = y
    return out


def _segment(windows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return _accumulators(windows, weight).float().mul_(scale)


def _accumulators(windows: Tensor, weight: Tensor) -> Tensor:
    patches = windows.reshape(-1, weight.shape[1])
    return int_matmul(patches, weight).view(*windows.shape[:3], -1)


def _windows(nhwc: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    # A view [B, H', W', kh, kw, C]: copying a block of it is im2col, tap-major as the weights are.
    return nhwc.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1]).permute(0, 1, 2, 4, 5, 3)


def _blocks(shape: Sequence[int], row_bytes: int, device: torch.device) -> list[tuple[slice, slice]]:
    # Whole images while they are small, bands of output rows of one image when it is large.
    batch, height, width = shape[:3]
    limit = batch * height * width if device.type != "cpu" else max(1, _BLOCK_BYTES // row_bytes)
    images = max(1, limit // max(1, height * width))
    band = height if images > 1 else max(1, min(height, limit // max(1, width)))
    return [
        (slice(b, b + images), slice(h, h + band))
        for b in range(0, batch, images)
        for h in range(0, height, max(1, band))
    ]


def empty_conv_output(
    x: Tensor, n: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Uninitialized [B, n, H', W'], channels-last."""
    shape = (x.shape[0], n, *conv_output_size(x, kernel, stride, padding))
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def conv_output_size(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    """(H', W') of an input [B, C, H, W]."""
    return (
        (x.shape[2] + 2 * padding[0] - kernel[0]) // stride[0] + 1,
        (x.shape[3] + 2 * padding[1] - kernel[1]) // stride[1] + 1,
    )


def check_conv_input(
    x_codes: Tensor,
    x_scale: Tensor,
    n: int,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    segments: Sequence[int],
    out_dtype: torch.dtype,
) -> None:
    """Raise a ValueError unless a convolution can take these beside a weight of n rows."""
    if x_codes.dtype != torch.int8 or x_codes.dim() != 4:
        check_tensor("x_codes", x_codes, INT8, (None,) * 4, x_codes.device)
    check_segments(segments, x_codes.shape[1])
    rows = x_scale.shape[0] if x_scale.dim() else None
    check_tensor("x_scale", x_scale, FLOAT32, (rows, len(segments)), x_codes.device)
    check_divides("x_scale", x_scale.shape[0], x_codes.shape[0])
    check_bias_and_dtype(bias, n, out_dtype, OUT_DTYPES, x_codes.device)
    check_geometry(x_codes.shape, kernel, stride, padding)
    if shift is not None:
        check_tensor("shift", shift, FLOATS, (x_codes.shape[0], n), x_codes.device)
    if residual is not None and out_dtype != torch.int32:
        size = conv_output_size(x_codes, kernel, stride, padding)
        check_tensor("residual", residual, (out_dtype,), (x_codes.shape[0], n, *size), x_codes.device)


def check_geometry(shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
    """Raise a ValueError unless the window fits an image [B, C, H, W] of this shape."""
    for name, pair, least in (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0)):
        if len(pair) != 2 or pair[0] < least or pair[1] < least:
            raise ValueError(f"{name}: got {list(pair)}, expected two sizes of {least} or more")
    if shape[2] + 2 * padding[0] < kernel[0] or shape[3] + 2 * padding[1] < kernel[1]:
        raise ValueError(f"kernel: {list(kernel)} does not fit an input {tuple(shape)} with padding {list(padding)}")
