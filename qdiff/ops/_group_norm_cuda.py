"""Launching the two kernels of a group norm: cuda/group_norm_sums.cu, then cuda/quantize_group_norm.cu."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import reduce
from itertools import product
from math import gcd
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from qdiff.ops import _cupy
from qdiff.ops._problem import allocator, dense
from qdiff.ops._sample_scales import MAX_SEGMENTS, ends_of, in_few_segments
from qdiff.ops._shortcut import offer
from qdiff.ops.checks import Checked

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_THREADS = 512  # of a block at most, as the kernels say
_COLUMNS = _THREADS // 2  # of them side by side: fewer leave a smaller rest idle
# Blocks of a multiprocessor at once, as the kernels' registers let them: one wave of them has all of the pixels.
_SUMS_RESIDENT, _CODES_RESIDENT = 1, {torch.float32: 1, torch.float16: 2, torch.bfloat16: 2}

# The kernels' integers, after their pointers; to a multiple of 8 bytes, as the pointers make the struct.
_SUMS = struct.Struct("10i")
_CODES = struct.Struct(f"{13 + MAX_SEGMENTS}if")

_Defines = tuple[tuple[str, int | str], ...]


class _Plan(NamedTuple):
    """What follows from shapes.

    Attributes:
        values: neighbouring channels of a thread.
        slice: groups of a block.
        columns, lanes: threads of a block.
        part, run: pixels of a block of the first kernel, and of the second.
    """

    values: int
    slice: int
    columns: int
    lanes: int
    part: int
    run: int


class _Ready:
    """What a call leaves for those of its kind whose tensors need no copy.

    Args:
        others: weight, bias, scale and smooth; without a scale there are no codes but values.
    """

    def __init__(
        self,
        x: Tensor,
        groups: int,
        others: Sequence[Tensor | None],
        eps: float,
        silu: bool,
        segments: tuple[int, ...],
    ) -> None:
        scale = others[2]
        batch, channels = x.shape[:2]
        pixels, multiprocessors = x.shape[2] * x.shape[3], _cupy.multiprocessors(x.device)
        waves = multiprocessors * _SUMS_RESIDENT, multiprocessors * _CODES_RESIDENT[x.dtype]
        plan = _plan(batch, channels, pixels, groups, segments, waves)
        assert plan is not None, "the kernels take it"
        first, second = _defines(_TYPES[x.dtype], plan.values, silu, scale is not None)
        slices, parts, runs = _ceil(groups, plan.slice), _ceil(pixels, plan.part), _ceil(pixels, plan.run)
        threads = _ceil(plan.lanes * plan.columns, 32) * 32
        block = (channels // groups, plan.slice, plan.columns, plan.lanes, _ceil(1 << 20, plan.columns))
        shape = (channels, pixels, groups, *block)
        samples_per_row = batch if scale is None else batch // scale.shape[0]
        rest = (plan.run, parts, plan.part, samples_per_row, len(segments), *ends_of(segments, channels), eps)
        self._sums = _cupy.kernel("group_norm_sums", first).launcher(
            (batch, slices, parts), threads, 0, struct.Struct("2Q"), _SUMS.pack(*shape, plan.part, parts)
        )
        pointers = struct.Struct("2Q" + "".join("8x" if one is None else "Q" for one in others) + "Q")
        self._values = _cupy.kernel("quantize_group_norm", second).launcher(
            (batch, slices, runs), threads, 0, pointers, _CODES.pack(*shape, *rest)
        )
        self._empty = allocator(x.device)
        # float2 each: what the first kernel tells the second.
        self._partial = (batch * groups * parts, 2), (2, 1), torch.float32
        like = torch.empty(x.shape, dtype=_out_dtype(x, scale), device="meta", memory_format=torch.channels_last)
        self._out = tuple(x.shape), like.stride(), like.dtype

    def __call__(self, given: Sequence[Tensor]) -> Tensor | None:
        """The result for x and what else there is, or None where they need copies."""
        places = [tensor.data_ptr() for tensor in given]
        if reduce(or_, places) % 16:
            return None
        out, partial = self._empty(*self._out), self._empty(*self._partial)
        x, between = places[0], partial.data_ptr()
        self._sums(x, between)
        self._values(x, between, *places[1:], out.data_ptr())
        return out


def group_norm(
    known: Checked,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None = None,
    smooth: Tensor | None = None,
    segments: Sequence[int] = (),
) -> Tensor:
    """What `quantize_group_norm` of `qdiff.ops` computes, or without a scale `group_norm`, on checked arguments on the
    current CUDA device."""
    if not x.numel():
        return torch.empty_like(x, dtype=_out_dtype(x, scale), memory_format=torch.channels_last)
    if scale is not None:
        scale, segments = in_few_segments(scale, segments)
    # Values are read 16 bytes at a time: views that start anywhere are copied.
    pixels = dense(x.permute(0, 2, 3, 1))
    if pixels.data_ptr() != x.data_ptr():
        x = pixels.permute(0, 3, 1, 2)
    others = (dense(weight), dense(bias), dense(scale), dense(smooth))
    ready: _Ready | None = known.prepared.get("ready")
    if ready is None:
        ready = known.prepared["ready"] = _Ready(x, groups, others, eps, silu, tuple(segments))
    given = [tensor for tensor in (x, *others) if tensor is not None]
    out = ready(given)
    assert out is not None, "its tensors need no copy"
    offer(given, ready)
    return out


def _out_dtype(x: Tensor, scale: Tensor | None) -> torch.dtype:
    return x.dtype if scale is None else torch.int8


def refuses_group_norm(channels: int, groups: int, segments: Sequence[int]) -> str | None:
    """Why the kernels do not take a group norm of these channels, or None."""
    if _slice(channels, groups, tuple(segments)) is not None:
        return None
    return (
        f"{channels // groups} channels a group of {channels}, expected {_COLUMNS} or fewer; {8 * _COLUMNS} where 8 "
        f"divides the channels and each of the segments {list(segments)}"
    )


def _plan(
    batch: int, channels: int, pixels: int, groups: int, segments: tuple[int, ...], waves: tuple[int, int]
) -> _Plan | None:
    """waves: blocks that the device runs at once, of the first kernel and of the second."""
    found = _slice(channels, groups, segments)
    if found is None:
        return None
    values, of_block = found
    columns = of_block * (channels // groups) // values
    lanes = min(_THREADS // columns, pixels)
    blocks = batch * _ceil(groups, of_block)

    part, run = (lanes * _ceil(pixels, lanes * max(1, wave // blocks)) for wave in waves)
    return _Plan(values, of_block, columns, lanes, part, run)


def _slice(channels: int, groups: int, segments: tuple[int, ...]) -> tuple[int, int] | None:
    """The neighbouring channels of a thread, and the groups of a block; None where not even one fits."""
    width = channels // groups
    for values in (8, 1):
        together = values // gcd(values, width)  # groups that have whole threads
        most = _COLUMNS * values // width // together * together
        if channels % values == 0 and not any(segment % values for segment in segments) and most:
            return values, _ceil(_ceil(groups, _ceil(groups, most)), together) * together
    return None


def _defines(dtype: int, values: int, silu: bool, codes: bool) -> tuple[_Defines, _Defines]:
    shared: _Defines = (("TYPE", dtype), ("VALUES", values))
    return shared, (*shared, ("SILU", int(silu)), ("CODES", int(codes)))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


_ALL = [_defines(*macros) for macros in product(_TYPES.values(), (8, 1), (True, False), (True, False))]
# What the functions above may ask for.
VARIANTS: list[tuple[str, _Defines]] = list(
    dict.fromkeys(
        pair for first, second in _ALL for pair in (("group_norm_sums", first), ("quantize_group_norm", second))
    )
)
