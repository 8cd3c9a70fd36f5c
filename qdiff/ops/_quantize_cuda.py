"""Launching the kernels that quantize activations: cuda/quantize_per_token*.cu and cuda/quantize_per_sample.cu."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import reduce
from itertools import count
from operator import or_
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.ops import _cupy
from qdiff.ops._launch import Launcher
from qdiff.ops._problem import allocator, dense
from qdiff.ops._sample_scales import MAX_SEGMENTS, ends_of, in_few_segments
from qdiff.ops._shortcut import offer
from qdiff.ops.activation import activate, activated_width
from qdiff.ops.checks import Checked
from qdiff.ops.low_rank_down import low_rank_down

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# What the per-token quantizer computes first: the function, whether it is of gates, whether the row is normalized.
_FIRST = {"none": (0, 0, 0), "gelu": (1, 0, 0), "gelu_tanh": (2, 0, 0), "geglu": (1, 1, 0), "layer_norm": (0, 0, 1)}
_MAX_RANK = 128
_TILE = 64  # of pixels and of channels, where channels are turned from first to last
_MAX_SPLIT = 8  # blocks of a cluster that any GPU with clusters takes
_SHARED_BYTES = (64 * 1024, 96 * 1024)  # of a block, that GPUs without and with clusters have
_LARGE_SHARED = {9: 228 * 1024, 10: 228 * 1024}  # of a multiprocessor, by the major capability
_SYSTEM_SHARED = 1024  # of it, for every block
# Slices of 32 values in K that a block of `quantize_per_token_down` has at most, where there are clusters, and a warp.
_BLOCK_SLICES, _WARP_SLICES = 20, 2
# Threads that keep a multiprocessor's memory pipes busy. Work for fewer is spread as thinly as it goes.
_THREADS = 2048
_REGISTERS = 65536  # of a multiprocessor
# The same, of threads that have several loads under way each.
_SAMPLE_THREADS = 512
_MOST_RUNS = 65535  # a grid's third dimension

# The kernels' integers, after their pointers; to a multiple of 8 bytes, as the pointers make the struct.
_TOKEN, _TOKEN_NORM, _TOKEN_DOWN = struct.Struct("2i"), struct.Struct("2if4x"), struct.Struct("3i4x")
_SAMPLE = struct.Struct(f"{4 + MAX_SEGMENTS + 5}i4x")

_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype


class _Plan(NamedTuple):
    """A launch, as far as it follows from shapes."""

    source: str
    defines: tuple[tuple[str, int | str], ...]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0
    cluster: int = 0  # blocks of a cluster that does the work of several where not all of them fit the GPU

    def launcher(self, *pointers: bool, integers: bytes) -> Launcher:
        """What starts the kernel, of whose pointers some are given at every launch, and the others are null."""
        layout = struct.Struct("".join("Q" if given else "8x" for given in pointers))
        kernel = _cupy.kernel(self.source, self.defines)
        return kernel.launcher(self.grid, self.threads, self.shared_bytes, layout, integers, self.cluster)


class TokenReady:
    """What a call leaves for those of its kind whose tensors need no copy.

    Attributes:
        fused: whether one kernel makes the low-rank branch too.
        launch: starts the kernel, given the addresses of x, smooth if there is one, and, if fused, down; of the codes
            and the scales, and, if fused, of what the branch reads.
    """

    def __init__(
        self, x: Tensor, smooth: Tensor | None, down: Tensor | None, aligned: bool, activation: str = "none"
    ) -> None:
        shape, k = x.shape[:-1], activated_width(x, activation)
        dtype, rows, multiprocessors = _TYPES[x.dtype], math.prod(shape), _cupy.multiprocessors(x.device)
        self._aligned, self._smoothed, self._projected = aligned, smooth is not None, down is not None
        self.fused = down is not None and aligned and _fuses(x.device, x.dtype, k, down.shape[0])
        rank = 0
        if down is not None and self.fused:
            rank = down.shape[0]
            plan = _token_down_plan(dtype, rows, k, rank, _cupy.capability(x.device), multiprocessors)
            self.launch = plan.launcher(True, self._smoothed, *[True] * 4, integers=_TOKEN_DOWN.pack(rows, k, rank))
        else:
            plan = _token_plan(dtype, rows, k, aligned and k % 8 == 0, multiprocessors, activation)
            self.launch = plan.launcher(True, self._smoothed, True, True, integers=_TOKEN.pack(rows, k))
        self._empty = allocator(x.device)
        self._codes = _layout(*shape, k, dtype=torch.int8)
        self._scale = _layout(*shape, dtype=torch.float32)
        self._low = _layout(*shape, rank, dtype=x.dtype)

    def __call__(self, given: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
        """The result for x and what else there is; None where they start anywhere, if not prepared for that."""
        places = [tensor.data_ptr() for tensor in given]
        if (reduce(or_, places) % 16 == 0) != self._aligned:
            return None
        codes, scale, low = self._empty(*self._codes), self._empty(*self._scale), self._empty(*self._low)
        if self.fused:
            self.launch(*places, codes.data_ptr(), scale.data_ptr(), low.data_ptr())
            return codes, scale, low
        if not self._projected:
            self.launch(*places, codes.data_ptr(), scale.data_ptr())
            return codes, scale, low
        self.launch(*places[:-1], codes.data_ptr(), scale.data_ptr())
        return codes, scale, low_rank_down(given[0], given[1] if self._smoothed else None, given[-1])


def quantize_per_token(
    known: Checked, x: Tensor, smooth: Tensor | None, down: Tensor | None, activation: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """What `qdiff.ops.quantize_per_token` computes, on checked arguments on the current CUDA device."""
    if down is not None and activation != "none":  # the kernel that makes the low-rank branch knows none
        x, activation = activate(x, activation), "none"
    down = None if down is None else down.to(x.dtype)
    given = [tensor.contiguous() for tensor in (x, smooth, down) if tensor is not None]
    aligned = not any(tensor.data_ptr() % 16 for tensor in given)
    ready: TokenReady | None = known.prepared.get(aligned)
    if ready is None:
        ready = known.prepared[aligned] = TokenReady(x, smooth, down, aligned, activation)
    result = ready(given)
    assert result is not None, "it was prepared for such tensors"
    offer(given, ready)
    return result


class _NormReady:
    """What a call of `quantize_layer_norm` leaves for those of its kind whose tensors need no copy."""

    def __init__(self, x: Tensor, plan: _Plan, given: Sequence[bool], eps: float) -> None:
        *shape, k = x.shape
        self._launch = plan.launcher(True, *given, True, True, integers=_TOKEN_NORM.pack(math.prod(shape), k, eps))
        self._empty = allocator(x.device)
        self._codes, self._scale = _layout(*x.shape, dtype=torch.int8), _layout(*shape, dtype=torch.float32)

    def __call__(self, given: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """The result for x and what else there is; None where they need copies."""
        places = [tensor.data_ptr() for tensor in given]
        if reduce(or_, places) % 16:
            return None
        codes, scale = self._empty(*self._codes), self._empty(*self._scale)
        self._launch(*places, codes.data_ptr(), scale.data_ptr())
        return codes, scale


def quantize_layer_norm(
    known: Checked, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, smooth: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `qdiff.ops.quantize_layer_norm` computes, on checked arguments on the current CUDA device."""
    rows, k, multiprocessors = x.numel() // x.shape[-1], x.shape[-1], _cupy.multiprocessors(x.device)
    plan = _token_plan(_TYPES[x.dtype], rows, k, k % 8 == 0, multiprocessors, "layer_norm")
    if dict(plan.defines)["VECTORS"] == 0:  # a row is too long for a kernel's registers, or no whole number of vectors
        codes, scale, _ = quantize_per_token(known, F.layer_norm(x, x.shape[-1:], weight, bias, eps), smooth, None)
        return codes, scale
    tensors = [None if part is None else dense(part) for part in (x, weight, bias, smooth)]
    ready: _NormReady | None = known.prepared.get("norm")
    if ready is None:
        ready = known.prepared["norm"] = _NormReady(x, plan, [part is not None for part in tensors[1:]], eps)
    given = [part for part in tensors if part is not None]
    result = ready(given)
    assert result is not None, "they are dense"
    offer(given, ready)
    return result


