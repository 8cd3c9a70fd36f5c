"""cuda/gemm_wgmma.cu, run on the CPU, against sums in float64."""

from __future__ import annotations

import itertools
import operator
import struct
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from qdiff.ops import _cupy, _gemm_wgmma, _tensor_maps
from qdiff.ops._gemm_wgmma import Tile
from qdiff.ops._problem import addresses

# Each combination of tile, kind of weights and epilogue is a kernel of its own, three seconds of g++: the cases are
# chosen to need few.


@dataclass(frozen=True)
class Case:
    """One product; a linear layer is an image of one row."""

    tile: Tile
    n: int = 128
    segments: tuple[int, ...] = (64,)
    size: tuple[int, int, int] = (1, 1, 16)  # images, rows, columns
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    weight: int = 4
    scale_rows: int = 1
    rank: int = 0
    low_dtype: torch.dtype = torch.float16
    bias: torch.dtype | None = torch.float32
    shift: bool = False
    residual: bool = False
    out_dtype: torch.dtype = torch.float16
    extremes: bool = False
    multiprocessors: int = 3


WIDE, ODD, QUARTERS, HALVES, WIDE_QUARTERS = Tile(256), Tile(96), Tile(16, 4), Tile(64, 2), Tile(128, 4)
LARGE = Tile(128, features=192)
THREE = {"kernel": (3, 3), "padding": (1, 1)}
BF16 = torch.bfloat16

LINEAR = {
    "256 tokens": Case(WIDE, n=132, segments=(672,), size=(1, 1, 300), scale_rows=300, multiprocessors=1),
    "256 tokens, K = 32": Case(WIDE, n=20, segments=(32,), size=(1, 1, 257), scale_rows=1),
    "256 tokens, less than a tile": Case(WIDE, n=4, segments=(320,), size=(1, 1, 3), scale_rows=3, bias=None),
    "96 tokens": Case(ODD, n=260, segments=(672,), size=(1, 1, 100), scale_rows=100, multiprocessors=1),
    "96 tokens, K = 96": Case(ODD, n=64, segments=(96,), size=(1, 1, 97), scale_rows=97, bias=torch.float16),
    "96 tokens, one scale for all": Case(ODD, n=64, segments=(96,), size=(1, 1, 97)),
    "extremes": Case(ODD, n=68, segments=(672,), size=(1, 1, 20), extremes=True),
    "codebook": Case(ODD, n=132, segments=(672,), size=(1, 1, 100), weight=5, scale_rows=2),
    "codebook, extremes": Case(ODD, n=68, segments=(160,), size=(1, 1, 20), weight=5, extremes=True),
    "codebook, K = 32, tiles one after the other": Case(
        ODD, n=260, segments=(32,), size=(1, 1, 200), weight=5, scale_rows=200, multiprocessors=1
    ),
    "int8": Case(ODD, n=132, segments=(672,), size=(1, 1, 100), weight=8, scale_rows=100),
    "int8, K = 96": Case(ODD, n=76, segments=(96,), size=(1, 1, 40), weight=8),
    "16 tokens, four blocks": Case(QUARTERS, n=200, segments=(672,), size=(1, 1, 20), scale_rows=20),
    "16 tokens, four blocks, two stages": Case(QUARTERS, n=12, segments=(160,), size=(1, 1, 16), scale_rows=16),
    "16 tokens, four blocks, one stage": Case(QUARTERS, n=64, segments=(32,), size=(1, 1, 5)),
    "64 tokens, two blocks": Case(HALVES, n=136, segments=(672,), size=(1, 1, 70), scale_rows=70),
    "128 tokens, four blocks": Case(WIDE_QUARTERS, n=136, segments=(1184,), size=(1, 1, 150), scale_rows=150),
    "192 features": Case(LARGE, n=388, segments=(672,), size=(1, 1, 200), scale_rows=200, multiprocessors=1),
    "tiles of all features for each block": Case(ODD, n=260, segments=(96,), size=(1, 1, 500), scale_rows=500),
    "192 features, 192 tokens": Case(
        Tile(192, features=192), n=388, segments=(160,), size=(1, 1, 500), scale_rows=500, multiprocessors=1
    ),
    "192 features, two blocks, rank 32": Case(
        Tile(128, 2, 192), n=388, segments=(672,), size=(1, 1, 200), scale_rows=200, rank=32, residual=True
    ),
    "192 features, int8, less than a tile": Case(LARGE, n=72, segments=(160,), size=(1, 1, 60), weight=8),
    "192 features, rank 48, residual": Case(LARGE, n=200, segments=(320,), size=(1, 1, 140), rank=48, residual=True),
    "192 features, rank 32": Case(LARGE, n=320, segments=(96,), size=(1, 1, 200), rank=32, multiprocessors=1),
    "256 tokens, stored in parts": Case(
        WIDE, n=128, segments=(96,), size=(1, 1, 600), scale_rows=600, multiprocessors=1
    ),
    "rank 8": Case(ODD, n=132, segments=(320,), size=(1, 1, 100), rank=8, scale_rows=100),
    "rank 32": Case(ODD, n=68, segments=(96,), size=(1, 1, 200), rank=32),
    "rank 48, bfloat16": Case(ODD, n=68, segments=(320,), size=(1, 1, 97), rank=48, low_dtype=BF16),
    "rank 128": Case(ODD, n=132, segments=(672,), size=(1, 1, 200), rank=128, multiprocessors=1),
    "rank 32, two blocks, residual": Case(
        HALVES, n=132, segments=(320,), size=(1, 1, 100), rank=32, residual=True, out_dtype=BF16, low_dtype=BF16
    ),
    "rank 128, two blocks, residual": Case(
        HALVES, n=64, segments=(320,), size=(1, 1, 60), rank=128, residual=True, out_dtype=BF16
    ),
    "rank 48, 128 tokens, four blocks": Case(
        WIDE_QUARTERS, n=132, segments=(320,), size=(1, 1, 100), rank=48, low_dtype=BF16
    ),
    "two segments": Case(
        ODD, n=132, segments=(64, 160), size=(1, 1, 240), scale_rows=4, residual=True, multiprocessors=1
    ),
    "two segments, 192 tokens": Case(
        Tile(192), n=260, segments=(160, 96), size=(1, 1, 400), scale_rows=2, multiprocessors=1
    ),
    "two segments, two blocks": Case(HALVES, n=136, segments=(64, 160), size=(1, 1, 90), scale_rows=3),
    "three segments, four blocks": Case(QUARTERS, n=36, segments=(32, 160, 64), size=(1, 1, 30), scale_rows=30),
    "float32": Case(ODD, n=131, segments=(320,), size=(1, 1, 100), scale_rows=100, out_dtype=torch.float32),
    "float32, residual": Case(
        ODD, n=131, segments=(64,), size=(1, 1, 100), scale_rows=100, residual=True, out_dtype=torch.float32
    ),
    "N no multiple of four": Case(ODD, n=131, segments=(96,), size=(1, 1, 100), residual=True, out_dtype=BF16),
    "N = 1": Case(ODD, n=1, segments=(32,), size=(1, 1, 2), residual=True, out_dtype=BF16, bias=BF16),
}

