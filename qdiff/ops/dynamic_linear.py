"""Linear layer of float activations that it quantizes itself, with one dynamic scale a token."""

import torch
from torch import Tensor

from qdiff.numerics.ranges import LEVELS
from qdiff.ops import _dynamic_linear_cuda
from qdiff.ops.activation import activated_width
from qdiff.ops.backend import refuses_linear, runs_kernel
from qdiff.ops.checks import (
    CHECKED,
    FLOATS,
    OUT_DTYPES,
    check_bias_and_dtype,
    check_int4_weight,
    check_int8_weight,
    check_tensor,
    kind_of_call,
    remember,
)
from qdiff.ops.quantize_per_token import check_tokens, quantize_per_token
from qdiff.ops.registry import operator
from qdiff.ops.w4a8_linear import w4a8_linear
from qdiff.ops.w8a8_linear import w8a8_linear


def _fake(
    x: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    up: Tensor | None,
    out_dtype: torch.dtype,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    return torch.empty(*x.shape[:-1], codes.shape[0], dtype=out_dtype, device=x.device)


@operator(_fake)
def dynamic_linear(
    x: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    up: Tensor | None,
    out_dtype: torch.dtype,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`quantize_per_token` to 8 bits and then `w4a8_linear`, or `w8a8_linear`, bit for bit, for the host time of one.

    Args:
        x: float32, float16 or bfloat16 [..., K], or [..., 2 K] for "geglu", any strides.
        smooth: float32 [K], the reciprocal smoothing vector, or None for ones.
        down, up: float [r, K] and [N, r], the low-rank branch, or both None. What is between them is rounded to x's
            dtype, then to out_dtype.
        codes: uint8 [N, K/2], as `qdiff.numerics.packing` lays them out; or int8 [N, K], without multipliers and
            without a codebook.
        multipliers: uint8 [N, ceil(G/2)], laid out there as well, G = K / group_size; or None.
        codebook: int8 [N, 16], or None.
        scale: float32 [N].
        group_size: of the layout of 4-bit codes; even, divides K.
        bias: float [N] or None.
        out_dtype: of the result, or int32 for the product of the codes as it is: scales and the rest are then not
            looked at.
        activation: what is computed of x before, one of `qdiff.ops.activation.ACTIVATIONS`.
        residual: out_dtype [..., N] or None.

    Returns:
        out_dtype [..., N], contiguous.
    """
    weights = (codes, multipliers, codebook, scale)
    tensors = (x, smooth, down, *weights, bias, up, residual)
    kind = kind_of_call("dynamic_linear", tensors, group_size, out_dtype, activation)
    known = CHECKED.get(kind)
    if known is None:
        _check(*tensors, group_size, out_dtype, activation)
        known = remember(kind, refuses_linear(activated_width(x, activation), group_size, codes.dtype == torch.uint8))
    if out_dtype == torch.int32:
        down = up = residual = None
    # Where the product has no kernel the quantizer may have one: each of the two then says so for itself.
    if known.refusal is None and runs_kernel("dynamic_linear", x, None):
        tensors = (x, smooth, down, *weights, bias, up, residual)
        return _dynamic_linear_cuda.dynamic_linear(known, tensors, out_dtype, activation)
    return quantize_then_multiply(x, smooth, down, *weights, group_size, bias, up, out_dtype, activation, residual)


def quantize_then_multiply(
    x: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    up: Tensor | None,
    out_dtype: torch.dtype,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The definition of `dynamic_linear`: the two operators, one after the other."""
    x_codes, x_scale, low = quantize_per_token(x, smooth, down, LEVELS, activation)
    added = (bias, None if down is None else low.to(out_dtype), up, residual)
    if multipliers is None and codebook is None:
        y: Tensor = w8a8_linear(x_codes, x_scale, codes, scale, *added, out_dtype)
    else:
        y = w4a8_linear(x_codes, x_scale, codes, multipliers, codebook, scale, group_size, *added, out_dtype)
    return y


def _check(
    x: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
    activation: str,
) -> None:
    check_tokens(x, smooth, down, activation)
    n, k, device = codes.shape[0], activated_width(x, activation), x.device
    if multipliers is None and codebook is None and codes.dtype != torch.uint8:
        check_int8_weight(codes, scale, k, device)
    else:
        check_int4_weight(codes, multipliers, codebook, scale, group_size, k, device)
    check_bias_and_dtype(bias, n, out_dtype, OUT_DTYPES, device)
    if (down is None) != (up is None):
        raise ValueError("down, up: got one of them, expected both or neither")
    if down is not None and up is not None:
        check_tensor("up", up, FLOATS, (n, down.shape[0]), device)
    if residual is not None and out_dtype != torch.int32:
        check_tensor("residual", residual, (out_dtype,), (*x.shape[:-1], n), device)
