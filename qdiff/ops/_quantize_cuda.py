"""Launching the kernels that quantize activations: cuda/quantize_per_token*.cu and cuda/quantize_per_sample.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, count
from typing import NamedTuple

import torch
from torch import Tensor

from qdiff.ops import _cupy
from qdiff.ops.low_rank_down import low_rank_down

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MAX_SEGMENTS = 8
_MAX_RANK = 128
_TILE = 64  # of pixels and of channels, where channels are turned from first to last
_MAX_SPLIT = 8  # blocks of a cluster that any GPU with clusters takes
_SHARED_BYTES = (64 * 1024, 96 * 1024)  # of a block, that GPUs without and with clusters have
# Slices of 32 values in K that a block of `quantize_per_token_down` has at most, where there are clusters, and a warp.
_BLOCK_SLICES, _WARP_SLICES = 20, 2
# Threads that keep a multiprocessor's memory pipes busy. Work for fewer is spread as thinly as it goes.
_THREADS = 2048


class _Plan(NamedTuple):
    """A launch, as far as it follows from shapes."""

    source: str
    defines: tuple[tuple[str, int | str], ...]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0

    def run(self, params: ctypes.Structure) -> None:
        _cupy.kernel(self.source, self.defines).launch(self.grid, self.threads, self.shared_bytes, params)


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


def _ints(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int) for name in names]


class _Token(ctypes.Structure):
    _fields_ = _pointers("x", "smooth", "codes", "scale") + _ints("rows", "k")


class _TokenDown(ctypes.Structure):
    _fields_ = _pointers("x", "smooth", "down", "codes", "scale", "low") + _ints("rows", "k", "rank")


class _Sample(ctypes.Structure):
    _fields_ = [
        *_pointers("x", "scale", "smooth", "codes"),
        *_ints("channels", "pixels", "samples_per_row", "segments"),
        ("ends", ctypes.c_int * _MAX_SEGMENTS),
        *_ints("columns", "run", "runs"),
    ]


def quantize_per_token(x: Tensor, smooth: Tensor | None, down: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What `qdiff.ops.quantize_per_token` computes, on checked arguments on the current CUDA device."""
    x, smooth = x.contiguous(), _contiguous(smooth)
    dtype, device, (*shape, k) = x.dtype, x.device, x.shape
    rows, multiprocessors = x.numel() // k, _cupy.multiprocessors(device)
    codes = torch.empty_like(x, dtype=torch.int8)
    scale = torch.empty(shape, dtype=torch.float32, device=device)
    places = (x.data_ptr(), _address(smooth))
    aligned = not (places[0] | places[1]) % 16
    if down is not None and aligned and _fuses(device, dtype, k, down.shape[0]):
        down = down.to(dtype).contiguous()
        if not down.data_ptr() % 16:
            rank = down.shape[0]
            low = torch.empty((*shape, rank), dtype=dtype, device=device)
            clusters = _cupy.capability(device) >= (9, 0)
            plan = _token_down_plan(_TYPES[dtype], rows, k, rank, clusters, multiprocessors)
            results = (codes.data_ptr(), scale.data_ptr(), low.data_ptr())
            plan.run(_TokenDown(*places, down.data_ptr(), *results, rows, k, rank))
            return codes, scale, low
    plan = _token_plan(_TYPES[dtype], rows, k, aligned and k % 8 == 0, multiprocessors)
    plan.run(_Token(*places, codes.data_ptr(), scale.data_ptr(), rows, k))
    if down is None:
        return codes, scale, torch.empty((*shape, 0), dtype=dtype, device=device)
    return codes, scale, low_rank_down(x, smooth, down)