CONVOLUTIONS = {
    "C = 32": Case(ODD, n=36, segments=(32,), size=(2, 7, 5), scale_rows=2, shift=True, **THREE),
    "C = 96, stride 2": Case(ODD, n=36, segments=(96,), size=(3, 9, 6), stride=(2, 2), residual=True, **THREE),
    "C = 160, no padding": Case(ODD, n=132, segments=(160,), size=(1, 6, 17), kernel=(3, 3), shift=True),
    "C = 64, an odd number of taps": Case(ODD, n=36, segments=(64,), size=(2, 7, 5), residual=True, **THREE),
    "C = 64 and 192, int8": Case(ODD, n=36, segments=(64, 192), size=(2, 7, 5), scale_rows=2, weight=8, **THREE),
    "C = 192, codebook, 2 x 3": Case(ODD, n=36, segments=(192,), size=(2, 7, 5), weight=5, kernel=(2, 3)),
    "C = 320, four blocks": Case(WIDE_QUARTERS, n=36, segments=(320,), size=(2, 9, 8), shift=True, **THREE),
    "C = 64 and 320, four blocks": Case(WIDE_QUARTERS, n=36, segments=(64, 320), size=(2, 9, 8), **THREE),
    "C = 320, stride 2, no padding": Case(ODD, n=36, segments=(320,), size=(2, 5, 7), kernel=(3, 3), stride=(2, 2)),
    "2 x 3, strides and paddings unlike": Case(
        ODD, n=24, segments=(64,), size=(2, 6, 9), kernel=(2, 3), stride=(1, 2), padding=(0, 1), residual=True
    ),
    "many tiny images": Case(
        ODD, n=36, segments=(32,), size=(13, 3, 3), scale_rows=13, shift=True, residual=True, **THREE
    ),
    "one pixel in all": Case(ODD, n=36, segments=(64,), size=(1, 3, 3), kernel=(3, 3), weight=5),
    "one row, stride 2": Case(ODD, n=36, segments=(64,), size=(1, 1, 9), stride=(2, 2)),
    "one row, two segments": Case(ODD, n=36, segments=(64, 32), size=(1, 1, 9), scale_rows=1),
    "one row, padded": Case(ODD, n=36, segments=(64,), size=(1, 1, 9), padding=(0, 1)),
    "one pixel an image": Case(ODD, n=36, segments=(32,), size=(5, 1, 1), scale_rows=5, shift=True, **THREE),
    "int8": Case(ODD, n=36, segments=(96,), size=(2, 6, 5), weight=8, **THREE),
    "codebook": Case(ODD, n=36, segments=(96,), size=(2, 6, 5), weight=5, **THREE),
    "two segments": Case(
        ODD, n=132, segments=(64, 96), size=(2, 8, 8), scale_rows=2, shift=True, residual=True, **THREE
    ),
    "four segments": Case(
        ODD, n=36, segments=(32, 160, 64, 32), size=(3, 4, 5), scale_rows=3, shift=True, multiprocessors=1, **THREE
    ),
    "two segments, two blocks": Case(HALVES, n=132, segments=(64, 160), size=(2, 7, 5), scale_rows=2, **THREE),
    "two segments, four blocks": Case(QUARTERS, n=36, segments=(32, 160), size=(2, 4, 3), scale_rows=2, **THREE),
    "two segments, three blocks for the larger": Case(
        WIDE_QUARTERS, n=36, segments=(160, 64), size=(2, 9, 8), scale_rows=2, shift=True, residual=True, **THREE
    ),
    "160 tokens, two blocks": Case(
        Tile(160, 2), n=36, segments=(160,), size=(2, 12, 9), scale_rows=2, residual=True, **THREE
    ),
    "four segments, more than 128 tokens": Case(
        Tile(160), n=36, segments=(32, 160, 64, 32), size=(3, 9, 7), scale_rows=3, multiprocessors=1, **THREE
    ),
    "four segments, 192 tokens": Case(
        Tile(192), n=36, segments=(32, 160, 64, 32), size=(3, 9, 7), scale_rows=3, shift=True, **THREE
    ),
    "two segments, 160 tokens, codebook": Case(Tile(160), n=68, segments=(64, 32), size=(2, 9, 9), weight=5),
    "192 features, two segments": Case(
        LARGE, n=260, segments=(64, 96), size=(2, 9, 8), scale_rows=2, shift=True, multiprocessors=1, **THREE
    ),
    "four segments, four blocks": Case(QUARTERS, n=36, segments=(32, 96, 64, 32), size=(2, 4, 3), **THREE),
    "four blocks, C = 96, stride 2": Case(QUARTERS, n=36, segments=(96,), size=(3, 5, 5), stride=(2, 2), **THREE),
}

