"""Convolution of int8 activations and int8 weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.numerics.integer_matmul import int_matmul
from qdiff.ops.checks import check_bias_and_dtype, check_divides, check_int8_weight, check_segments, check_tensor

# Bytes of int8 patches and of their float32 products at once on a CPU, all cores together. Measured at 32 x 256 x 16 x
# 16: 1 to 8 MiB are within 5 %, less pays for many small products.
_BLOCK_BYTES = 1 << 21


@torch.library.custom_op("qdiff::w8a8_conv2d", mutates_args=())
def w8a8_conv2d(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    segments: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """y[b] = (sum over segments s of conv2d(x_codes[b, s], codes[s]) * x_scale[b, s]) * scale + bias

    Each segment's convolution is exact in int32; everything after it is float32, in that order, with one cast at the
    end. Padding is with code 0, which is the value 0. Groups and dilation are 1.

    Args:
        x_codes: int8 [B, C, H, W]; channels-last is fastest.
        x_scale: float32 [R, S], R dividing B: row r holds for B / R samples.
        codes: int8 [N, C * kh * kw] in the order of `qdiff.numerics.gemm_layout`.
        scale: float32 [N].
        bias: float [N] or None.
        kernel, stride, padding: (rows, columns).
        segments: S channel counts that sum to C.
        out_dtype: of the result.

    Returns:
        out_dtype [B, N, H', W'] in channels-last order.
    """
    check_conv_input(x_codes, x_scale, codes.shape[0], bias, kernel, stride, padding, segments, out_dtype)
    check_int8_weight(codes, scale, x_codes.shape[1] * kernel[0] * kernel[1], x_codes.device)
    return int8_conv2d(x_codes, x_scale, codes, scale, bias, kernel, stride, padding, segments, out_dtype)


def int8_conv2d(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
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
    scales = x_scale.repeat_interleave(out.shape[0] // max(1, x_scale.shape[0]), dim=0)[:, :, None, None, None]
    bias = None if bias is None else bias.float()
    row_bytes = max(part.shape[1] for part in weights) + 4 * weight.shape[0]
    for images, band in _blocks(nhwc.shape, row_bytes, x_codes.device):
        y = _segment(windows[0][images, band], weights[0], scales[images, 0])
        for s in range(1, len(segments)):
            y += _segment(windows[s][images, band], weights[s], scales[images, s])
        y.mul_(scale)
        if bias is not None:
            y += bias
        nhwc[images, band] = y
    return out


def _segment(windows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    patches = windows.reshape(-1, weight.shape[1])
    return int_matmul(patches, weight).float().view(*windows.shape[:3], -1).mul_(scale)


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
    height, width = ((x.shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2))
    shape = (x.shape[0], n, height, width)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


@w8a8_conv2d.register_fake
def _(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    segments: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    return empty_conv_output(x_codes, codes.shape[0], kernel, stride, padding, out_dtype)


def check_conv_input(
    x_codes: Tensor,
    x_scale: Tensor,
    n: int,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    segments: Sequence[int],
    out_dtype: torch.dtype,
) -> None:
    """Raise a ValueError unless a convolution can take these beside a weight of n rows."""
    check_tensor("x_codes", x_codes, [torch.int8], [None] * 4, x_codes.device)
    check_segments(segments, x_codes.shape[1])
    check_tensor("x_scale", x_scale, [torch.float32], [None, len(segments)], x_codes.device)
    check_divides("x_scale", x_scale.shape[0], x_codes.shape[0])
    check_bias_and_dtype(bias, n, out_dtype, x_codes.device)
    check_geometry(x_codes.shape, kernel, stride, padding)


def check_geometry(shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
    """Raise a ValueError unless the window fits an image [B, C, H, W] of this shape."""
    pairs = {"kernel": kernel, "stride": stride, "padding": padding}
    for name, pair in pairs.items():
        if len(pair) != 2 or min(pair) < (0 if name == "padding" else 1):
            raise ValueError(
                f"{name}: got {list(pair)}, expected two {'non-negative' if name == 'padding' else 'positive'} sizes"
            )
    if any(shape[2 + i] + 2 * padding[i] < kernel[i] for i in range(2)):
        raise ValueError(f"kernel: {list(kernel)} does not fit an input {tuple(shape)} with padding {list(padding)}")