def quantize_per_sample(
    x: Tensor, scale: Tensor, smooth: Tensor | None, segments: Sequence[int], channel_dim: int
) -> Tensor:
    """What `qdiff.ops.quantize_per_sample` computes, on checked arguments on the current CUDA device."""
    channel_dim %= x.dim()
    if x.dim() == 4 and channel_dim == 1:
        # What has one pixel or one channel is in both orders: then there is nothing to turn.
        turned = not x.is_contiguous(memory_format=torch.channels_last) and x.is_contiguous()
        if not turned:
            x = x.contiguous(memory_format=torch.channels_last)
        codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.channels_last)
        _quantize_samples(x, codes, x.shape[1], turned, scale, smooth, segments)
        return codes
    if channel_dim != x.dim() - 1:
        last = quantize_per_sample(x.movedim(channel_dim, -1), scale, smooth, segments, -1)
        return last.movedim(-1, channel_dim).contiguous()
    x = x.contiguous()
    codes = torch.empty_like(x, dtype=torch.int8)
    _quantize_samples(x, codes, x.shape[-1], False, scale, smooth, segments)
    return codes


def _quantize_samples(
    x: Tensor,
    codes: Tensor,
    channels: int,
    turned: bool,
    scale: Tensor,
    smooth: Tensor | None,
    segments: Sequence[int],
) -> None:
    if not x.numel():
        return
    if len(segments) > _MAX_SEGMENTS:
        columns = [column[:, None].expand(-1, width) for column, width in zip(scale.unbind(1), segments)]
        scale, segments = torch.cat(columns, dim=1), (1,) * channels
    scale, smooth = scale.contiguous(), _contiguous(smooth)
    batch, scale_rows = x.shape[0], scale.shape[0]
    pixels, samples_per_row = x.numel() // (batch * channels), batch // scale_rows
    if not turned:  # samples that share their scales are one after the other: one sample of more pixels
        batch, pixels, samples_per_row = scale_rows, pixels * samples_per_row, 1
    address = x.data_ptr()
    plan, ends, tail = _sample_plan(
        _TYPES[x.dtype], batch, pixels, turned, not address % 16, tuple(segments), _cupy.multiprocessors(x.device)
    )
    places = (address, scale.data_ptr(), _address(smooth), codes.data_ptr())
    plan.run(_Sample(*places, channels, pixels, samples_per_row, len(segments), ends, *tail))


