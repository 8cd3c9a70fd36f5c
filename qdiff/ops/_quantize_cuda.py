"""Launching the kernels that quantize activations: cuda/quantize_per_token*.cu and cuda/quantize_per_sample.cu."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, count
from typing import NamedTuple

import torch
from torch import Tensor

from qdiff.ops import _cupy
from qdiff.ops.checks import Checked
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
_REGISTERS = 65536  # of a multiprocessor
# The same, of threads that have several loads under way each.
_SAMPLE_THREADS = 512
_MOST_RUNS = 65535  # a grid's third dimension


Launcher = Callable[[ctypes.Structure], None]


class _Plan(NamedTuple):
    """A launch, as far as it follows from shapes."""

    source: str
    defines: tuple[tuple[str, int | str], ...]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0

    def launcher(self) -> Launcher:
        kernel = _cupy.kernel(self.source, self.defines)
        return partial(kernel.launch, self.grid, self.threads, self.shared_bytes)


_SAMPLE_POINTERS = struct.Struct("4Q")


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
        *_ints("columns", "lanes", "inverse", "run", "runs"),
    ]


class _TokenReady(NamedTuple):
    """What a call leaves for the next one of its kind."""

    launch: Launcher
    fused: bool  # it makes the low-rank branch too
    sizes: tuple[int, ...]
    scale: tuple[torch.Size, tuple[int, ...]]  # shape and strides
    low: tuple[torch.Size, tuple[int, ...]]


def quantize_per_token(
    known: Checked, x: Tensor, smooth: Tensor | None, down: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `qdiff.ops.quantize_per_token` computes, on checked arguments on the current CUDA device."""
    x, smooth = x.contiguous(), _contiguous(smooth)
    if down is not None:
        down = down.to(x.dtype).contiguous()
    x_at, smooth_at, down_at = x.data_ptr(), _address(smooth), _address(down)
    aligned = not (x_at | smooth_at | down_at) % 16
    ready: _TokenReady | None = known.prepared.get(aligned)
    if ready is None:
        ready = known.prepared[aligned] = _prepare_token(x, down, aligned)
    codes = torch.empty_like(x, dtype=torch.int8)
    scale = torch.empty_strided(*ready.scale, dtype=torch.float32, device=x.device)
    low = torch.empty_strided(*ready.low, dtype=x.dtype, device=x.device)
    codes_at, scale_at = codes.data_ptr(), scale.data_ptr()
    if ready.fused:
        ready.launch(_TokenDown(x_at, smooth_at, down_at, codes_at, scale_at, low.data_ptr(), *ready.sizes))
        return codes, scale, low
    ready.launch(_Token(x_at, smooth_at, codes_at, scale_at, *ready.sizes))
    return codes, scale, low if down is None else low_rank_down(x, smooth, down)


def _prepare_token(x: Tensor, down: Tensor | None, aligned: bool) -> _TokenReady:
    *shape, k = x.shape
    dtype, rows, multiprocessors = _TYPES[x.dtype], x.numel() // k, _cupy.multiprocessors(x.device)
    if down is not None and aligned and _fuses(x.device, x.dtype, k, down.shape[0]):
        rank, clusters = down.shape[0], _cupy.capability(x.device) >= (9, 0)
        plan = _token_down_plan(dtype, rows, k, rank, clusters, multiprocessors)
    else:
        rank, plan = 0, _token_plan(dtype, rows, k, aligned and k % 8 == 0, multiprocessors)
    sizes = (rows, k, rank) if rank else (rows, k)
    return _TokenReady(plan.launcher(), rank > 0, sizes, _layout(*shape), _layout(*shape, rank))


def _layout(*shape: int) -> tuple[torch.Size, tuple[int, ...]]:
    """The shape, and the strides of a contiguous tensor."""
    like = torch.empty(shape, device="meta")
    return like.shape, like.stride()


def quantize_per_sample(
    known: Checked, x: Tensor, scale: Tensor, smooth: Tensor | None, segments: Sequence[int], channel_dim: int
) -> Tensor:
    """What `qdiff.ops.quantize_per_sample` computes, on checked arguments on the current CUDA device."""
    channel_dim %= x.dim()
    if x.dim() == 4 and channel_dim == 1:
        # What has one pixel or one channel is in both orders: then there is nothing to turn.
        turned = not x.is_contiguous(memory_format=torch.channels_last) and x.is_contiguous()
        if not turned:
            x = x.contiguous(memory_format=torch.channels_last)
        codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.channels_last)
        _quantize_samples(known, x, codes, x.shape[1], turned, scale, smooth, segments)
        return codes
    if channel_dim == x.dim() - 1:
        return _quantize_last(known, x, scale, smooth, segments)
    last = _quantize_last(known, x.movedim(channel_dim, -1), scale, smooth, segments)
    return last.movedim(-1, channel_dim).contiguous()


def _quantize_last(known: Checked, x: Tensor, scale: Tensor, smooth: Tensor | None, segments: Sequence[int]) -> Tensor:
    x = x.contiguous()
    codes = torch.empty_like(x, dtype=torch.int8)
    _quantize_samples(known, x, codes, x.shape[-1], False, scale, smooth, segments)
    return codes


