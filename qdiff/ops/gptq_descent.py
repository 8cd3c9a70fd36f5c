"""A block of GPTQ's columns, improved one after the other."""

import torch
from torch import Tensor

from qdiff.ops import _gptq_cuda
from qdiff.ops.backend import runs_kernel
from qdiff.ops.gptq_feedback import check_columns
from qdiff.ops.registry import operator


def _fake(
    codes: Tensor, errors: Tensor, gradient: Tensor, steps: Tensor, within: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    return codes.new_empty(codes.shape), codes.new_empty(codes.shape)


@operator(_fake)
def gptq_descent(
    codes: Tensor, errors: Tensor, gradient: Tensor, steps: Tensor, within: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Move B columns in turn to where e H e^T is least, all other columns as they are.

    For i = 0, 1, ...: better_i = round(code_i + gradient_i / (step_i * within_ii)), half to even, in [low, high];
    change_i = (better_i - code_i) * step_i; error_i -= change_i; gradient_j -= within_ij * change_i for all j > i. The
    N rows of the weight know nothing of each other. The last of these is rounded once, as `torch.Tensor.addr_` does
    where the CPU has such an instruction.

    Args:
        codes: float32 or (without a kernel) float64 [B, N], whole numbers; a *column* of the weight is a row here. The
            kernel takes B up to 128.
        errors: [B, N] of the same dtype, weight - codes * steps.
        gradient: [B, N], H e of these columns, with the errors of all columns: half the gradient of e H e^T, finite.
        steps: [B, N], positive.
        within: [B, B], any strides: H between these columns, its diagonal positive; what lies below it is not used.
        low, high: the least and the largest code.

    Returns:
        the better codes and their errors: [B, N] of the same dtype, contiguous.
    """
    check_columns(codes=codes, errors=errors, gradient=gradient, steps=steps, within=within)
    if runs_kernel("gptq_descent", codes, _gptq_cuda.refusal(codes)):
        return _gptq_cuda.descent(codes, errors, gradient, steps, within, low, high)
    codes, errors, gradient = (
        value.clone(memory_format=torch.contiguous_format) for value in (codes, errors, gradient)
    )
    for i in range(len(codes)):
        better = (codes[i] + gradient[i] / (steps[i] * within[i, i])).round_().clamp_(low, high)
        change = (better - codes[i]) * steps[i]
        codes[i], errors[i] = better, errors[i] - change
        gradient[i + 1 :].addr_(within[i, i + 1 :], change, alpha=-1)
    return codes, errors
