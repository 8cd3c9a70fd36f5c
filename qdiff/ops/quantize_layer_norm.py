"""int8 activations of normalized tokens, with one dynamic scale a token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.ops import _quantize_cuda
from qdiff.ops.backend import runs_kernel
from qdiff.ops.checks import CHECKED, FLOAT32, FLOATS, check_tensor, kind_of_call, remember
from qdiff.ops.quantize_per_token import quantize_per_token
from qdiff.ops.registry import operator


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, smooth: Tensor | None
) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


@operator(_fake)
def quantize_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, smooth: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`torch.nn.functional.layer_norm` of the last dimension and `quantize_per_token`, in one pass over x.

    It should be the case that the results are those of the two: on the CPU bit for bit, by the kernel up to where a sum
    in another order tips a rounding over.

    Args:
        x: float32, float16 or bfloat16 [..., K], any strides. What is normalized is rounded to its dtype.
        weight, bias: of x's dtype [K], or None for ones and zeros.
        eps: what is added to the variance, not negative.
        smooth: float32 [K], the reciprocal smoothing vector, or None for ones.

    Returns:
        codes int8 [..., K], contiguous; scale float32 [...].
    """
    kind = kind_of_call("quantize_layer_norm", (x, weight, bias, smooth), eps)
    known = CHECKED.get(kind)
    if known is None:
        _check(x, weight, bias, eps, smooth)
        known = remember(kind)
    if runs_kernel("quantize_layer_norm", x, None):
        return _quantize_cuda.quantize_layer_norm(known, x, weight, bias, eps, smooth)
    codes, scale, _ = quantize_per_token(F.layer_norm(x, x.shape[-1:], weight, bias, eps), smooth, None)
    return codes, scale


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, smooth: Tensor | None) -> None:
    if x.dtype not in FLOATS or x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, expected a float tensor [..., K] with K > 0")
    for name, given, dtypes in (
        ("weight", weight, (x.dtype,)),
        ("bias", bias, (x.dtype,)),
        ("smooth", smooth, FLOAT32),
    ):
        if given is not None:
            check_tensor(name, given, dtypes, (x.shape[-1],), x.device)
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, expected a number that is not negative")
