"""Integer linear layers and convolutions on the GPU: one problem, two kernels, and which of them with which tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import itemgetter, or_

import torch
from torch import Tensor

from qdiff.numerics.gemm_layout import widen_segments
from qdiff.ops import _cupy, _gemm_mma, _gemm_wgmma, _tiles
from qdiff.ops._problem import Launch, Problem, addresses, addresses_of, allocator, dense, is_pointwise
from qdiff.ops._settled import note_read, settled
from qdiff.ops._shortcut import offer
from qdiff.ops.backend import KERNEL_BLOCK
from qdiff.ops.checks import Checked

_Tensors = tuple[Tensor | None, ...]  # in the order of `addresses`, without the result


class Ready:
    """What an earlier call made, for those of its kind whose tensors need no copy. launch: with which it computes."""

    def __init__(self, launch: Launch, tensors: _Tensors, out: Tensor) -> None:
        given = [place for place, tensor in enumerate(tensors) if tensor is not None]
        # 12 addresses of those that are given, of the result, and of none.
        self._places = itemgetter(*(given.index(i) if i in given else -1 for i in range(len(tensors))), -2)
        self._weights = slice(1, 2 + (tensors[2] is not None))  # codes and multipliers
        self.launch, self._empty, self._forced = launch, allocator(out.device), forced
        self._like = tuple(out.shape), out.stride(), out.dtype

    def __call__(self, given: Sequence[Tensor]) -> Tensor | None:
        """The result for the tensors that are not None, or None where they need copies."""
        places = [tensor.data_ptr() for tensor in given]
        if reduce(or_, places) % 16 or self._forced != forced:
            return None
        out = self._empty(*self._like)
        self.launch(self._places((*places, out.data_ptr(), 0)), settled(tuple(given[self._weights])))
        return out


# A path and a tile, by name.
forced: tuple[str | None, str | None] = (None, None)


def linear(
    known: Checked,
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
    weights = (codes, multipliers, codebook, scale)
    tensors = (x_codes, *weights, bias, None, residual, x_scale, x_low, up)
    done = _again(known, tensors)
    if done is not None:
        return done
    k, n = x_codes.shape[-1], codes.shape[0]
    out = torch.empty(*x_codes.shape[:-1], n, dtype=out_dtype, device=x_codes.device)
    m = x_codes.numel() // k
    if x_low is not None and up is not None:
        x_low, up = dense(x_low), dense(up.to(x_low.dtype))
    problem = Problem(
        x=dense(x_codes),
        B=1,
        H=1,
        W=m,
        C=k,
        OH=1,
        OW=m,
        N=n,
        kernel=(1, 1),
        stride=(1, 1),
        padding=(0, 0),
        segments=(k,),
        x_scale=dense(x_scale).flatten(),
        weight_kind=_kind(multipliers, codebook),
        codes=dense(codes),
        multipliers=dense(multipliers),
        codebook=dense(codebook),
        scale=dense(scale),
        bias=dense(bias),
        shift=None,
        residual=dense(residual),
        x_low=x_low,
        up=up,
        out_dtype=out_dtype,
    )
    return _compute(known, tensors, problem, out)


def conv2d(
    known: Checked,
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
    """`w4a8_conv2d` (groups of 32) and `w8a8_conv2d` (no multipliers, no codebook, any segments) on checked CUDA
    arguments."""
    weights = (codes, multipliers, codebook, scale)
    tensors = (x_codes, *weights, bias, shift, residual, x_scale, None, None)
    done = _again(known, tensors)
    if done is not None:
        return done
    batch, _, height, width = x_codes.shape
    n, nhwc = codes.shape[0], x_codes.permute(0, 2, 3, 1)
    widths = [-(-channels // KERNEL_BLOCK) * KERNEL_BLOCK for channels in segments]
    if widths != list(segments):
        # Such layers are few and small (the first of a denoiser), and so are the copies, made at every call.
        nhwc = widen_segments(nhwc, segments, widths)
        codes = widen_segments(codes, segments, widths, kernel[0] * kernel[1])
    rows = (height + 2 * padding[0] - kernel[0]) // stride[0] + 1
    columns = (width + 2 * padding[1] - kernel[1]) // stride[1] + 1
    shape = (batch, n, rows, columns)
    out = torch.empty(shape, dtype=out_dtype, device=x_codes.device, memory_format=torch.channels_last)
    if is_pointwise(kernel, stride, padding) and shift is None:  # one row of all pixels
        batch, height, width, rows, columns = 1, 1, batch * height * width, 1, batch * rows * columns
    problem = Problem(
        x=dense(nhwc),
        B=batch,
        H=height,
        W=width,
        C=sum(widths),
        OH=rows,
        OW=columns,
        N=n,
        kernel=(kernel[0], kernel[1]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        segments=tuple(widths),
        x_scale=dense(x_scale),
        weight_kind=_kind(multipliers, codebook),
        codes=dense(codes),
        multipliers=dense(multipliers),
        codebook=dense(codebook),
        scale=dense(scale),
        bias=dense(bias),
        shift=dense(shift),
        residual=None if residual is None else dense(residual.permute(0, 2, 3, 1)),
        x_low=None,
        up=None,
        out_dtype=out_dtype,
    )
    return _compute(known, tensors, problem, out)


def _kind(multipliers: Tensor | None, codebook: Tensor | None) -> int:
    return 4 if multipliers is not None else 5 if codebook is not None else 8


def _again(known: Checked, tensors: _Tensors) -> Tensor | None:
    """The result, by the launch that an earlier call of this kind left; None where there is none, or needs copies."""
    ready: Ready | None = known.prepared.get(forced)
    if ready is None:
        return None
    out = ready([tensor for tensor in tensors if tensor is not None])
    if out is not None:
        offer(tensors, ready)
    return out


def _compute(known: Checked, tensors: _Tensors, problem: Problem, out: Tensor) -> Tensor:
    """Compute `out`, and leave the launch to other calls of this kind if it reads the operator's own tensors."""
    if out.numel():
        launch = _run(problem, out)
        if addresses(problem, out)[:-1] == addresses_of(tensors):
            ready = known.prepared[forced] = Ready(launch, tensors, out)
            note_read(part for part in tensors[1:3] if part is not None)
            offer(tensors, ready)
    return out


def _run(problem: Problem, out: Tensor) -> Launch:
    path, name = forced
    path = path or ("wgmma" if _cupy.capability(out.device) == (9, 0) else "mma")
    kernels = _gemm_wgmma if path == "wgmma" and _gemm_wgmma.refusal(problem) is None else _gemm_mma
    wanted = next((tile for tile in kernels.TILES if tile.name == name), None)
    launch = kernels.prepare(problem, out, wanted or _tiles.choose(kernels, problem, out))
    launch(addresses(problem, out), False)
    return launch


TILES = [tile.name for tile in _gemm_wgmma.TILES]


@contextmanager
def forced_path(path: str) -> Iterator[None]:
    """Run every problem on "wgmma" or "mma": for tests and benchmarks; the whole process."""
    with _forcing(path, forced[1]):
        yield


@contextmanager
def forced_tile(name: str) -> Iterator[None]:
    """Run every problem with the tile of this name where its kernel has it: for tests and benchmarks;
    the whole process."""
    with _forcing(forced[0], name):
        yield


@contextmanager
def _forcing(path: str | None, tile: str | None) -> Iterator[None]:
    global forced
    before, forced = forced, (path, tile)
    try:
        yield
    finally:
        forced = before
