"""Launching cuda/w4a16_linear.cu: linear layers of few rows."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from qdiff.ops import _cupy
from qdiff.ops._launch import Launcher
from qdiff.ops._problem import addresses_of, allocator, dense
from qdiff.ops._settled import settled
from qdiff.ops._shortcut import offer
from qdiff.ops.checks import Checked
from qdiff.ops.low_rank_down import low_rank_down

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MAX_ROWS = 16
_BLOCK = 32
_TILE = 16  # rows of W
_STEP = 128  # of K; a tile's step is a warp's unit of work
# (warps of a block, units that a warp has under way): the first that fits is taken, of all but the first where a block
# has few units.
_CONFIGURATIONS = ((16, 3), (8, 4), (8, 2), (4, 2))
_FEW = 16

_INTEGERS = struct.Struct("8i")  # the kernel's, after ten pointers and whether to read weights early


class _Plan(NamedTuple):
    defines: tuple[tuple[str, int | str], ...]
    block_rows: int
    blocks: int
    threads: int
    shared_bytes: int

    def launcher(self, layout: struct.Struct, integers: bytes) -> Launcher:
        kernel = _cupy.kernel("w4a16_linear", self.defines)
        return kernel.launcher((self.blocks, 1, 1), self.threads, self.shared_bytes, layout, integers)


class _Ready:
    """What a call leaves for those of its kind whose tensors need no copy."""

    def __init__(
        self,
        plan: _Plan,
        x: Tensor,
        n: int,
        smooth: Tensor | None,
        weight: tuple[Tensor | None, ...],
        bias: Tensor | None,
        up: Tensor | None,
    ) -> None:
        rows, k = x.numel() // x.shape[-1], x.shape[-1]
        # `low` has x's type.
        types = (0 if bias is None else _TYPES[bias.dtype], _TYPES[x.dtype], 0 if up is None else _TYPES[up.dtype])
        integers = _INTEGERS.pack(rows, n, k, 0 if up is None else up.shape[1], plan.block_rows, *types)
        pointers = (x, smooth, *weight, bias, up, up, x)  # or what else is there when they are: low, y
        layout = struct.Struct("".join("8x" if tensor is None else "Q" for tensor in pointers) + "Q")
        self._launch, self._empty = plan.launcher(layout, integers), allocator(x.device)
        self._smoothed, self._projected = smooth is not None, up is not None
        first = 1 + self._smoothed
        self._weights = slice(first, first + sum(part is not None for part in weight[:3]))  # all but the scale
        y = torch.empty((*x.shape[:-1], n), device="meta")
        self._y = tuple(y.shape), y.stride(), x.dtype

    def __call__(self, given: Sequence[Tensor]) -> Tensor | None:
        """y for x, smooth, codes, multipliers, codebook, scale, bias, up and down, as many as there are, contiguous;
        None where one of them needs a copy to start at a multiple of 16 bytes."""
        places = [tensor.data_ptr() for tensor in given]
        if reduce(or_, places) % 16:
            return None
        y = self._empty(*self._y)
        if self._projected:
            low = low_rank_down(given[0], given[1] if self._smoothed else None, given[-1])
            places[-2:] = low.data_ptr(), places[-2]
        self._launch(*places, y.data_ptr(), settled(tuple(given[self._weights])))
        return y


def linear(
    known: Checked,
    x: Tensor,
    smooth: Tensor | None,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> Tensor | None:
    """What `qdiff.ops.w4a16_linear` computes, on checked CUDA arguments; None for what this kernel does not take.

    It takes up to 16 rows that fit the shared memory, and K a multiple of 32: more rows are better served by the
    platform's own matrix product. The weights stay integers; it is x * smooth that is rounded to x's dtype, not
    W * smooth: results agree with the reference to that rounding. The low-rank branch's first half is a launch of its
    own.
    """
    weight = (codes, multipliers, codebook, scale)
    if "ready" not in known.prepared:
        known.prepared["ready"] = _prepare(x, smooth, weight, group_size, bias, up)
    ready: _Ready | None = known.prepared["ready"]
    if ready is None or reduce(or_, addresses_of((smooth, *weight))) % 16:
        return None
    given = (dense(x), smooth, *weight, dense(bias), dense(up), dense(down))
    offer(given, ready)
    return ready([tensor for tensor in given if tensor is not None])


def _prepare(
    x: Tensor,
    smooth: Tensor | None,
    weight: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
    group_size: int,
    bias: Tensor | None,
    up: Tensor | None,
) -> _Ready | None:
    codes, multipliers, codebook, _ = weight
    k, n = x.shape[-1], codes.shape[0]
    if not k or k % _BLOCK or not 0 < x.numel() <= _MAX_ROWS * k or not n:
        return None
    if (multipliers is not None or codebook is not None) and group_size != _BLOCK:
        return None
    if x.dtype != torch.float16 and _cupy.capability(x.device) < (8, 0):
        return None
    if not all(part is None or part.is_contiguous() for part in (smooth, *weight)):
        return None
    rows, kind = x.numel() // k, 4 if multipliers is not None else 5 if codebook is not None else 8
    plan = _plan(x.dtype, kind, rows, n, k, _shared_limit(x.device), _cupy.multiprocessors(x.device))
    return None if plan is None else _Ready(plan, x, n, smooth, weight, bias, up)


def _plan(
    dtype: torch.dtype, weight: int, rows: int, n: int, k: int, shared_limit: int, multiprocessors: int
) -> _Plan | None:
    """One block a multiprocessor where its part of W fits the shared memory beside x; None where 16 rows do not."""
    computed = 8 if rows <= 8 else 16
    share = -(-n // multiprocessors)
    few = -(-share // _TILE) * -(-k // _STEP) <= _FEW
    for warps, stages in _CONFIGURATIONS[few:]:
        for block_rows in (-(-share // rounds) for rounds in range(1, -(-share // _TILE) + 1)):
            shared_bytes = _shared_bytes(dtype, weight, rows, k, block_rows, warps, stages)
            if shared_bytes <= shared_limit:
                defines = (
                    ("TYPE", _TYPES[dtype]),
                    ("WEIGHT", weight),
                    ("ROWS", computed),
                    ("WARPS", warps),
                    ("STAGES", stages),
                )
                return _Plan(defines, block_rows, -(-n // block_rows), 32 * warps, shared_bytes)
    return None


def _shared_bytes(dtype: torch.dtype, weight: int, rows: int, k: int, block_rows: int, warps: int, stages: int) -> int:
    """What cuda/w4a16_linear.cu says: x in half precision, codes, sums, and what lies beside the codes."""
    x = rows * (3 if dtype == torch.float32 else 1) * (256 * -(-k // _STEP) + 64)
    tiles = -(-block_rows // _TILE)
    beside = {4: -(-k // (2 * _BLOCK)), 5: 16, 8: 0}[weight]
    stage = 2048 if weight == 8 else 1024
    return x + warps * stages * stage + (warps + tiles) * rows * _TILE * 4 + tiles * _TILE * beside + 32


def _shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    capability = _cupy.capability(device)
    # CUDA programming guide, technical specifications; the least of all for what is not listed.
    large = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
    return large.get(capability, 64 if capability < (8, 0) else 99) * 1024


# A cover of what `linear` may ask for: small and large layers, few and many rows of x, with and without much room.
VARIANTS = list(
    dict.fromkeys(
        ("w4a16_linear", plan.defines)
        for dtype in _TYPES
        for weight in (4, 5, 8)
        for rows in (1, _MAX_ROWS)
        for k, shared_limit in ((128, 65536), (1024, 232448), (1024, 65536), (1024, 53248), (1024, 49152))
        if (plan := _plan(dtype, weight, rows, 10240, k, shared_limit, multiprocessors=80)) is not None
    )
)
