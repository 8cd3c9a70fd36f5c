"""A block of GPTQ's columns, rounded one after the other."""

import torch
from torch import Tensor

from qdiff.ops import _gptq_cuda
from qdiff.ops.backend import runs_kernel
from qdiff.ops.checks import check_tensor
from qdiff.ops.registry import operator

_DTYPES = (torch.float32, torch.float64)


def _fake(target: Tensor, weight: Tensor, steps: Tensor, within: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    return target.new_empty(target.shape), target.new_empty(target.shape)


@operator(_fake)
def gptq_feedback(
    target: Tensor, weight: Tensor, steps: Tensor, within: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Round B columns in turn, each with the errors of those before it (GPTQ, arXiv 2210.17323, algorithm 1).

    For i = 0, 1, ...: code_i = round(target_i / step_i), half to even, in [low, high]; error_i = weight_i - code_i *
    step_i; target_j += within_ij * error_i for all j > i. The N rows of the weight know nothing of each other. The last
    of these is rounded once, as `torch.Tensor.addr_` does where the CPU has such an instruction.

    Args:
        target: float32 or (without a kernel) float64 [B, N], finite; a *column* of the weight is a row here. The
            kernel takes B up to 128.
        weight: [B, N] of the same dtype, what the errors are counted from.
        steps: [B, N], positive.
        within: [B, B], any strides; what lies above its diagonal is used.
        low, high: the least and the largest code.

    Returns:
        codes, whole numbers, and errors: [B, N] of the same dtype, contiguous.
    """
    check_columns(target=target, weight=weight, steps=steps, within=within)
    if runs_kernel("gptq_feedback", target, _gptq_cuda.refusal(target)):
        return _gptq_cuda.feedback(target, weight, steps, within, low, high)
    target = target.clone()
    codes, errors = (torch.empty_like(target, memory_format=torch.contiguous_format) for _ in range(2))
    for i in range(len(target)):
        codes[i] = (target[i] / steps[i]).round_().clamp_(low, high)
        errors[i] = weight[i] - codes[i] * steps[i]
        target[i + 1 :].addr_(within[i, i + 1 :], errors[i])
    return codes, errors


def check_columns(within: Tensor, **values: Tensor) -> None:
    """Raise a ValueError unless the values are floats [B, N] of one kind and `within` is [B, B]."""
    name, first = next(iter(values.items()))
    if first.dtype not in _DTYPES or first.dim() != 2:
        raise ValueError(f"{name}: got {first.dtype} {tuple(first.shape)}, expected float32 or float64 [B, N]")
    for name, value in values.items():
        check_tensor(name, value, (first.dtype,), first.shape, first.device)
    check_tensor("within", within, (first.dtype,), (len(first), len(first)), first.device)
