"""Linear layer of int8 activations and int8 weights."""

import torch
from torch import Tensor

from qdiff.numerics.integer_matmul import int_matmul
from qdiff.ops import _gemm
from qdiff.ops.backend import refuses_linear, runs_kernel
from qdiff.ops.checks import CHECKED, check_int8_weight, check_linear_input, kind_of_call, remember
from qdiff.ops.registry import operator
from qdiff.ops.row_blocks import row_blocks


def _fake(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_low: Tensor | None,
    up: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.empty(*x_codes.shape[:-1], codes.shape[0], dtype=out_dtype, device=x_codes.device)


@operator(_fake)
def w8a8_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_low: Tensor | None,
    up: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y = (x_codes @ codes.T) * x_scale * scale + bias + x_low @ up.T + residual

    The first product is exact in int32; everything after it is float32, in that order, with one cast at the end.

    Args:
        x_codes: int8 [..., K], M rows in all.
        x_scale: float32 [...], one a row; or [R], R dividing M: row r holds for M / R rows.
        codes: int8 [N, K].
        scale: float32 [N].
        bias: float [N] or None.
        x_low, up: float [..., r] and [N, r], the low-rank branch, or both None; up is rounded to x_low's dtype.
        residual: out_dtype [..., N] or None.
        out_dtype: of the result, or int32 for the first product as it is: scales and the rest are then not looked at.

    Returns:
        out_dtype [..., N], contiguous.
    """
    added = (bias, x_low, up, residual)
    kind = kind_of_call("w8a8_linear", (x_codes, x_scale, codes, scale, *added), out_dtype)
    known = CHECKED.get(kind)
    if known is None:
        check_linear_input(x_codes, x_scale, codes.shape[0], *added, out_dtype)
        check_int8_weight(codes, scale, x_codes.shape[-1], x_codes.device)
        known = remember(kind, refuses_linear(x_codes.shape[-1], 0, False))
    if runs_kernel("w8a8_linear", x_codes, known.refusal):
        return _gemm.linear(known, x_codes, x_scale, codes, None, None, scale, *added, out_dtype)
    return int8_linear(x_codes, x_scale, codes, scale, *added, out_dtype)


def int8_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_low: Tensor | None,
    up: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The reference on checked arguments, for any integer weight that fits int8 [N, K]."""
    rows = x_codes.reshape(-1, x_codes.shape[-1])
    m, n = rows.shape[0], weight.shape[0]
    shape = (*x_codes.shape[:-1], n)
    if out_dtype == torch.int32:
        return int_matmul(rows, weight).contiguous().view(shape)
    row_scale = x_scale.flatten().repeat_interleave(m // max(1, x_scale.numel())).unsqueeze(1)
    low = None if x_low is None else x_low.reshape(m, x_low.shape[-1]).float()
    up_t = None if x_low is None or up is None else up.to(x_low.dtype).float().t()
    bias = None if bias is None else bias.float()
    residual = None if residual is None else residual.reshape(m, n)
    out = torch.empty(m, n, dtype=out_dtype, device=x_codes.device)
    for block in row_blocks(m, 4 * n, x_codes.device):
        # A float32 result is worked on in its final place; another one needs a float32 block first.
        y = out[block] if out_dtype == torch.float32 else torch.empty_like(out[block], dtype=torch.float32)
        y.copy_(int_matmul(rows[block], weight)).mul_(row_scale[block]).mul_(scale)
        if bias is not None:
            y.add_(bias)
        if low is not None and up_t is not None:
            y.addmm_(low[block], up_t)
        if residual is not None:
            y.add_(residual[block])
        if y.dtype != out_dtype:
            out[block] = y
    return out.view(shape)
