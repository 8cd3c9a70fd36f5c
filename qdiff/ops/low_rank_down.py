"""The first half of a low-rank branch."""

import torch
from torch import Tensor

from qdiff.ops.checks import FLOAT32, FLOATS, check_tensor
from qdiff.ops.registry import operator
from qdiff.ops.row_blocks import row_blocks


def _fake(x: Tensor, smooth: Tensor | None, down: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], down.shape[0], dtype=x.dtype, device=x.device)


@operator(_fake)
def low_rank_down(x: Tensor, smooth: Tensor | None, down: Tensor) -> Tensor:
    """(x * smooth) @ down.T: the smoothed, *unquantized* input projected to r values (SVDQuant, arXiv 2411.05007).

    x * smooth, made in float32, and down are rounded to x's dtype; their products are summed in float32.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        smooth: float32 [K], the reciprocal smoothing vector, or None for ones.
        down: float [r, K].

    Returns:
        [..., r] in x's dtype.
    """
    if x.dtype not in FLOATS or x.dim() < 1:
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, expected a float tensor [..., K]")
    k = x.shape[-1]
    check_down(down, k, x.device)
    if smooth is not None:
        check_tensor("smooth", smooth, FLOAT32, (k,), x.device)
    if x.is_cuda:  # its matrix product sums halves in float32
        smoothed = x if smooth is None else (x * smooth).to(x.dtype)
        return smoothed @ down.to(x.dtype).t()
    rows, matrix = x.reshape(-1, k), rounded_down(down, x.dtype)
    low = torch.empty(rows.shape[0], down.shape[0], dtype=x.dtype, device=x.device)
    for block in row_blocks(rows.shape[0], 4 * k, x.device):
        v = rows[block] if smooth is None else rows[block] * smooth
        low[block] = project(v, x.dtype, matrix)
    return low.view(*x.shape[:-1], down.shape[0])


def rounded_down(down: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 matrix [K, r] that inputs of this dtype are projected with."""
    return down.to(dtype).float().t()


def project(smoothed: Tensor, dtype: torch.dtype, matrix: Tensor) -> Tensor:
    """The branch of smoothed rows [M, K] of a layer that computes in `dtype`: float32 [M, r]."""
    return smoothed.to(dtype).float() @ matrix


def check_down(down: Tensor, k: int, device: torch.device) -> None:
    """Raise a ValueError unless `down` is a float [r, k]."""
    check_tensor("down", down, FLOATS, (down.shape[0] if down.dim() else None, k), device)
