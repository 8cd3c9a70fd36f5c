"""What the matrix kernels compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

MAX_SEGMENTS = 4  # of a convolution's channels, in the kernels' parameters

# A launch that is ready but for the addresses, those of `addresses`, and whether the weights may be read while the
# kernel before still runs (`settled`).
Launch = Callable[[Sequence[int], bool], None]


@dataclass(slots=True)
class Problem:
    """A linear layer is the 1x1 convolution of one image, one pixel high and M wide.

    x is int8 [B, H, W, C] in memory, x_scale float32 [R, S], the weights as the operators take them (`weight_kind` 4:
    multipliers, 5: codebook, 8: int8). up has x_low's dtype.
    """

    x: Tensor
    B: int
    H: int
    W: int
    C: int
    OH: int
    OW: int
    N: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    segments: tuple[int, ...]
    x_scale: Tensor
    weight_kind: int
    codes: Tensor
    multipliers: Tensor | None
    codebook: Tensor | None
    scale: Tensor
    bias: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    x_low: Tensor | None
    up: Tensor | None
    out_dtype: torch.dtype


def is_pointwise(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a convolution takes pixel by pixel what a linear layer takes row by row."""
    return [*kernel, *stride, *padding] == [1, 1, 1, 1, 0, 0]


def addresses(problem: Problem, out: Tensor) -> list[int]:
    """Where the kernels find a problem's tensors, in this order."""
    p = problem
    weights = (p.codes, p.multipliers, p.codebook, p.scale)
    return addresses_of((p.x, *weights, p.bias, p.shift, p.residual, p.x_scale, p.x_low, p.up, out))


def addresses_of(tensors: Sequence[Tensor | None]) -> list[int]:
    """0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """What makes an uninitialized tensor of a shape, strides and a dtype on this device, which must be the current one.

    It is `torch.empty_strided` without the dispatcher: a third of its time.
    """
    try:  # private to torch
        from torch._C._dynamo import guards

        return getattr(guards, f"_empty_strided_{device.type}")  # type: ignore[no-any-return]
    except (ImportError, AttributeError):
        return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


@overload
def dense(x: Tensor) -> Tensor: ...
@overload
def dense(x: None) -> None: ...
def dense(x: Tensor | None) -> Tensor | None:
    """The tensor as kernels read it: contiguous, from a multiple of 16 bytes on; a copy where a view is not."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
