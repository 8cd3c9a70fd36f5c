"""Linear layer of int8 activations and 4-bit weights with two-level scales."""

import torch
from torch import Tensor

from qdiff.numerics.packing import expand_int4
from qdiff.ops.checks import check_int4_weight, check_linear_input
from qdiff.ops.w8a8_linear import int8_linear


@torch.library.custom_op("qdiff::w4a8_linear", mutates_args=())
def w4a8_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    multipliers: Tensor,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    x_low: Tensor | None,
    up: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y = (x_codes @ (m * q).T) * x_scale * scale + bias + x_low @ up.T

    m * q, the codes times their group's multiplier, is an int8 matrix [N, K]; from there on this is `w8a8_linear`: the
    first product is exact in int32, everything after it is float32, in that order, with one cast at the end.

    Args:
        x_codes: int8 [..., K], M rows in all.
        x_scale: float32 [R], R dividing M: row r holds for M / R rows.
        codes: uint8 [N, K/2], multipliers: uint8 [N, ceil(G/2)], as `qdiff.numerics.packing` lays them out; G = K /
            group_size.
        scale: float32 [N].
        group_size: even, divides K.
        bias: float [N] or None.
        x_low, up: float [..., r] and [N, r], the low-rank branch, or both None.
        out_dtype: of the result.

    Returns:
        out_dtype [..., N], contiguous.
    """
    check_linear_input(x_codes, x_scale, codes.shape[0], bias, x_low, up, out_dtype)
    check_int4_weight(codes, multipliers, scale, group_size, x_codes.shape[-1], x_codes.device)
    weight = expand_int4(codes, multipliers, group_size)
    return int8_linear(x_codes, x_scale, weight, scale, bias, x_low, up, out_dtype)


@w4a8_linear.register_fake
def _(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    multipliers: Tensor,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    x_low: Tensor | None,
    up: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.empty(*x_codes.shape[:-1], codes.shape[0], dtype=out_dtype, device=x_codes.device)
