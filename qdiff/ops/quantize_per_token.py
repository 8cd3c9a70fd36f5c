"""int8 activations with one dynamic scale a token, and what their low-rank branch reads."""

import torch
from torch import Tensor

from qdiff.numerics.ranges import LEVELS
from qdiff.ops import _quantize_cuda
from qdiff.ops.activation import activate, activated_width, check_activation
from qdiff.ops.backend import refuses_levels, runs_kernel
from qdiff.ops.checks import CHECKED, FLOAT32, FLOATS, check_levels, check_tensor, kind_of_call, remember
from qdiff.ops.low_rank_down import check_down, project, rounded_down
from qdiff.ops.registry import operator
from qdiff.ops.row_blocks import row_blocks

# Below this largest magnitude 127 / absmax would overflow float32; such rows get the step of this magnitude.
_SMALLEST_ABSMAX = 1e-30


def _fake(
    x: Tensor, smooth: Tensor | None, down: Tensor | None, levels: int = LEVELS, activation: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty(*x.shape[:-1], activated_width(x, activation), dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rank = 0 if down is None else down.shape[0]
    return codes, scale, torch.empty(*x.shape[:-1], rank, dtype=x.dtype, device=x.device)


@operator(_fake)
def quantize_per_token(
    x: Tensor, smooth: Tensor | None, down: Tensor | None, levels: int = LEVELS, activation: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize every row of x * smooth to int8 with its own scale; with `down`, also do what `low_rank_down` does.

    With an activation, x stands for `activate(x, activation)`. With v = x * smooth in float32 and a = max |v| over a
    row: scale = a / levels, code = round(v * (levels / a)), half to even. It should be the case that
    |v - code * scale| <= scale / 2 (1 + 2^-14), that a row's largest magnitude has code +-levels, and that zeros have
    code 0. A row of zeros has scale 1. A row with NaN or infinity has a NaN or infinite scale, so it stays visible in
    the product.

    Args:
        x: float32, float16 or bfloat16 [..., K], or [..., 2 K] for "geglu", any strides.
        smooth: float32 [K], the *reciprocal* of SmoothQuant's vector s (arXiv 2211.10438, equation 3), or None.
        down: float [r, K], or None.
        levels: the largest code, 1 to 127: 2^(b - 1) - 1 for b bits. The kernels know 127 only.
        activation: one of `qdiff.ops.activation.ACTIVATIONS`.

    Returns:
        codes int8 [..., K] in [-levels, levels], contiguous; scale float32 [...]; low [..., r] in x's dtype, with r = 0
        without `down`.
    """
    kind = kind_of_call("quantize_per_token", (x, smooth, down), levels, activation)
    known = CHECKED.get(kind)
    if known is None:
        check_tokens(x, smooth, down, activation)
        check_levels(levels)
        known = remember(kind)
    if runs_kernel("quantize_per_token", x, refuses_levels(levels)):
        return _quantize_cuda.quantize_per_token(known, x, smooth, down, activation)
    x = activate(x, activation)
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    low = torch.empty(rows.shape[0], 0 if down is None else down.shape[0], dtype=x.dtype, device=x.device)
    matrix = None if down is None else rounded_down(down, x.dtype)
    for block in row_blocks(rows.shape[0], 4 * rows.shape[1], x.device):
        # v is ours to overwrite unless it is x itself.
        v = rows[block].float() if smooth is None else rows[block] * smooth
        if matrix is not None:
            low[block] = project(v, x.dtype, matrix)
        codes[block], scale[block] = _quantize(v, levels, smooth is not None or x.dtype != torch.float32)
    return codes.view(x.shape), scale.view(x.shape[:-1]), low.view(*x.shape[:-1], low.shape[1])


def _quantize(v: Tensor, levels: int, overwrite: bool) -> tuple[Tensor, Tensor]:
    absmax = v.abs().amax(dim=1, keepdim=True)
    step = absmax.clamp_min(_SMALLEST_ABSMAX)
    # A second temporary of v's size costs more than the arithmetic.
    codes = (v.mul_(levels / step) if overwrite else v * (levels / step)).round_()
    scale = torch.where(absmax == 0, 1.0, step / levels)
    return codes, scale[:, 0]


def check_tokens(x: Tensor, smooth: Tensor | None, down: Tensor | None, activation: str = "none") -> None:
    """Raise a ValueError unless these are an input that can be quantized by tokens, and what goes with it."""
    if x.dtype not in FLOATS or x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, expected a float tensor [..., K] with K > 0")
    check_activation(x, activation)
    k = activated_width(x, activation)
    if smooth is not None:
        check_tensor("smooth", smooth, FLOAT32, (k,), x.device)
    if down is not None:
        check_down(down, k, x.device)