def _layout(*shape: int, dtype: torch.dtype, order: torch.memory_format = torch.contiguous_format) -> _Layout:
    like = torch.empty(shape, device="meta", memory_format=order)
    return tuple(shape), like.stride(), dtype


class _SampleReady:
    """What a call leaves for those of its kind whose tensors need no copy."""

    def __init__(
        self,
        x: Tensor,
        scale: Tensor,
        smooth: Tensor | None,
        segments: Sequence[int],
        channels_first: bool,
        aligned: bool,
    ) -> None:
        turned = channels_first and not x.is_contiguous(memory_format=torch.channels_last)
        plan, integers = _sample_launch(x, scale.shape[0], turned, aligned, tuple(segments))
        self._launch = plan.launcher(True, True, smooth is not None, True, integers=integers)
        self._aligned, self._smoothed, self._empty = aligned, smooth is not None, allocator(x.device)
        order = torch.channels_last if channels_first else torch.contiguous_format
        self._codes = _layout(*x.shape, dtype=torch.int8, order=order)

    def __call__(self, given: Sequence[Tensor]) -> Tensor | None:
        """The codes for x, scale and what else there is; None where they start anywhere, if not prepared for that."""
        places = [tensor.data_ptr() for tensor in given]
        values = places[0] | places[2] if self._smoothed else places[0]
        if (values % 16 == 0) != self._aligned:
            return None
        codes = self._empty(*self._codes)
        self._launch(*places, codes.data_ptr())
        return codes


