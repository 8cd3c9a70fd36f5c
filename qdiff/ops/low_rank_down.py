"""The first half of a low-rank branch."""

import torch
from torch import Tensor

from qdiff.ops.checks import FLOATS, check_tensor


@torch.library.custom_op("qdiff::low_rank_down", mutates_args=())
def low_rank_down(x: Tensor, smooth: Tensor | None, down: Tensor) -> Tensor:
    """(x * smooth) @ down.T in float32: the smoothed, *unquantized* input projected to r values (SVDQuant, arXiv
    2411.05007).

    Args:
        x: float32, float16 or bfloat16 [..., K].
        smooth: float32 [K], the reciprocal smoothing vector, or None for ones.
        down: float [r, K].

    Returns:
        float32 [..., r].
    """
    if x.dtype not in FLOATS or x.dim() < 1:
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, expected a float tensor [..., K]")
    check_tensor("down", down, FLOATS, [None, x.shape[-1]], x.device)
    if smooth is not None:
        check_tensor("smooth", smooth, [torch.float32], [x.shape[-1]], x.device)
    # Smoothing is folded into the small matrix: no pass over x, no temporary of its size.
    matrix = down.float() if smooth is None else down * smooth
    return x.float() @ matrix.t()


@low_rank_down.register_fake
def _(x: Tensor, smooth: Tensor | None, down: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], down.shape[0], dtype=torch.float32, device=x.device)