@lru_cache(maxsize=4096)
def _token_plan(dtype: int, rows: int, k: int, vectors_fit: bool, multiprocessors: int) -> _Plan:
    chunks = k // 8
    # Four or six chunks a thread hide the memory's latency; where there is not that much work, one or two each.
    most = (6 if dtype else 4) if rows * chunks > 2 * _THREADS * multiprocessors else 2
    lanes = 8
    while lanes * most < chunks and lanes < 512:
        lanes *= 2
    vectors = _ceil(chunks, lanes)
    if not vectors_fit or vectors > (8 if dtype else 7):
        lanes, vectors = 32 if k <= 1024 else 256, 0
    threads = max(128, lanes)
    defines = (("TYPE", dtype), ("LANES", lanes), ("VECTORS", vectors), ("THREADS", threads))
    return _Plan("quantize_per_token", defines, (_ceil(rows, threads // lanes), 1, 1), threads)


@lru_cache(maxsize=4096)
def _token_down_plan(dtype: int, rows: int, k: int, rank: int, clusters: bool, multiprocessors: int) -> _Plan:
    rank_tiles, slices = _ceil(rank, 8), k // 32
    # Two tiles of 16 rows halve what is read of `down`. Where there are few rows, or many sums, a block has one.
    few = 16 * multiprocessors // (_MAX_SPLIT if clusters else 1)
    row_tiles = 1 if rank_tiles > 8 or rows <= few else 2
    groups, split = _ceil(rows, 16 * row_tiles), 1
    # Blocks of a cluster share the K axis: few rows then keep all multiprocessors busy, and several blocks fit one.
    while (
        clusters
        and split < min(_MAX_SPLIT, slices)
        and (slices > _BLOCK_SLICES * split or 2 * groups * split <= multiprocessors)
    ):
        split *= 2
    widest = 16 if row_tiles * rank_tiles <= 8 else 8
    for batches in count(1):
        warps = min(_ceil(slices, split * batches * _WARP_SLICES), widest)
        of_warp = _ceil(slices, split * batches * warps)
        shared_bytes = _token_down_bytes(row_tiles, rank_tiles, split, warps, of_warp)
        if shared_bytes <= _SHARED_BYTES[clusters]:
            break
    tiles = (("ROW_TILES", row_tiles), ("RANK_TILES", rank_tiles))
    defines = (("TYPE", dtype), *tiles, ("SPLIT", split), ("WARPS", warps), ("SLICES", of_warp))
    return _Plan("quantize_per_token_down", defines, (groups * split, 1, 1), 32 * warps, shared_bytes)


def _token_down_bytes(row_tiles: int, rank_tiles: int, split: int, warps: int, slices: int) -> int:
    """The size of the kernel's `Shared`."""
    sums = row_tiles * rank_tiles
    of_warp = slices * (1024 * row_tiles + 128) + 512 * max(slices * rank_tiles, sums) + 64 * row_tiles
    return warps * of_warp + 512 * sums + 64 * row_tiles * split + 16


@lru_cache(maxsize=4096)
def _sample_plan(
    dtype: int,
    batch: int,
    pixels: int,
    turned: bool,
    aligned: bool,
    segments: tuple[int, ...],
    multiprocessors: int,
) -> tuple[_Plan, ctypes.Array[ctypes.c_int], tuple[int, int, int]]:
    """The launch, the segments' ends, and the parameters `columns`, `run` and `runs`."""
    channels = sum(segments)
    fits = aligned and (pixels % 8 == 0 and channels % 16 == 0 if turned else channels % 8 == 0)
    defines = (("TYPE", dtype), ("TRANSPOSE", int(turned)), ("VALUES", 8 if fits else 1))
    ends = (ctypes.c_int * _MAX_SEGMENTS)(*[*accumulate(segments), *([channels] * _MAX_SEGMENTS)][:_MAX_SEGMENTS])
    if turned:
        columns, groups, run, threads = 0, _ceil(channels, _TILE), _TILE, 128
    else:
        chunks = channels // (8 if fits else 1)
        groups = _ceil(chunks, 256)
        columns = _ceil(chunks, groups)
        lanes = 256 // columns
        threads = _ceil(lanes * columns, 32) * 32
        # Up to 16 pixels a thread, which pays for the division behind each of its factors; fewer in a small tensor.
        each = batch * pixels * groups // (lanes * multiprocessors * _THREADS // threads)
        run = lanes * min(16, max(1, each))
    runs = _ceil(pixels, run)
    return _Plan("quantize_per_sample", defines, (batch * runs, groups, 1), threads), ends, (columns, run, runs)


def _fuses(device: torch.device, dtype: torch.dtype, k: int, rank: int) -> bool:
    """Whether one kernel can make the codes and the low-rank branch: half precision, on tensor cores that know it."""
    known = dtype == torch.float16 or (dtype == torch.bfloat16 and _cupy.capability(device) >= (8, 0))
    return known and k % 32 == 0 and 0 < rank <= _MAX_RANK


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _variants() -> list[tuple[str, tuple[tuple[str, int | str], ...]]]:
    a100 = 108  # multiprocessors: few rows and many rows stand for other sizes of GPU too
    widths = (320, 640, 1280, 3072, 10240)
    plans = [
        *(
            _token_plan(dtype, rows, k, fits, a100)
            for dtype in _TYPES.values()
            for rows in (1, 4096)
            for k in (*widths, 64, 1536, 2560, 5120, 20480, 32768)
            for fits in (False, True)
        ),
        *(
            _token_down_plan(dtype, rows, k, rank, clusters, a100)
            for dtype in (_TYPES[torch.float16], _TYPES[torch.bfloat16])
            for rows in (1, 4096)
            for k in widths
            for rank in (8, 16, 32, 64, _MAX_RANK)
            for clusters in (False, True)
        ),
        *(
            _sample_plan(dtype, 2, 4096, turned, aligned, (320,), a100)[0]
            for dtype in _TYPES.values()
            for turned in (False, True)
            for aligned in (False, True)
        ),
    ]
    return list(dict.fromkeys((plan.source, plan.defines) for plan in plans))


# A cover of what the functions above may ask for: every path, and the widths and ranks of known models.
VARIANTS = _variants()
