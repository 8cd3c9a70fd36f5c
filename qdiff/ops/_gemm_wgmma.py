"""Launching cuda/gemm_wgmma.cu: tiles, tensor maps and parameters."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qdiff.ops import _cupy
from qdiff.ops._launch import Kernel
from qdiff.ops._problem import MAX_SEGMENTS, Launch, Problem, is_pointwise
from qdiff.ops._tensor_maps import NO_MAP, maps_of

_SHARED_LIMIT = 232448  # bytes a block may have on Hopper
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int32: 3}
_MAX_RANK = 128
_RANKS = 32  # of the low-rank branch in a stage

NAME = "wgmma"


class Tile(NamedTuple):
    """`features` x `tokens` output pixels, the K axis shared by a cluster of `split` blocks."""

    tokens: int
    split: int = 1
    features: int = 128

    @property
    def name(self) -> str:
        return f"{self.features}x{self.tokens}" + (f"/{self.split}" if self.split > 1 else "")

    @property
    def groups(self) -> int:
        """Warpgroups that multiply, 64 features each."""
        return self.features // 64


TILES = [
    *(Tile(tokens) for tokens in (256, 192, 160, 128, 96)),
    *(Tile(tokens, features=192) for tokens in (192, 160, 128, 96)),
    *(Tile(tokens, split) for tokens, split in ((256, 2), (192, 4), (160, 2), (96, 2))),
    *(Tile(128, split, 192) for split in (2, 4)),
    *(Tile(128, split) for split in (2, 4, 8)),  # clusters of 3 or 6 leave multiprocessors idle
    *(Tile(tokens, split) for tokens in (64, 32, 16) for split in (1, 2, 4, 8)),
]


def fits(tile: Tile, problem: Problem) -> bool:
    """Whether the tile can compute the problem at all."""
    if len(problem.segments) > 1 and not _takes_segments(tile):
        return False
    if not _takes_images(tile) and not _is_rows(problem.B, problem.OH, problem.kernel, problem.stride, problem.padding):
        return False
    # The low-rank branch is in the pipeline as a whole, at worst beside 8-bit weights; or beside what is exchanged.
    pieces = 0 if problem.up is None else -(-problem.up.shape[1] // _RANKS)
    if tile.split == 1:
        return pieces <= _shared(tile, 8, False, False, True)[0]
    room = min(_shared(tile, weight, False, False, True)[0] * _stage(tile, weight) for weight in (4, 8))
    exchanged = tile.tokens * tile.features * 4 + pieces * (tile.features + tile.tokens) * 64
    return exchanged <= room and tile.split >= len(problem.segments)


def guess(problem: Problem) -> Tile:
    """The tile whose blocks, in waves over the multiprocessors, are done first by a rule of thumb.

    A stage of 128 of K takes as long as its products (two cycles a token and warpgroup), but no less than what a warp
    does for it; a tile costs 500 cycles more, and 12 for every token; a cluster's exchange 4,000, and 30 for every
    token; clusters of four and more leave a tenth of the multiprocessors idle. Fitted to a sweep of 108 problems on an
    H200 (assets/benchmarks/tile_sweep.json), of which its tiles take 1.4 % longer than the fastest (geometric mean).
    """
    p = problem
    stages = _stages(p.segments, p.kernel)
    multiprocessors = _cupy.multiprocessors(p.x.device)

    def cycles(tile: Tile) -> float:
        tiles = -(-p.B * p.OH * p.OW // tile.tokens) * -(-p.N // tile.features)
        busy = multiprocessors if tile.split < 4 else multiprocessors * 10 // 11
        waves = -(-tiles // max(1, busy // tile.split))
        stage = tile.groups * max(265 + 0.2 * tile.tokens, 2 * tile.tokens)
        longest = max(-(-count // part) for count, part in zip(stages, parts_of(stages, tile.split), strict=True))
        count = sum(stages) if tile.split == 1 else longest
        exchange = (4000 + 30 * tile.tokens) * (tile.split > 1)
        return waves * (count * stage + 500 + 12 * tile.tokens + exchange)

    return min((tile for tile in TILES if fits(tile, problem)), key=cycles)


def _piece(segments: Sequence[int], kernel: tuple[int, int]) -> int:
    """Channels that the copy engine brings at a time: pieces of 64 where those of 128 would leave stages half empty."""
    halves = all(width % 64 == 0 for width in segments) and any(width % 128 for width in segments)
    return 64 if halves and kernel != (1, 1) else 128


def _stages(segments: Sequence[int], kernel: tuple[int, int]) -> tuple[int, ...]:
    """Of each segment, 128 channels each: of all taps together, or of each of them."""
    together = kernel[0] * kernel[1] if _piece(segments, kernel) < 128 else 1
    return tuple(-(-width * together // 128) * kernel[0] * kernel[1] // together for width in segments)


def parts_of(stages: Sequence[int], split: int) -> tuple[int, ...]:
    """How many of a cluster's `split` blocks work on each segment: one at the least, more where more is to be done."""
    parts = [1] * len(stages)
    while sum(parts) < split:
        parts[max(range(len(stages)), key=lambda segment: stages[segment] / parts[segment])] += 1
    return tuple(parts)


