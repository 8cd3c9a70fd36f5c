"""A group norm of an image in channels-last order, which torch has only by way of the other one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.ops import _group_norm_cuda
from qdiff.ops.backend import runs_kernel
from qdiff.ops.checks import CHECKED, FLOATS, check_group_norm, check_tensor, kind_of_call, remember
from qdiff.ops.registry import operator


def _fake(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@operator(_fake)
def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    """`torch.nn.functional.group_norm`, and `silu` if asked for, in two passes over x.

    It should be the case that the values are those of the two: on the CPU bit for bit, by the kernels up to where a sum
    in another order tips a rounding over.

    Args:
        x: float32, float16 or bfloat16 [B, C, H, W]; channels-last is fastest. Values are rounded to its dtype after
            the norm and after the silu.
        groups: G, divides C.
        weight, bias: of x's dtype [C], or None for ones and zeros.
        eps: what is added to the variance, not negative.
        silu: whether y * sigmoid(y) is taken of what is normalized.

    Returns:
        of x's shape and dtype, in channels-last order.
    """
    kind = kind_of_call("group_norm", (x, weight, bias), groups, eps, silu)
    known = CHECKED.get(kind)
    if known is None:
        check_tensor("x", x, FLOATS, (None,) * 4, x.device)
        check_group_norm(x, groups, weight, bias, eps)
        known = remember(kind, _group_norm_cuda.refuses_group_norm(x.shape[1], groups, x.shape[1:2]))
    if runs_kernel("group_norm", x, known.refusal):
        return _group_norm_cuda.group_norm(known, x, groups, weight, bias, eps, silu)
    y = F.group_norm(x, groups, weight, bias, eps) if x.numel() else x
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(F.silu(y) if silu else y)
