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
_STEP = 128  # of K, that a warp works on at once


class _Params(ctypes.Structure):
    _pointers = ("x", "smooth", "codes", "multipliers", "codebook", "scale", "bias", "low", "up", "y")
    _integers = ("rows", "n", "k", "rank", "bias_type", "low_type", "up_type")
    _fields_ = [(name, ctypes.c_void_p) for name in _pointers] + [(name, ctypes.c_int) for name in _integers]


class _Plan(NamedTuple):
    defines: tuple[tuple[str, int | str], ...]
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
    return _row_bytes(x.dtype, x.numel() // k, k) <= _shared_limit(x.device)


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
    params = _Params(
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(rows, n, k, 0 if up is None else up.shape[1]),
        *types,
    )
    weight = 4 if multipliers is not None else 5 if codebook is not None else 8
    plan = _plan(x.dtype, weight, rows, n, k, _shared_limit(x.device), _cupy.multiprocessors(x.device))
    _cupy.kernel("w4a16_linear", plan.defines).launch((plan.blocks, 1, 1), plan.threads, plan.shared_bytes, params)
    return y


@lru_cache(maxsize=4096)
def _plan(dtype: torch.dtype, weight: int, rows: int, n: int, k: int, shared_limit: int, multiprocessors: int) -> _Plan:
    steps = -(-k // _STEP)
    computed = 8 if rows <= 8 else 16
    # Tiles of 16 features use each piece of x twice; of 8, they spread a small layer over more multiprocessors.
    tiles = 2 if n >= 64 * multiprocessors else 1
    warps = 8 if steps > 4 else 4
    unroll = min(-(-steps // warps), 4 // tiles)
    shared_bytes = _row_bytes(dtype, rows, k)
    # As many blocks as stay resident: registers allow 768 threads, or 512 where there are more sums or parts of x.
    threads = 768 if dtype != torch.float32 and computed * tiles <= 16 else 512
    resident = max(1, min(threads // (32 * warps), shared_limit // (shared_bytes + _static_bytes(computed))))
    defines = (
        ("TYPE", _TYPES[dtype]),
        ("WEIGHT", weight),
        ("ROWS", computed),
        ("TILES", tiles),
        ("WARPS", warps),
        ("UNROLL", unroll),
    )
    return _Plan(defines, min(-(-n // (8 * tiles)), resident * multiprocessors), 32 * warps, shared_bytes)


def _row_bytes(dtype: torch.dtype, rows: int, k: int) -> int:
    """Dynamic shared memory: x in half precision, in three parts if it is float32, padded to whole steps."""
    return rows * (3 if dtype == torch.float32 else 1) * (256 * -(-k // _STEP) + 64)


def _static_bytes(computed_rows: int) -> int:
    return 2 * 8 * computed_rows * 16 * 4 + 1024


def _shared_limit(device: torch.device) -> int:
    """Bytes of dynamic shared memory that a block may have beside the kernel's own."""
    capability = _cupy.capability(device)
    # CUDA programming guide, technical specifications; the least of all for what is not listed.
    large = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
    return large.get(capability, 64 if capability < (8, 0) else 99) * 1024 - _static_bytes(16)


# A cover of what `linear` may ask for: short and long rows of W, small and large layers, few and many rows of x.
VARIANTS = list(
    dict.fromkeys(
        ("w4a16_linear", _plan(dtype, weight, rows, n, k, shared_limit=65536, multiprocessors=108).defines)
        for dtype in _TYPES
        for weight in (4, 5, 8)
        for rows in (1, _MAX_ROWS)
        for n in (320, 10240)
        for k in ((320, 4096) if dtype == torch.float16 else (4096,))
    )
)
