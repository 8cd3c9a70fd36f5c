"""Launching cuda/gptq_feedback.cu and cuda/gptq_descent.cu: a block of GPTQ's columns in one kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from qdiff.ops import _cupy

MOST_COLUMNS = 128
_LANES = 8  # threads of a row
_SHARED_BYTES = 512  # a column
# Threads of a block: the fewer, the sooner all multiprocessors have one; the more, the fewer copies of the columns'
# matrix, of which a multiprocessor holds one to three.
_FEW, _MANY = 128, 256


def _params(*pointers: str) -> list[tuple[str, type]]:
    sizes = [(name, ctypes.c_int) for name in ("columns", "rows", "stride")]
    return [(name, ctypes.c_void_p) for name in pointers] + sizes + [("low", ctypes.c_float), ("high", ctypes.c_float)]


class _Feedback(ctypes.Structure):
    _fields_ = _params("target", "weight", "step", "within", "codes", "errors")


class _Descent(ctypes.Structure):
    _fields_ = _params("codes", "errors", "gradient", "step", "within", "new_codes", "new_errors")


def refusal(values: Tensor) -> str | None:
    """Why the kernels do not take columns like these, or None."""
    if values.dtype != torch.float32:
        return f"{values.dtype}, expected torch.float32"
    return f"{len(values)} columns, expected {MOST_COLUMNS} or fewer" if len(values) > MOST_COLUMNS else None


def feedback(
    target: Tensor, weight: Tensor, steps: Tensor, within: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """What `qdiff.ops.gptq_feedback` computes, on checked arguments on the current CUDA device."""
    return _launch("gptq_feedback", _Feedback, (target, weight, steps), within, low, high)


def descent(
    codes: Tensor, errors: Tensor, gradient: Tensor, steps: Tensor, within: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """What `qdiff.ops.gptq_descent` computes, on checked arguments on the current CUDA device."""
    return _launch("gptq_descent", _Descent, (codes, errors, gradient, steps), within, low, high)


def _launch(
    source: str, params: type[ctypes.Structure], values: tuple[Tensor, ...], within: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    values, within = tuple(value.contiguous() for value in values), _in_chunks(within)
    columns, rows = values[0].shape
    results = torch.empty_like(values[0]), torch.empty_like(values[0])
    pointers = [tensor.data_ptr() for tensor in (*values, within, *results)]
    packed = params(*pointers, columns, rows, within.stride(0), low, high)
    threads = _FEW if rows * _LANES <= 2 * _FEW * _cupy.multiprocessors(within.device) else _MANY
    blocks = -(-rows * _LANES // threads)
    _cupy.kernel(source).launch((blocks, 1, 1), threads, columns * _SHARED_BYTES, packed)
    return results


def _in_chunks(within: Tensor) -> Tensor:
    """The matrix as it is where its rows are whole, aligned chunks of 16 bytes; otherwise a copy with wider rows."""
    columns = len(within)
    if not (columns % 4 or within.stride(0) % 4 or within.data_ptr() % 16) and within.stride(1) == 1:
        return within
    wider = within.new_zeros(columns, -(-columns // 4) * 4)
    wider[:, :columns] = within
    return wider


VARIANTS = (("gptq_feedback", ()), ("gptq_descent", ()))
