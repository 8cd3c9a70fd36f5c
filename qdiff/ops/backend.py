"""Which implementation an operator on a CUDA device runs: a kernel of `cuda/`, or the reference.

Tensors on other devices always take the reference.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast, get_args

from torch import Tensor

from qdiff.numerics.ranges import LEVELS
from qdiff.ops import _cupy, _shortcut
from qdiff.ops._problem import MAX_SEGMENTS

Backend = Literal["auto", "cuda", "reference"]

# The kernels' block of 4-bit weights that share a multiplier, and what they cut K into.
KERNEL_BLOCK = 32

_told: set[str] = set()


def set_backend(name: Backend) -> None:
    """Choose for the whole process, all threads and devices. The environment's QDIFF_BACKEND chooses at start.

    Args:
        name: "auto", the default: a kernel where there is one for the problem, otherwise the reference, with one
            warning for each reason; "cuda": a kernel, or a RuntimeError with the reason; "reference": the reference.

    Raises:
        ValueError: another name.
    """
    global _backend
    if name not in get_args(Backend):
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(get_args(Backend))}")
    _backend = name
    _shortcut.forget()


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """`set_backend` for the length of a `with` block; process-wide as well."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def runs_kernel(op: str, x: Tensor, refusal: str | None) -> bool:
    """Whether `op` runs its kernel; otherwise it is to run the reference.

    Args:
        op: its name, for messages.
        x: one of its tensors, all on the same device.
        refusal: why the kernels do not take this problem, or None.

    Raises:
        RuntimeError: the backend is "cuda", the device too, and the kernel cannot run.
    """
    if not x.is_cuda or _backend == "reference":
        return False
    subject = op
    if refusal is None:
        refusal = _cupy.unusable(x.get_device())
        if refusal is None:
            return True
        subject = str(x.device)
    message = f"qdiff has no kernel for {subject}: {refusal}"
    if _backend == "cuda":
        raise RuntimeError(message)
    if message not in _told:
        _told.add(message)
        warnings.warn(f"{message}; the reference runs instead, which is slower", RuntimeWarning, stacklevel=2)
    return False


def refuses_linear(k: int, group_size: int, weight_is_4bit: bool) -> str | None:
    """Why the matrix kernels do not take a linear layer with K = k, or None."""
    if k % KERNEL_BLOCK or k == 0:
        return f"input width {k}, expected a multiple of {KERNEL_BLOCK}"
    if weight_is_4bit and group_size != KERNEL_BLOCK:
        return f"group_size {group_size}, expected {KERNEL_BLOCK}"
    return None


def refuses_levels(levels: int) -> str | None:
    """Why the quantizing kernels do not take activations with this largest code, or None."""
    return None if levels == LEVELS else f"activations with codes to {levels}, expected {LEVELS} (8 bits)"


def refuses_conv(segments: Sequence[int]) -> str | None:
    """Why the matrix kernels do not take a convolution of these channel segments, or None."""
    return (
        f"{len(segments)} channel segments, expected {MAX_SEGMENTS} or fewer" if len(segments) > MAX_SEGMENTS else None
    )


_backend: Backend = "auto"
set_backend(cast(Backend, os.environ.get("QDIFF_BACKEND", "auto")))