def quantize_per_sample(
    known: Checked, x: Tensor, scale: Tensor, smooth: Tensor | None, segments: Sequence[int], channel_dim: int
) -> Tensor:
    """What `qdiff.ops.quantize_per_sample` computes, on checked arguments on the current CUDA device."""
    channel_dim %= x.dim()
    if x.dim() == 4 and channel_dim == 1:
        # What has one pixel or one channel is in both orders: then there is nothing to turn.
        if not x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            x = x.contiguous(memory_format=torch.channels_last)
        return _quantize_samples(known, x, scale, smooth, segments, True)
    if channel_dim == x.dim() - 1:
        return _quantize_samples(known, x.contiguous(), scale, smooth, segments, False)
    last = _quantize_samples(known, x.movedim(channel_dim, -1).contiguous(), scale, smooth, segments, False)
    return last.movedim(-1, channel_dim).contiguous()


def _quantize_samples(
    known: Checked, x: Tensor, scale: Tensor, smooth: Tensor | None, segments: Sequence[int], channels_first: bool
) -> Tensor:
    if not x.numel():
        order = torch.channels_last if channels_first else torch.contiguous_format
        return torch.empty_like(x, dtype=torch.int8, memory_format=order)
    scale, segments = in_few_segments(scale, segments)
    scale, smooth = scale.contiguous(), None if smooth is None else smooth.contiguous()
    aligned = not any(tensor.data_ptr() % 16 for tensor in (x, smooth) if tensor is not None)
    ready: _SampleReady | None = known.prepared.get(aligned)
    if ready is None:
        ready = known.prepared[aligned] = _SampleReady(x, scale, smooth, segments, channels_first, aligned)
    given = [tensor for tensor in (x, scale, smooth) if tensor is not None]
    codes = ready(given)
    assert codes is not None, "it was prepared for such tensors"
    offer(given, ready)
    return codes