def refusal(problem: Problem) -> str | None:
    """Why no tile can, or None."""
    if problem.up is not None and (problem.up.shape[1] > _MAX_RANK or problem.up.shape[1] % 8):
        return f"a low-rank branch of rank {problem.up.shape[1]}"
    if problem.x_low is not None and problem.x_low.dtype == torch.float32:
        return "a low-rank branch in float32"
    if max(problem.stride) > 8:
        return f"a stride of {max(problem.stride)}, which the copy engine does not take"
    if max(*problem.padding, *problem.kernel) > 127:
        return f"a window of {problem.kernel} and padding of {problem.padding}, which the copy engine does not take"
    return None


def _stored(tile: Tile, segmented: bool) -> int:
    """How many tokens of a tile are stored at once: few of the largest ones, whose pipeline needs the room; of a
    cluster's, what a block does at a time."""
    return 16 if tile.split > 1 else 64 if tile.tokens > (160 if segmented else 192) else tile.tokens


def _takes_segments(tile: Tile) -> bool:
    """Whether there is room for the sums of segments that are complete; a cluster's blocks do one segment each."""
    return tile.split > 1 or tile.tokens <= (192 if tile.groups == 2 else 128)


def _takes_images(tile: Tile) -> bool:
    """Whether there are registers for pixels of images beside the accumulators."""
    return tile.groups == 2 or tile.tokens <= 160


