"""Launching cuda/w4a16_linear.cu: linear layers of few rows."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qdiff.ops import _cupy
from qdiff.ops.low_rank_down import low_rank_down

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MAX_ROWS = 16
_BLOCK = 32
_TILE = 16  # rows of W
_STEP = 128  # of K; a tile's step is a warp's unit of work
# (warps of a block, units that a warp has under way): the first that fits is taken.
_CONFIGURATIONS = ((16, 4), (8, 4), (8, 2), (4, 2))


class _Params(ctypes.Structure):
    _pointers = ("x", "smooth", "codes", "multipliers", "codebook", "scale", "bias", "low", "up", "y")
    _integers = ("rows", "n", "k", "rank", "block_rows", "bias_type", "low_type", "up_type")
    _fields_ = [(name, ctypes.c_void_p) for name in _pointers] + [(name, ctypes.c_int) for name in _integers]


class _Plan(NamedTuple):
    defines: tuple[tuple[str, int | str], ...]
    block_rows: int
    blocks: int
    threads: int
    shared_bytes: int


def takes(
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
) -> bool:
    """Whether `linear` can compute this: up to 16 rows that fit the shared memory, and K a multiple of 32.

    More rows are better served by the platform's own matrix product.
    """
    k = x.shape[-1]
    if not k or k % _BLOCK or not 0 < x.numel() <= _MAX_ROWS * k or not codes.shape[0]:
        return False
    if (multipliers is not None or codebook is not None) and group_size != _BLOCK:
        return False
    if x.dtype != torch.float16 and _cupy.capability(x.device) < (8, 0):
        return False
    operands = (smooth, codes, multipliers, codebook, scale)
    if any(operand is not None and (operand.data_ptr() % 16 or not operand.is_contiguous()) for operand in operands):
        return False
    weight = _weight(multipliers, codebook)
    return _plan(x.dtype, weight, x.numel() // k, codes.shape[0], k, *_limits(x.device)) is not None


def linear(
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
) -> Tensor:
    """What `qdiff.ops.w4a16_linear` computes, on arguments that it has checked and that `takes` accepts.

    The weights stay integers; it is x * smooth that is rounded to x's dtype, not W * smooth: results agree with the
    reference to that rounding. The low-rank branch's first half is a launch of its own.
    """
    n, k = codes.shape[0], x.shape[-1]
    rows = x.numel() // k
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    low = None if down is None else low_rank_down(x, smooth, down)
    bias, up = (None if tensor is None else tensor.contiguous() for tensor in (bias, up))
    tensors = (x, smooth, codes, multipliers, codebook, scale, bias, low, up, y)
    types = (0 if tensor is None else _TYPES[tensor.dtype] for tensor in (bias, low, up))
    plan = _plan(x.dtype, _weight(multipliers, codebook), rows, n, k, *_limits(x.device))
    assert plan is not None
    params = _Params(
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(rows, n, k, 0 if up is None else up.shape[1], plan.block_rows),
        *types,
    )
    _cupy.kernel("w4a16_linear", plan.defines).launch((plan.blocks, 1, 1), plan.threads, plan.shared_bytes, params)
    return y


@lru_cache(maxsize=4096)
def _plan(
    dtype: torch.dtype, weight: int, rows: int, n: int, k: int, shared_limit: int, multiprocessors: int
) -> _Plan | None:
    """One block a multiprocessor where its part of W fits the shared memory beside x; None where 16 rows do not."""
    computed = 8 if rows <= 8 else 16
    share = -(-n // multiprocessors)
    few = -(-share // _TILE) * -(-k // _STEP) <= 8  # units, that 8 warps do at once
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


def _weight(multipliers: Tensor | None, codebook: Tensor | None) -> int:
    return 4 if multipliers is not None else 5 if codebook is not None else 8


@lru_cache
def _limits(device: torch.device) -> tuple[int, int]:
    return _shared_limit(device), _cupy.multiprocessors(device)


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
