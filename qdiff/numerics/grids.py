"""Uniform grids: which real numbers a code can stand for.

    x ~ scale * (code - zero_point),  low <= code <= high

Symmetric grids have zero_point 0 and as many codes on either side of it; asymmetric ones place the zero where the data
need it. Zero is always on the grid. How much of a tensor shares one scale is its granularity:

    "tensor"   all of it                 scale []
    "channel"  a slice of dimension 0    scale [N, 1, ...]
    "token"    a row of the last one     scale [..., 1]
    "group"    `group_size` neighbours in the last dimension, seen as [..., K/g, g]: scale [..., K/g, 1]
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Granularity = Literal["tensor", "channel", "token", "group"]

# A step below this has a reciprocal beyond float32.
_SMALLEST_STEP = 1e-38


class Grid(NamedTuple):
    """A uniform grid.

    Attributes:
        scale: float32, positive; its shape broadcasts against the (grouped) tensor.
        zero_point: float32 of the same shape, whole numbers; zeros for a symmetric grid.
        low, high: the first and last code.
        group_size: for granularity "group", else None.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    group_size: int | None = None


def symmetric_grid(x: Tensor, bits: int, granularity: Granularity = "tensor", group_size: int | None = None) -> Grid:
    """The smallest symmetric grid that covers x: codes -(2^(bits-1) - 1) to 2^(bits-1) - 1, zero_point 0.

    All-zero parts get scale 1. x: float, finite; bits: 2 to 8.
    """
    high = 2 ** (_checked(bits) - 1) - 1
    seen, dims = _reduced(x, granularity, group_size)
    scale = _positive(seen.abs().amax(dim=dims, keepdim=granularity != "tensor") / high)
    return Grid(scale, torch.zeros_like(scale), -high, high, group_size)


def asymmetric_grid(x: Tensor, bits: int, granularity: Granularity = "tensor", group_size: int | None = None) -> Grid:
    """The smallest asymmetric grid that covers x and 0: codes 0 to 2^bits - 1.

    All-zero parts get scale 1. x: float, finite; bits: 2 to 8.
    """
    high = 2 ** _checked(bits) - 1
    seen, dims = _reduced(x, granularity, group_size)
    keep = granularity != "tensor"
    least, most = seen.amin(dim=dims, keepdim=keep).clamp_max(0), seen.amax(dim=dims, keepdim=keep).clamp_min(0)
    # Divided before they are subtracted: most - least may overflow.
    scale = _positive(most / high - least / high)
    return Grid(scale, (-least / scale).round().clamp(0, high), 0, high, group_size)


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """code = clamp(round(x / scale) + zero_point, low, high), rounding half to even: int8 or uint8, of x's shape.

    Laws, with y = dequantize(quantize(x)): |x - y| <= scale / 2 inside a symmetric grid's range, and <= scale inside an
    asymmetric one's, whose rounded zero may push an end out by half a step (all up to rounding in float32); quantize(y)
    == quantize(x); x = 0 gives y = 0; x <= x' gives code <= code'.
    """
    steps = (_grouped(x.float(), grid.group_size) / grid.scale).round_()
    codes = steps.add_(grid.zero_point).clamp_(grid.low, grid.high)
    return codes.to(torch.int8 if grid.low < 0 else torch.uint8).view(x.shape)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """scale * (code - zero_point): float32, of the codes' shape."""
    return ((_grouped(codes, grid.group_size) - grid.zero_point) * grid.scale).view(codes.shape)


def _reduced(x: Tensor, granularity: str, group_size: int | None) -> tuple[Tensor, list[int]]:
    if (granularity == "group") != (group_size is not None):
        raise ValueError(
            f"group_size: got {group_size} with granularity {granularity!r}, expected one with 'group' only"
        )
    seen = _grouped(x.float(), group_size)
    if granularity in ("token", "group"):
        return seen, [-1]
    if granularity == "channel":
        return seen, list(range(1, seen.dim()))
    if granularity != "tensor":
        raise ValueError(f"granularity: got {granularity!r}, expected 'tensor', 'channel', 'token' or 'group'")
    return seen, list(range(seen.dim()))


def _grouped(x: Tensor, group_size: int | None) -> Tensor:
    if group_size is None:
        return x
    if group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(f"group_size: got {group_size} for a last dimension of {x.shape[-1]}, expected a divisor")
    return x.unflatten(-1, (-1, group_size))


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale.clamp_min(_SMALLEST_STEP), 1.0)


def _checked(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: got {bits}, expected 2 to 8")
    return bits
