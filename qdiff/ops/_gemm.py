"""Integer linear layers and convolutions on the GPU: one problem, two kernels, and which of them with which tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.ops import _cupy, _gemm_mma, _gemm_wgmma


@dataclass(slots=True)
class Problem:
    """A linear layer is the 1x1 convolution of one image, one pixel high and M wide.

    x is int8 [B, H, W, C] in memory, x_scale float32 [R, S], the weights as the operators take them (`weight_kind` 4:
    multipliers, 5: codebook, 8: int8). up has x_low's dtype.
    """

    x: Tensor
    B: int
    H: int
    W: int
    C: int
    OH: int
    OW: int
    N: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    segments: tuple[int, ...]
    x_scale: Tensor
    weight_kind: int
    codes: Tensor
    multipliers: Tensor | None
    codebook: Tensor | None
    scale: Tensor
    bias: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    x_low: Tensor | None
    up: Tensor | None
    out_dtype: torch.dtype


_forced_path: str | None = None
_forced_tile: str | None = None


def linear(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    x_low: Tensor | None,
    up: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`w4a8_linear` and `w8a8_linear` (no multipliers, no codebook) on checked CUDA arguments; K a multiple of 32."""
    k, n = x_codes.shape[-1], codes.shape[0]
    out = torch.empty(*x_codes.shape[:-1], n, dtype=out_dtype, device=x_codes.device)
    m = out.numel() // n
    if x_low is not None and up is not None:
        x_low, up = x_low.contiguous(), up.to(x_low.dtype).contiguous()
    problem = Problem(
        _aligned(x_codes.contiguous()),
        *(1, 1, m, k, 1, m, n),
        *((1, 1), (1, 1), (0, 0), (k,)),
        x_scale.contiguous(),
        *_weight(codes, multipliers, codebook),
        scale,
        bias,
        None,
        None if residual is None else residual.contiguous(),
        x_low,
        up,
        out_dtype,
    )
    if m:
        _run(problem, out)
    return out


def conv2d(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    segments: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """`w4a8_conv2d` and `w8a8_conv2d` (no multipliers, no codebook) on checked CUDA arguments; every segment a multiple
    of 32."""
    batch, channels, height, width = x_codes.shape
    n = codes.shape[0]
    rows = (height + 2 * padding[0] - kernel[0]) // stride[0] + 1
    columns = (width + 2 * padding[1] - kernel[1]) // stride[1] + 1
    shape = (batch, n, rows, columns)
    out = torch.empty(shape, dtype=out_dtype, device=x_codes.device, memory_format=torch.channels_last)
    problem = Problem(
        _aligned(x_codes.permute(0, 2, 3, 1).contiguous()),
        *(batch, height, width, channels, rows, columns, n),
        *((kernel[0], kernel[1]), (stride[0], stride[1]), (padding[0], padding[1]), tuple(segments)),
        x_scale.contiguous(),
        *_weight(codes, multipliers, codebook),
        scale,
        bias,
        None if shift is None else shift.contiguous(),
        None if residual is None else residual.contiguous(memory_format=torch.channels_last),
        None,
        None,
        out_dtype,
    )
    if out.numel():
        _run(problem, out)
    return out


def _weight(codes: Tensor, multipliers: Tensor | None, codebook: Tensor | None) -> tuple:
    kind = 4 if multipliers is not None else 5 if codebook is not None else 8
    return kind, codes, multipliers, codebook


def _aligned(x: Tensor) -> Tensor:
    # Both kernels read 16 bytes at a time; a view can start anywhere.
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _run(problem: Problem, out: Tensor) -> None:
    path = _forced_path or ("wgmma" if _cupy.capability(out.device) == (9, 0) else "mma")
    if path == "wgmma" and _gemm_wgmma.refusal(problem) is None:
        _gemm_wgmma.launch(problem, out, _wgmma_tile(problem))
    else:
        _gemm_mma.launch(problem, out)


def _wgmma_tile(problem: Problem) -> _gemm_wgmma.Tile:
    if _forced_tile is not None:
        for tile in _gemm_wgmma.TILES:
            if tile.name == _forced_tile:
                return tile
        raise ValueError(f"tile: got {_forced_tile!r}, expected one of {TILES}")
    return _gemm_wgmma.choose(problem)


TILES = [tile.name for tile in _gemm_wgmma.TILES]


@contextmanager
def forced_path(path: str) -> Iterator[None]:
    """Run every problem on "wgmma" or "mma": for tests and benchmarks; the whole process."""
    global _forced_path
    before, _forced_path = _forced_path, path
    try:
        yield
    finally:
        _forced_path = before


@contextmanager
def forced_tile(name: str) -> Iterator[None]:
    """Run every problem of the Hopper kernel with this tile of TILES: for tests and benchmarks; the whole process."""
    global _forced_tile
    before, _forced_tile = _forced_tile, name
    try:
        yield
    finally:
        _forced_tile = before