def _sample_launch(
    x: Tensor, scale_rows: int, turned: bool, aligned: bool, segments: tuple[int, ...]
) -> tuple[_Plan, bytes]:
    """The launch, and the tail of the kernel's parameters."""
    batch, channels = x.shape[0], sum(segments)
    pixels, samples_per_row = x.numel() // (batch * channels), batch // scale_rows
    if not turned:  # samples that share their scales are one after the other: one sample of more pixels
        batch, pixels, samples_per_row = scale_rows, pixels * samples_per_row, 1
    multiprocessors = _cupy.multiprocessors(x.device)
    plan, tail = _sample_plan(_TYPES[x.dtype], batch, pixels, turned, aligned, segments, multiprocessors)
    ends = ends_of(segments, channels)
    return plan, _SAMPLE.pack(channels, pixels, samples_per_row, len(segments), *ends, *tail)


def _token_plan(
    dtype: int, rows: int, k: int, vectors_fit: bool, multiprocessors: int, activation: str = "none"
) -> _Plan:
    first = _FIRST[activation]
    # Four or six chunks a thread hide the memory's latency; where there is not that much work, one or two each.
    many = rows * (k // 8) > 2 * _THREADS * multiprocessors
    lanes, vectors = _token_split(dtype, k // 8, (6 if dtype else 4) if many else 2)
    if any(first):
        most = 3 if not dtype else 4 if first[0] else 5
        lanes, vectors = _even_split(k // 8, most) or (lanes, vectors)
    # As far as registers go.
    if not vectors_fit or vectors > (8 if dtype else 3 if any(first) else 7):
        lanes, vectors = 32 if k <= 1024 else 256, 0
    threads = lanes if 128 % lanes else 128
    split = (("TYPE", dtype), ("LANES", lanes), ("VECTORS", vectors), ("THREADS", threads))
    defines = (*split, *zip(("GELU", "GATED", "NORM"), first))
    return _Plan("quantize_per_token", defines, (_ceil(rows, threads // lanes), 1, 1), threads)


def _even_split(chunks: int, most: int) -> tuple[int, int] | None:
    """The threads of a row that leave the fewest of themselves without a chunk, and the chunks of each, about four.

    For what is more work than a load and a store of each chunk. None where rows are too long. Measured on an H200.
    """
    splits = [(lanes, _ceil(chunks, lanes)) for lanes in (8, 16, *range(32, 544, 32))]
    splits = [(lanes, vectors) for lanes, vectors in splits if vectors <= most]
    return min(splits, key=lambda split: (split[0] * split[1] - chunks, abs(split[1] - 4)), default=None)


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


def _token_down_plan(
    dtype: int, rows: int, k: int, rank: int, capability: tuple[int, int], multiprocessors: int
) -> _Plan:
    kept = _token_down_kept_plan(dtype, rows, k, rank, _LARGE_SHARED.get(capability[0], 0), multiprocessors)
    if kept is not None:
        return kept
    clusters, rank_tiles, slices = capability >= (9, 0), _ceil(rank, 8), k // 32
    # Two tiles of 16 rows halve what is read of `down`. Where there are few rows, or many sums, a block has one.
    few = 16 * multiprocessors // (_MAX_SPLIT if clusters else 1)
    row_tiles = 1 if rank_tiles > 8 or rows <= few else 2
    groups = _ceil(rows, 16 * row_tiles)
    split = _token_down_split(groups, slices, _BLOCK_SLICES, multiprocessors) if clusters else 1
    widest = 16 if row_tiles * rank_tiles <= 8 else 8
    for batches in count(1):
        warps = min(_ceil(slices, split * batches * _WARP_SLICES), widest)
        of_warp = _ceil(slices, split * batches * warps)
        shared_bytes = _token_down_bytes(row_tiles, rank_tiles, split, warps, of_warp, 0)
        if shared_bytes <= _SHARED_BYTES[clusters]:
            break
    # 96 registers are enough for a thread with few sums.
    resident = max(1, (640 if rank_tiles <= 4 else 384 if rank_tiles <= 8 else 256) // (32 * warps))
    defines = _token_down_defines(dtype, row_tiles, rank_tiles, split, warps, of_warp, 0, resident)
    return _Plan("quantize_per_token_down", defines, (groups * split, 1, 1), 32 * warps, shared_bytes)


def _token_down_kept_plan(dtype: int, rows: int, k: int, rank: int, shared: int, multiprocessors: int) -> _Plan | None:
    """With `down` in shared memory, of which a multiprocessor has so many bytes; None where it does not fit, or where
    there is so little of it that several tiles a block do not pay.

    Measured on an H200: few warps with many values each beat many with few, and two blocks a multiprocessor beat a
    second buffer for x.
    """
    rank_tiles, slices, tiles = _ceil(rank, 8), k // 32, _ceil(rows, 16)
    if slices <= 10:
        return None
    split = _token_down_split(tiles, slices, 40, multiprocessors)
    of_warp = max(3 if slices <= 20 else 4, _ceil(slices, 12 * split))
    warps = _ceil(slices, split * of_warp)
    # A thread has its values and its sums in registers, and some 48 more.
    most = _REGISTERS // (32 * warps * (48 + 16 * of_warp + 4 * rank_tiles))
    shared_bytes = _token_down_bytes(1, rank_tiles, split, warps, of_warp, 1)
    resident = min(2, most, shared // (shared_bytes + _SYSTEM_SHARED))
    if resident < 1:
        return None
    defines = _token_down_defines(dtype, 1, rank_tiles, split, warps, of_warp, 1, resident)
    return _Plan("quantize_per_token_down", defines, (tiles * split, 1, 1), 32 * warps, shared_bytes, split)


def _token_down_split(groups: int, slices: int, most: int, multiprocessors: int) -> int:
    """Blocks that share the K axis, so many slices of it each at the most: few groups of rows then keep all
    multiprocessors busy, and several blocks fit one."""
    split = 1
    while split < min(_MAX_SPLIT, slices) and (slices > most * split or 2 * groups * split <= multiprocessors):
        split *= 2
    return split


def _token_down_defines(dtype: int, *values: int) -> tuple[tuple[str, int | str], ...]:
    names = ("TYPE", "ROW_TILES", "RANK_TILES", "SPLIT", "WARPS", "SLICES", "KEPT", "RESIDENT")
    return tuple(zip(names, (dtype, *values)))


def _token_down_bytes(row_tiles: int, rank_tiles: int, split: int, warps: int, slices: int, kept: int) -> int:
    """The size of the kernel's `Shared`."""
    sums = 512 * row_tiles * rank_tiles
    down = 512 * slices * rank_tiles
    of_warp = slices * (1024 * row_tiles + 128) + (down + sums if kept else max(down, sums))
    turns = 2 if kept and split > 1 else 1
    return warps * (of_warp + 64 * row_tiles) + turns * (sums + 64 * row_tiles * split + 16)


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
            _token_plan(dtype, rows, k, fits, a100, activation)
            for dtype in _TYPES.values()
            for rows in (1, 4096)
            for k in (*widths, 64, 1536, 2560, 5120, 15360)
            for fits in (False, True)
            for activation in _FIRST
            if fits or activation != "layer_norm"
        ),
        *(
            _token_down_plan(dtype, rows, k, rank, capability, a100)
            for dtype in (_TYPES[torch.float16], _TYPES[torch.bfloat16])
            for rows in (1, 4096)
            for k in (320, 640, 3072, 15360)
            for rank in (8, 32, 64, _MAX_RANK)
            for capability in ((8, 0), (9, 0), (12, 0))
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