def _quantize_samples(
    known: Checked,
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
    x_at, smooth_at = x.data_ptr(), _address(smooth)
    aligned = not (x_at | smooth_at) % 16
    ready: tuple[Launcher, bytes] | None = known.prepared.get(aligned)
    if ready is None:
        ready = known.prepared[aligned] = _prepare_sample(x, scale.shape[0], turned, aligned, tuple(segments))
    launch, integers = ready
    pointers = _SAMPLE_POINTERS.pack(x_at, scale.data_ptr(), smooth_at, codes.data_ptr())
    launch(_Sample.from_buffer_copy(pointers + integers))


def _prepare_sample(
    x: Tensor, scale_rows: int, turned: bool, aligned: bool, segments: tuple[int, ...]
) -> tuple[Launcher, bytes]:
    """The launch, and the tail of the kernel's parameters."""
    batch, channels = x.shape[0], sum(segments)
    pixels, samples_per_row = x.numel() // (batch * channels), batch // scale_rows
    if not turned:  # samples that share their scales are one after the other: one sample of more pixels
        batch, pixels, samples_per_row = scale_rows, pixels * samples_per_row, 1
    multiprocessors = _cupy.multiprocessors(x.device)
    plan, tail = _sample_plan(_TYPES[x.dtype], batch, pixels, turned, aligned, segments, multiprocessors)
    ends = (ctypes.c_int * _MAX_SEGMENTS)(*[*accumulate(segments), *([channels] * _MAX_SEGMENTS)][:_MAX_SEGMENTS])
    params = _Sample(0, 0, 0, 0, channels, pixels, samples_per_row, len(segments), ends, *tail)
    return plan.launcher(), bytes(params)[_SAMPLE_POINTERS.size :]


def _token_plan(dtype: int, rows: int, k: int, vectors_fit: bool, multiprocessors: int) -> _Plan:
    # Four or six chunks a thread hide the memory's latency; where there is not that much work, one or two each.
    many = rows * (k // 8) > 2 * _THREADS * multiprocessors
    lanes, vectors = _token_split(dtype, k // 8, (6 if dtype else 4) if many else 2)
    if not vectors_fit or vectors > (8 if dtype else 7):
        lanes, vectors = 32 if k <= 1024 else 256, 0
    threads = max(128, lanes)
    defines = (("TYPE", dtype), ("LANES", lanes), ("VECTORS", vectors), ("THREADS", threads))
    return _Plan("quantize_per_token", defines, (_ceil(rows, threads // lanes), 1, 1), threads)


def _token_split(dtype: int, chunks: int, most: int) -> tuple[int, int]:
    """The threads of a row, and the chunks of each."""
    lanes = 8
    while lanes * most < chunks and lanes < 256:
        lanes *= 2
    if lanes * most >= chunks:
        return lanes, _ceil(chunks, lanes)
    # A long row has a block of its own, and a multiprocessor needs the registers for two of them.
    for vectors in range(min(most, 4), 8 if dtype else 6):
        lanes = 32 * _ceil(chunks, 32 * vectors)
        registers = 32 + 8 * vectors if dtype else 96  # of a thread, as the kernel says
        if lanes <= 512 and 2 * lanes * registers <= _REGISTERS:
            return lanes, vectors
    return 512, _ceil(chunks, 512)


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


def _sample_plan(
    dtype: int,
    batch: int,
    pixels: int,
    turned: bool,
    aligned: bool,
    segments: tuple[int, ...],
    multiprocessors: int,
) -> tuple[_Plan, tuple[int, int, int, int, int]]:
    """The launch, and the parameters from `columns` on."""
    channels = sum(segments)
    fits = aligned and not any(width % 8 for width in segments)
    if turned:
        fits = fits and pixels % 8 == 0 and channels % 16 == 0
    defines = (("TYPE", dtype), ("TRANSPOSE", int(turned)), ("VALUES", 8 if fits else 1))
    if turned:
        runs = _ceil(pixels, _TILE)
        plan = _Plan("quantize_per_sample", defines, (batch * runs, _ceil(channels, _TILE), 1), 128)
        return plan, (0, 0, 0, _TILE, runs)
    chunks = channels // (8 if fits else 1)
    groups = _ceil(chunks, 256)
    columns = _ceil(chunks, groups)
    lanes = 256 // columns
    # Pixels of a thread pay for its factors, each with a division: as many as leave enough threads to hide the memory's
    # latency. It has four of them under way at a time.
    each = min(8, batch * pixels * chunks // (_SAMPLE_THREADS * multiprocessors))
    run = max(lanes * max(1, each if each < 4 else each // 4 * 4), _ceil(pixels, _MOST_RUNS))
    runs = _ceil(pixels, run)
    plan = _Plan("quantize_per_sample", defines, (batch, groups, runs), _ceil(lanes * columns, 32) * 32)
    return plan, (columns, lanes, _ceil(65536, columns), run, runs)


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
            for k in (*widths, 64, 1536, 2560, 5120, 15360, 20480, 32768)
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
