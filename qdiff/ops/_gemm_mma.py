"""Launching cuda/gemm_mma.cu: tiles and parameters."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple

import torch

from qdiff.ops import _cupy

if TYPE_CHECKING:
    from torch import Tensor

    from qdiff.ops._gemm import Problem

THREADS = 256
MAX_SEGMENTS = 4
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


TILES = [Tile(features, tokens) for tokens in (128, 64, 32, 16) for features in (128, 64)]

_POINTERS = (
    "x",
    "codes",
    "multipliers",
    "codebook",
    "scale",
    "bias",
    "shift",
    "residual",
    "x_scale",
    "x_low",
    "up",
    "out",
)
_GEOMETRY = ("B", "H", "W", "C", "OH", "OW", "N", "KH", "KW", "stride_h", "stride_w", "pad_h", "pad_w", "segments")
_REST = ("x_scale_pixels", "rank", "bias_dtype", "shift_dtype", "low_dtype", "out_dtype")


class Params(ctypes.Structure):
    """The struct of the same name in the kernel."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int) for name in _GEOMETRY),
        ("segment_width", ctypes.c_int * MAX_SEGMENTS),
        *((name, ctypes.c_int) for name in _REST),
    ]


def fits(tile: Tile, problem: Problem) -> bool:
    """Every tile computes every problem."""
    return True


def guess(problem: Problem) -> Tile:
    """The tile by `choose_tile`."""
    pixels = problem.B * problem.OH * problem.OW
    return choose_tile(problem.N, pixels, _cupy.multiprocessors(problem.x.device))


def launch(problem: Problem, out: Tensor, tile: Tile | None = None) -> None:
    """Compute `problem` into `out` on torch's current stream.

    Args:
        problem: checked; every channel segment a multiple of 32 wide, at most `MAX_SEGMENTS` of them; x and codes
            aligned to 16 bytes. The low-rank branch runs on the tensor cores when its type is one of theirs and its
            rank a multiple of 8.
        out: [B, OH, OW, N] in memory, of the problem's out_dtype.
        tile: of `TILES`; `choose_tile` picks one by default.
    """
    pixels = problem.B * problem.OH * problem.OW
    if pixels == 0:
        return
    tile = tile or guess(problem)
    depth = stages(tile, _cupy.capability(out.device))
    macros = defines(tile, problem.weight_kind, depth, len(problem.segments) > 1)
    blocks = -(-problem.N // tile.features) * -(-pixels // tile.tokens)
    shared = shared_bytes(tile, problem.weight_kind, depth)
    _cupy.kernel("gemm_mma", macros).launch((blocks, 1, 1), THREADS, shared, params(problem, out))


def choose_tile(features: int, pixels: int, multiprocessors: int) -> Tile:
    """The tile whose blocks, in waves over the multiprocessors, take the fewest estimated cycles for a step of K.

    A block's step costs its products (a tensor core of the Ampere generation makes 2,048 of 8 bits a cycle), and what
    grows with the operands rather than with their product: copies, fragment loads and unpacking, two cycles a row. So
    large tiles win where they fill the machine, and small ones elsewhere. Not measured yet.
    """

    def cycles(tile: Tile) -> int:
        waves = -(-(-(-features // tile.features) * -(-pixels // tile.tokens)) // multiprocessors)
        return waves * (tile.features * tile.tokens * _STEP // 2048 + 2 * (tile.features + tile.tokens))

    return min(TILES, key=cycles)


def stages(tile: Tile, capability: tuple[int, int]) -> int:
    """Steps under way: as many as leave room for a second block in the 100 KiB that most GPUs have.

    Turing copies through registers, so a third stage would have nothing to wait for.
    """
    if capability < (8, 0):
        return 2
    return 3 if tile.features * tile.tokens >= 128 * 128 else 4


def shared_bytes(tile: Tile, weight: int, depth: int) -> int:
    """Dynamic shared memory of a block: the stages, or the strip of the output that is turned in their place."""
    weight_row = _STEP if weight == 8 else _STEP // 2
    stage = tile.tokens * _STEP + tile.features * (weight_row + (weight == 4))
    warp_features = 32 if tile.features * tile.tokens >= 8192 else 16
    strips = 8 * warp_features // tile.features  # warps along the tokens
    strip = strips * min(16, tile.tokens // strips)
    return max(4 * tile.tokens + depth * stage, 4 * strip * (tile.features + 4))


def defines(tile: Tile, weight: int, depth: int, segmented: bool) -> tuple[tuple[str, int], ...]:
    """The macros of one compiled kernel."""
    return (
        ("WEIGHT", weight),
        ("FEATURES", tile.features),
        ("TOKENS", tile.tokens),
        ("STAGES", depth),
        ("SEGMENTED", int(segmented)),
    )


def params(problem: Problem, out: Tensor) -> Params:
    """The kernel's parameter. The tensors must outlive the launch, not the kernel."""
    pixels = problem.B * problem.OH * problem.OW
    raw = out.dtype == torch.int32  # only the accumulators: there may be no scales at all
    segments = problem.segments
    return Params(
        _pointer(problem.x),
        _pointer(problem.codes),
        _pointer(problem.multipliers),
        _pointer(problem.codebook),
        _pointer(problem.scale),
        _pointer(problem.bias),
        _pointer(problem.shift),
        _pointer(problem.residual),
        _pointer(problem.x_scale),
        _pointer(problem.x_low),
        _pointer(problem.up),
        out.data_ptr(),
        problem.B,
        problem.H,
        problem.W,
        problem.C,
        problem.OH,
        problem.OW,
        problem.N,
        *problem.kernel,
        *problem.stride,
        *problem.padding,
        len(segments),
        (ctypes.c_int * MAX_SEGMENTS)(*segments),
        pixels if raw else pixels // problem.x_scale.shape[0],
        0 if problem.up is None else problem.up.shape[1],
        _dtype(problem.bias),
        _dtype(problem.shift),
        _dtype(problem.x_low),
        _DTYPES[out.dtype],
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _dtype(tensor: Tensor | None) -> int:
    return 0 if tensor is None else _DTYPES[tensor.dtype]


# Everything that `launch` may ask for, on GPUs with asynchronous copies.
VARIANTS = [
    ("gemm_mma", defines(tile, weight, stages(tile, (8, 0)), segmented))
    for tile in TILES
    for weight in (4, 5, 8)
    for segmented in (False, True)
]