def _is_rows(
    images: int, height: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> bool:
    """Whether the input is one row of pixels, each taken by itself: a linear layer's."""
    return images == 1 and height == 1 and is_pointwise(kernel, stride, padding)


def _sums(tile: Tile, weight: int, extras: bool) -> int:
    """Bytes of shared memory for what the registers do not have of the sums of segments."""
    accumulators = tile.tokens // 2
    both = accumulators + 8 if tile.groups > 2 else 112 if weight == 5 or (extras and tile.tokens == 160) else 128
    return 4 * 128 * tile.groups * max(0, 2 * accumulators - both)


def _stage(tile: Tile, weight: int) -> int:
    """Bytes of weights and input in a stage of the pipeline."""
    return tile.features * (128 if weight == 8 else 64) + 128 * tile.tokens


def _shared(tile: Tile, weight: int, segmented: bool, elements: bool, extras: bool) -> tuple[int, int]:
    """As deep a pipeline as fits, to eight stages, and the bytes of shared memory that it makes."""
    tables = tile.groups * ((4 if segmented or tile.split > 1 else 1) + extras) * tile.tokens * 4
    sums = _sums(tile, weight, extras) if segmented and tile.split == 1 else 0
    stored = _stored(tile, segmented)
    buffers = 2 if tile.split == 1 and stored < tile.tokens else 1
    stores = 0 if elements else tile.groups * buffers * stored * 128
    beside = 16 + (4 * tile.features if weight == 4 else 0)  # barriers and multipliers
    stage = _stage(tile, weight) + beside
    rest = sums + tables + stores + 8  # a barrier more
    depth = min(8, (_SHARED_LIMIT - rest) // stage)
    return depth, depth * stage + rest


def _defines(
    tile: Tile,
    weight: int,
    rank: int,
    low: int,
    image: bool,
    piece: int,
    segmented: bool,
    out: int,
    elements: bool,
    extras: bool,
) -> tuple[tuple[str, int], ...]:
    return (
        ("WEIGHT", weight),
        ("WARPGROUPS", tile.groups),
        ("TOKENS", tile.tokens),
        ("RANK", rank),
        ("LOW", low),
        ("IMAGE", int(image)),
        ("PIECE", piece),
        ("SEGMENTED", int(segmented)),
        ("OUT", out),
        ("ELEMENTS", int(elements)),
        ("EXTRAS", int(extras)),
        ("SPLIT", tile.split),
        ("STAGES", _shared(tile, weight, segmented, elements, extras)[0]),
    )


class _Plan(NamedTuple):
    """What follows from the shapes alone."""

    kernel: Kernel
    grid: tuple[int, int, int]
    shared_bytes: int
    integers: bytes  # the tail of the kernel's parameters
    image: bool  # whether the input is images to it, and not rows
    stored: int  # tokens that are stored at once


# The kernel's parameters: tensor maps, pointers and whether to read weights early; then integers.
_MAPS_AND_POINTERS = struct.Struct("128s128s128s128s128s9Q")
_INTEGERS = struct.Struct("26i16x")  # to a multiple of 64 bytes, as the tensor maps make the struct


@lru_cache(maxsize=2048)
def _plan(
    device: int,
    tile: Tile,
    weight: int,
    images: int,
    height: int,
    width: int,
    features: int,
    segments: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    scale_rows: int,
    rank: int,
    dtypes: tuple[int, int, int, int],
    elements: bool,
    extras: bool,
) -> _Plan:
    out, bias, shift, low = dtypes
    several = len(segments) > 1 and out != 3
    linear = _is_rows(images, height, kernel, stride, padding) and (several or len(segments) == 1)
    segmented = several and (tile.split == 1 or linear)  # by blocks that do more than one, or not as images
    pixels, feature_tiles = images * height * width, -(-features // tile.features)
    tiles = -(-pixels // tile.tokens) * feature_tiles
    none = [0] * (MAX_SEGMENTS - len(segments))
    stages = _stages(segments, kernel)
    integers = _INTEGERS.pack(
        *(features, pixels, height * width, width),
        *(kernel[1], kernel[0] * kernel[1], *stride, *padding),
        *(len(segments), *segments, *none),
        *(*parts_of(stages, tile.split), *none),
        *(feature_tiles, tiles),
        max(1, pixels // max(1, scale_rows)),
        *((sum(segments) * kernel[0] * kernel[1] // 32 + 1) // 2,),
        *(int(out == 3), bias, shift),
    )
    piece, ranks = _piece(segments, kernel), -(-rank // _RANKS)
    source = _cupy.kernel(
        "gemm_wgmma", _defines(tile, weight, ranks, low, not linear, piece, segmented, out % 3, elements, extras)
    )
    blocks = tiles * tile.split if tile.split > 1 else min(tiles, _cupy.multiprocessors(torch.device("cuda", device)))
    return _Plan(
        source,
        (blocks, 1, 1),
        _shared(tile, weight, segmented, elements, extras)[1],
        integers,
        not linear,
        _stored(tile, segmented),
    )


def prepare(problem: Problem, out: Tensor, tile: Tile) -> Launch:
    """What computes `problem` into `out` on torch's current stream, from their addresses; and its like at others.

    Args:
        problem: checked, and one that `refusal` and `fits` let pass.
        out: [B, OH, OW, N] in memory.
        tile: one of TILES.
    """
    p, n, device = problem, problem.N, problem.x.device
    # Integers are stored as they are: nothing is added to them.
    plain = p.out_dtype == torch.int32
    added = (p.bias, p.shift, p.residual, p.up)
    bias, shift, residual, up = (None, None, None, None) if plain else added
    rank = 0 if up is None else up.shape[1]
    elements = out.element_size() != 2 or n % 8 != 0
    plan = _plan(
        device.index,
        tile,
        p.weight_kind,
        p.B,
        p.OH,
        p.OW,
        n,
        p.segments,
        p.kernel,
        p.stride,
        p.padding,
        p.x_scale.shape[0],
        rank,
        (
            _DTYPES[p.out_dtype],
            0 if bias is None else _DTYPES[bias.dtype],
            0 if shift is None else _DTYPES[shift.dtype],
            0 if up is None or p.x_low is None else _DTYPES[p.x_low.dtype],
        ),
        elements,
        shift is not None or residual is not None,
    )
    c, pixels = p.C, p.B * p.OH * p.OW
    weight_maps = maps_of((p.codes.shape[1], n), (128 if p.weight_kind == 8 else 64, tile.features))
    if plan.image:
        window = [(-pad, pad - size + 1, step) for pad, size, step in zip(p.padding, p.kernel, p.stride, strict=True)]
        input_maps = maps_of((c, p.W, p.H, p.B), (_piece(p.segments, p.kernel), tile.tokens), *window)
    else:
        input_maps = maps_of((c, pixels), (128, tile.tokens))
    up_maps = low_maps = out_maps = None
    if rank:
        up_maps = maps_of((2 * rank, n), (64, tile.features))
        low_maps = maps_of((2 * rank, pixels), (64, tile.tokens))
    if not elements:
        out_maps = maps_of((2 * n, pixels), (128, plan.stored))

    start = plan.kernel.launcher(
        plan.grid, 128 * (tile.groups + 1), plan.shared_bytes, _MAPS_AND_POINTERS, plan.integers
    )

    def run(places: Sequence[int], early: bool) -> None:
        x, codes, multipliers, codebook, scale, bias, shift, residual, x_scale, x_low, up, out = places
        if plain:
            bias = shift = residual = 0
        start(
            weight_maps[codes],
            input_maps[x],
            NO_MAP if up_maps is None else up_maps[up],
            NO_MAP if low_maps is None else low_maps[x_low],
            NO_MAP if out_maps is None else out_maps[out],
            *(multipliers, codebook, scale, x_scale, bias, shift, residual, out, early),
        )

    return run


# A cover of what `prepare` may ask for: every tile, and with some of them every other macro.
VARIANTS = [
    ("gemm_wgmma", _defines(tile, weight, rank, low, image, piece, segmented, out, elements, extras))
    for tile in TILES
    for weight in (4, 5, 8)
    for rank, low, image, piece, segmented, out, elements, extras in (
        (0, 0, False, 128, False, 1, False, False),
        (1, 2, False, 128, False, 2, False, True),
        (0, 0, True, 64, True, 1, False, True),
        (0, 0, True, 128, False, 0, True, True),
        (4, 1, False, 128, False, 1, True, False),
        (1, 1, False, 128, False, 1, False, False),
        (0, 0, False, 128, True, 1, False, False),
    )
    if (weight == 4 or tile in (Tile(256), Tile(192), Tile(128), Tile(64, 4)))
    and (not (rank or elements) or tile in (Tile(256), Tile(160), Tile(192, 1, 192), Tile(128, 4, 192), Tile(64, 4)))
    and not (segmented and not _takes_segments(tile))
    and not (segmented and image and tile.split > 1)
    and not (image and not _takes_images(tile))
]