CASES = LINEAR | {f"convolution, {name}": case for name, case in CONVOLUTIONS.items()}


def encode(address, sizes, box, *windows):
    """In the driver's place: a tensor map for emulate_sm90.h, where the driver would make one."""
    rank = len(sizes)
    assert address % 16 == 0
    assert all(0 < size <= 2**32 for size in sizes)
    assert all(size % 16 == 0 and size < 2**40 for size in itertools.accumulate(sizes[:-1], operator.mul))
    assert box[0] in (64, 128)
    assert 0 < box[1] <= 256
    assert rank == (4 if windows else 2)
    first, last, steps = zip(*reversed(windows), strict=True) if windows else ((0, 0), (0, 0), (1, 1))
    assert all(-128 <= place <= 127 for place in (*first, *last))
    assert all(0 < step <= 8 for step in steps)
    swizzle = 3 if box[0] == 128 else 2
    fields = (address, rank, swizzle, *sizes, *([1] * (4 - rank)), *box, *first, *last, *steps)
    return struct.pack("QII4Q2I4i2I", *fields).ljust(128, b"\0")


@pytest.fixture
def run(emulated_kernel, problems, guarded, monkeypatch):
    """`run(case, problem, dtype)`: what `_gemm_wgmma.prepare`'s launch computes, its kernel emulated."""

    def run_one(case: Case, problem: SimpleNamespace, dtype: torch.dtype) -> torch.Tensor:
        monkeypatch.setattr(_cupy, "kernel", emulated_kernel)
        monkeypatch.setattr(_cupy, "multiprocessors", lambda device: case.multiprocessors)
        monkeypatch.setattr(_tensor_maps, "encode", encode)
        _gemm_wgmma._plan.cache_clear()
        _tensor_maps.forget()
        problem = problems.guard(problem, guarded)
        problem.out_dtype = dtype
        x = problem.x
        problem.x = SimpleNamespace(device=torch.device("cpu", 0), data_ptr=x.data_ptr)  # a device with an index
        # A margin of sevens around the output shows writes beside it.
        count = problem.B * problem.OH * problem.OW * problem.N
        storage = torch.full((count + 512,), 7, dtype=dtype)
        out = storage[256 : 256 + count].view(-1, problem.N)
        assert _gemm_wgmma.fits(case.tile, problem)
        assert _gemm_wgmma.refusal(problem) is None
        _gemm_wgmma.prepare(problem, out, case.tile)(addresses(problem, out), True)
        assert (storage[:256] == 7).all()
        assert (storage[256 + count :] == 7).all()
        return out

    yield run_one
    _gemm_wgmma._plan.cache_clear()
    _tensor_maps.forget()


@pytest.mark.parametrize(
    "name",
    [
        *("256 tokens", "96 tokens", "codebook", "int8", "16 tokens, four blocks"),
        *("N no multiple of four", "convolution, many tiny images"),  # a residual of another type, not to be looked at
    ],
)
def test_accumulators_bit_for_bit(name, run, problems):
    problem = problems.make_problem(CASES[name])
    got = run(CASES[name], problems.replace_scales(problem), torch.int32)
    assert torch.equal(got.double(), sum(problems.accumulators(problem)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_result(case, run, problems):
    problem = problems.make_problem(case)
    problems.assert_result(run(case, problem, case.out_dtype), problem)
