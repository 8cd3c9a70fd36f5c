"""int8 activations of a normalized image, with scales that were measured beforehand."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.ops import _group_norm_cuda
from qdiff.ops.backend import runs_kernel
from qdiff.ops.checks import CHECKED, FLOATS, check_group_norm, check_tensor, kind_of_call, remember
from qdiff.ops.quantize_per_sample import check_samples, quantize_per_sample
from qdiff.ops.registry import operator


def _fake(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor,
    smooth: Tensor | None,
    segments: Sequence[int],
) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device, memory_format=torch.channels_last)


@operator(_fake)
def quantize_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor,
    smooth: Tensor | None,
    segments: Sequence[int],
) -> Tensor:
    """`torch.nn.functional.group_norm`, `silu` if asked for, and `quantize_per_sample`, in two passes over x.

    It should be the case that the codes are those of the three: on the CPU bit for bit, by the kernels up to where a
    sum in another order tips a rounding over.

    Args:
        x: float32, float16 or bfloat16 [B, C, H, W]; channels-last is fastest. Values are rounded to its dtype after
            the norm and after the silu.
        groups: G, divides C.
        weight, bias: of x's dtype [C], or None for ones and zeros.
        eps: what is added to the variance, not negative.
        silu: whether y * sigmoid(y) is taken of what is normalized.
        scale: float32 [R, S], not negative, with R dividing B; row r holds for samples r B/R to (r + 1) B/R - 1.
        smooth: float32 [C], the reciprocal smoothing vector, or None for ones.
        segments: S channel counts that sum to C.

    Returns:
        codes int8 of x's shape in channels-last order.
    """
    tensors = (x, weight, bias, scale, smooth)
    kind = kind_of_call("quantize_group_norm", tensors, groups, eps, silu, tuple(segments))
    known = CHECKED.get(kind)
    if known is None:
        check_tensor("x", x, FLOATS, (None,) * 4, x.device)
        check_samples(x, scale, smooth, segments, 1)
        check_group_norm(x, groups, weight, bias, eps)
        known = remember(kind, _group_norm_cuda.refuses_group_norm(x.shape[1], groups, segments))
    if runs_kernel("quantize_group_norm", x, known.refusal):
        return _group_norm_cuda.group_norm(known, x, groups, weight, bias, eps, silu, scale, smooth, segments)
    y = F.group_norm(x, groups, weight, bias, eps) if x.numel() else x
    codes: Tensor = quantize_per_sample(F.silu(y) if silu else y, scale, smooth, segments, 1)
    return codes
