"""Linear layer of int8 activations and int8 weights."""

import torch
from torch import Tensor

from qdiff.numerics.integer_matmul import int_matmul
from qdiff.ops.checks import check_int8_weight, check_linear_input
from qdiff.ops.row_blocks import row_blocks


@torch.library.custom_op("qdiff::w8a8_linear", mutates_args=())
def w8a8_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_low: Tensor | None,
    up: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y = (x_codes @ codes.T) * x_scale * scale + bias + x_low @ up.T

    The first product is exact in int32; everything after it is float32, in that order, with one cast at the end.

    Args:
        x_codes: int8 [..., K], M rows in all.
        x_scale: float32 [R], R dividing M: row r holds for M / R rows.
        codes: int8 [N, K].
        scale: float32 [N].
        bias: float [N] or None.
        x_low, up: float [..., r] and [N, r], the low-rank branch, or both None.
        out_dtype: of the result.

    Returns:
        out_dtype [..., N], contiguous.
    """
    check_linear_input(x_codes, x_scale, codes.shape[0], bias, x_low, up, out_dtype)
    check_int8_weight(codes, scale, x_codes.shape[-1], x_codes.device)
    return int8_linear(x_codes, x_scale, codes, scale, bias, x_low, up, out_dtype)


def int8_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_low: Tensor | None,
    up: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The reference on checked arguments, for any integer weight that fits int8 [N, K]."""
    rows = x_codes.reshape(-1, x_codes.shape[-1])
    m, n = rows.shape[0], weight.shape[0]
    row_scale = x_scale.repeat_interleave(m // max(1, x_scale.shape[0])).unsqueeze(1)
    low = None if x_low is None else x_low.reshape(m, x_low.shape[-1]).float()
    up_t = None if up is None else up.float().t()
    bias = None if bias is None else bias.float()
    out = torch.empty(m, n, dtype=out_dtype, device=x_codes.device)
    for block in row_blocks(m, 4 * n, x_codes.device):
        # A float32 result is worked on in its final place; another one needs a float32 block first.
        y = out[block] if out_dtype == torch.float32 else torch.empty_like(out[block], dtype=torch.float32)
        y.copy_(int_matmul(rows[block], weight)).mul_(row_scale[block]).mul_(scale)
        if bias is not None:
            y.add_(bias)
        if low is not None and up_t is not None:
            y.addmm_(low[block], up_t)
        if y.dtype != out_dtype:
            out[block] = y
    return out.view(*x_codes.shape[:-1], n)


@w8a8_linear.register_fake
def _(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_low: Tensor | None,
    up: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.empty(*x_codes.shape[:-1], codes.shape[0], dtype=out_dtype, device=x_codes.device)
