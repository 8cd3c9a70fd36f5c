"""Linear layer of int8 activations and 4-bit weights."""

import torch
from torch import Tensor

from qdiff.numerics.packing import expand_weight
from qdiff.ops import _gemm
from qdiff.ops.backend import refuses_linear, runs_kernel
from qdiff.ops.checks import CHECKED, check_int4_weight, check_linear_input, kind_of_call, remember
from qdiff.ops.registry import operator
from qdiff.ops.w8a8_linear import int8_linear


def _fake(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    x_low: Tensor | None,
    up: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.empty(*x_codes.shape[:-1], codes.shape[0], dtype=out_dtype, device=x_codes.device)


@operator(_fake)
def w4a8_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    x_low: Tensor | None,
    up: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y = (x_codes @ w.T) * x_scale * scale + bias + x_low @ up.T + residual

    w, the codes times their group's multiplier or looked up in their row's codebook, is an int8 matrix [N, K]; from
    there on this is `w8a8_linear`: the first product is exact in int32, everything after it is float32, in that order,
    with one cast at the end.

    Args:
        x_codes: int8 [..., K], M rows in all.
        x_scale: float32 [...], one a row; or [R], R dividing M: row r holds for M / R rows.
        codes: uint8 [N, K/2], as `qdiff.numerics.packing` lays them out.
        multipliers: uint8 [N, ceil(G/2)], laid out there as well, G = K / group_size; or None with a codebook.
        codebook: int8 [N, 16], or None with multipliers.
        scale: float32 [N].
        group_size: of the layout; even, divides K.
        bias: float [N] or None.
        x_low, up: float [..., r] and [N, r], the low-rank branch, or both None; up is rounded to x_low's dtype.
        residual: out_dtype [..., N] or None.
        out_dtype: of the result, or int32 for the first product as it is: scales and the rest are then not looked at.

    Returns:
        out_dtype [..., N], contiguous.
    """
    inputs, weights, added = (x_codes, x_scale), (codes, multipliers, codebook, scale), (bias, x_low, up, residual)
    kind = kind_of_call("w4a8_linear", (*inputs, *weights, *added), group_size, out_dtype)
    known = CHECKED.get(kind)
    if known is None:
        check_linear_input(*inputs, codes.shape[0], *added, out_dtype)
        k = x_codes.shape[-1]
        check_int4_weight(*weights, group_size, k, x_codes.device)
        known = remember(kind, refuses_linear(k, group_size, True))
    if runs_kernel("w4a8_linear", x_codes, known.refusal):
        return _gemm.linear(known, x_codes, x_scale, codes, multipliers, codebook, scale, *added, out_dtype)
    weight = expand_weight(codes, multipliers, codebook, group_size)
    return int8_linear(x_codes, x_scale, weight, scale, bias, x_low, up, residual, out_dtype)
