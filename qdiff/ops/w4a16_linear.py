"""Linear layer of floating-point activations and quantized weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.numerics.packing import expand_weight
from qdiff.ops import _w4a16_cuda
from qdiff.ops.backend import runs_kernel
from qdiff.ops.checks import (
    CHECKED,
    FLOAT32,
    FLOATS,
    check_bias_and_dtype,
    check_int4_weight,
    check_int8_weight,
    check_tensor,
    kind_of_call,
    remember,
)
from qdiff.ops.low_rank_down import check_down
from qdiff.ops.registry import operator


def _fake(
    x: Tensor,
    smooth: Tensor | None,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> Tensor:
    return torch.empty(*x.shape[:-1], codes.shape[0], dtype=x.dtype, device=x.device)


@operator(_fake)
def w4a16_linear(
    x: Tensor,
    smooth: Tensor | None,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> Tensor:
    """y = x @ W.T + bias with W = (w * scale + up @ down) * smooth and w the integers of `w4a8_linear`

    W is made in float32 and cast to x's dtype once; the product is the platform's own in that dtype.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        smooth: float32 [K], the reciprocal smoothing vector, or None for ones.
        codes, multipliers, codebook: 4-bit as `w4a8_linear` takes them, or int8 [N, K], None and None.
        scale: float32 [N].
        group_size: of 4-bit codes; not looked at for 8-bit codes.
        bias: float [N] or None.
        down, up: float [r, K] and [N, r], the low-rank branch, or both None.

    Returns:
        [..., N] in x's dtype.
    """
    integers = (codes, multipliers, codebook, scale, group_size)
    kind = kind_of_call("w4a16_linear", (x, smooth, *integers[:-1], bias, down, up), group_size)
    known = CHECKED.get(kind)
    if known is None:
        if x.dtype not in FLOATS or x.dim() < 1:
            raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, expected a float tensor [..., K]")
        check_float_weight(smooth, *integers, down, up, x.shape[-1], x.device)
        check_bias_and_dtype(bias, codes.shape[0], x.dtype, FLOATS, x.device)
        known = remember(kind)
    if runs_kernel("w4a16_linear", x, None):
        y = _w4a16_cuda.linear(known, x, smooth, *integers, bias, down, up)
        if y is not None:
            return y
    weight = float_weight(smooth, *integers, down, up)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def float_weight(
    smooth: Tensor | None,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    down: Tensor | None,
    up: Tensor | None,
) -> Tensor:
    """The float32 matrix [N, K] that the quantized weights stand for, acting on the raw (not smoothed) input."""
    four_bit = multipliers is not None or codebook is not None
    integers = expand_weight(codes, multipliers, codebook, group_size) if four_bit else codes
    weight = integers * scale[:, None]
    if down is not None and up is not None:
        weight.addmm_(up.float(), down.float())
    return weight if smooth is None else weight.mul_(smooth)


def check_float_weight(
    smooth: Tensor | None,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    down: Tensor | None,
    up: Tensor | None,
    k: int,
    device: torch.device,
) -> None:
    """Raise a ValueError unless `float_weight` can make a matrix [N, k] of these."""
    if multipliers is None and codebook is None:
        check_int8_weight(codes, scale, k, device)
    else:
        check_int4_weight(codes, multipliers, codebook, scale, group_size, k, device)
    if smooth is not None:
        check_tensor("smooth", smooth, FLOAT32, (k,), device)
    if (down is None) != (up is None):
        raise ValueError("down, up: got one of them, expected both or neither")
    if down is not None and up is not None:
        check_down(down, k, device)
        check_tensor("up", up, FLOATS, (codes.shape[0], down.shape[0]), device)
