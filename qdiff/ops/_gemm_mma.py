"""Launching cuda/gemm_mma.cu: tiles and parameters."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from qdiff.ops import _cupy
from qdiff.ops._problem import MAX_SEGMENTS, Launch, Problem

_STEP = 64  # of K
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int32: 3}


NAME = "mma"


class Tile(NamedTuple):
    """Output features and pixels of a block."""

    features: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.features}x{self.tokens}"

    @property
    def size(self) -> int:
        """Results of a block."""
        return self.features * self.tokens


TILES = [Tile(features, tokens) for tokens in (128, 64, 32, 16) for features in (128, 64)]

# The kernel's parameters.
_POINTERS = struct.Struct("12Q")
_INTEGERS = struct.Struct("24i")


def fits(tile: Tile, problem: Problem) -> bool:
    """Whether the tile can compute the problem."""
    return _holds(tile, problem.weight_kind)


def _holds(tile: Tile, weight: int) -> bool:
    """Whether a thread has registers for the codebooks of its features too, where there are such."""
    return weight != 5 or tile.size <= 8192


def guess(problem: Problem) -> Tile:
    """The tile whose blocks are done first by a rule of thumb.

    For a step of 64 of K a block takes so much of its multiprocessor: a cycle for 60 of its results, and 200. But no
    step is done sooner than its latency, four cycles for each of its rows and columns; so several blocks are resident.
    Fitted to a sweep of 108 problems by this kernel on an H200 (assets/benchmarks/tile_sweep_portable.json), of which
    its tiles take 4.3 % longer than the fastest (geometric mean). Not measured on GPUs that have no other kernel.
    """
    p = problem
    multiprocessors = _cupy.multiprocessors(p.x.device)

    def cycles(tile: Tile) -> float:
        blocks = -(-p.N // tile.features) * -(-p.B * p.OH * p.OW // tile.tokens)
        most = _resident(tile, len(p.segments) > 1)
        rounds, rest = divmod(-(-blocks // multiprocessors), most)

        def step(resident: int) -> float:
            latency = 4 * (tile.features + tile.tokens)
            return max(latency, resident * (tile.size / 60 + 200)) if resident else 0

        return rounds * step(most) + step(rest)

    return min((tile for tile in TILES if fits(tile, p)), key=cycles)


def _resident(tile: Tile, segmented: bool) -> int:
    """Blocks that have registers on a multiprocessor."""
    return 1 if threads(tile, segmented) > 128 else max(2, min(4, 5 - tile.size * (1 + segmented) // 4096))


def prepare(problem: Problem, out: Tensor, tile: Tile) -> Launch:
    """What computes `problem` into `out` on torch's current stream, from their addresses; and its like at others.

    Args:
        problem: checked; every channel segment a multiple of 32 wide, at most `MAX_SEGMENTS` of them; x and codes
            aligned to 16 bytes. The low-rank branch runs on the tensor cores when its type is one of theirs and its
            rank a multiple of 8.
        out: [B, OH, OW, N] in memory, of the problem's out_dtype.
        tile: of `TILES`.
    """
    p, pixels = problem, problem.B * problem.OH * problem.OW
    # Offsets have 32 bits, and where a tap may be outside of its image, rows and columns 16.
    bounded = p.kernel != (1, 1) or p.padding != (0, 0)
    if max(p.x.numel(), p.codes.numel()) >= 1 << 32 or (bounded and max(p.H, p.W) >= 1 << 15):
        raise ValueError(
            f"x, codes: got {tuple(p.x.shape)} and {tuple(p.codes.shape)}, expected less than 4 GiB each, and images "
            "of fewer than 32,768 rows and columns; split the batch or the image"
        )
    segmented = len(p.segments) > 1
    depth = stages(tile, p.weight_kind, _cupy.capability(out.device))
    kernel = _cupy.kernel("gemm_mma", defines(tile, p.weight_kind, depth, segmented))
    grid = (-(-p.N // tile.features) * -(-pixels // tile.tokens), 1, 1)
    shared = shared_bytes(tile, p.weight_kind, depth, segmented)
    start = kernel.launcher(grid, threads(tile, segmented), shared, _POINTERS, _integers(problem, out))
    return lambda places, early: start(*places)


def threads(tile: Tile, segmented: bool) -> int:
    """Of a block: four warps, or eight for more sums than these have registers for."""
    return 256 if segmented and tile.size > 4096 else 128


def stages(tile: Tile, weight: int, capability: tuple[int, int]) -> int:
    """Steps under way: as many as leave room for a second block in the 100 KiB that most GPUs have, to eight.

    Turing copies through registers, so a third stage would have nothing to wait for.
    """
    if capability < (8, 0):
        return 2
    return min(8, (49 * 1024 - 4 * tile.tokens) // _stage(tile, weight))  # the system has a KiB of every block


def _stage(tile: Tile, weight: int) -> int:
    weight_row = _STEP if weight == 8 else _STEP // 2
    return tile.tokens * _STEP + tile.features * (weight_row + 2 * (weight == 4))


def shared_bytes(tile: Tile, weight: int, depth: int, segmented: bool) -> int:
    """Dynamic shared memory of a block: the stages, or the strip of the output that is turned in their place."""
    warps = threads(tile, segmented) // 32
    warp_features = 32 if tile.size // warps >= 1024 else tile.features // 4
    strip = 16 * warps * warp_features // tile.features  # of warps along the tokens
    return max(4 * tile.tokens + depth * _stage(tile, weight), 4 * strip * (tile.features + 4))


def defines(tile: Tile, weight: int, depth: int, segmented: bool) -> tuple[tuple[str, int], ...]:
    """The macros of one compiled kernel."""
    return (
        ("WEIGHT", weight),
        ("FEATURES", tile.features),
        ("TOKENS", tile.tokens),
        ("STAGES", depth),
        ("SEGMENTED", int(segmented)),
    )


def _integers(problem: Problem, out: Tensor) -> bytes:
    """The tail of the kernel's parameters."""
    p = problem
    pixels = p.B * p.OH * p.OW
    raw = out.dtype == torch.int32  # only the accumulators: there may be no scales at all
    return _INTEGERS.pack(
        *(p.B, p.H, p.W, p.C, p.OH, p.OW, p.N),
        *(*p.kernel, *p.stride, *p.padding),
        *(len(p.segments), *p.segments, *([0] * (MAX_SEGMENTS - len(p.segments)))),
        pixels if raw else pixels // p.x_scale.shape[0],
        0 if p.up is None else p.up.shape[1],
        *(_dtype(p.bias), _dtype(p.shift), _dtype(p.x_low), _DTYPES[out.dtype]),
    )


def _dtype(tensor: Tensor | None) -> int:
    return 0 if tensor is None else _DTYPES[tensor.dtype]


# Everything that `prepare` may ask for, on GPUs with asynchronous copies and on Turing.
VARIANTS = [
    ("gemm_mma", defines(tile, weight, stages(tile, weight, capability), segmented))
    for tile in TILES
    for weight in (4, 5, 8)
    for segmented in (False, True)
    for capability in ((8, 0), (7, 5))
    if _holds(tile, weight)
]
