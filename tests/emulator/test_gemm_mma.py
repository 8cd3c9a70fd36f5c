"""cuda/gemm_mma.cu, run on the CPU, against sums in float64."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from qdiff.ops import _cupy, _gemm_mma
from qdiff.ops._gemm_mma import Tile
from qdiff.ops._problem import addresses

SMALLEST = Tile(64, 16)


@dataclass(frozen=True)
class Case:
    """One product; a linear layer is an image of one row."""

    n: int = 64
    segments: tuple[int, ...] = (64,)
    size: tuple[int, int, int] = (1, 1, 16)  # images, rows, columns
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    weight: int = 4
    tile: Tile = SMALLEST
    scale_rows: int = 1
    rank: int = 0
    low_dtype: torch.dtype = torch.float16
    bias: torch.dtype | None = torch.float32
    shift: bool = False
    residual: bool = False
    out_dtype: torch.dtype = torch.float16
    extremes: bool = False
    capability: tuple[int, int] = (8, 0)


CASES = {
    "one tile": Case(),
    "less than a tile, K = 32": Case(n=5, segments=(32,), size=(1, 1, 3)),
    "ragged in every direction": Case(n=200, segments=(320,), size=(1, 1, 77), tile=Tile(64, 32), scale_rows=77),
    "K = 96, an odd number of blocks": Case(n=130, segments=(96,), size=(1, 1, 33), tile=Tile(128, 16), scale_rows=33),
    "128 x 128, several blocks": Case(n=260, segments=(256,), size=(1, 1, 300), tile=Tile(128, 128), scale_rows=300),
    "128 x 64": Case(
        n=136, segments=(160,), size=(1, 1, 100), tile=Tile(128, 64), scale_rows=2, out_dtype=torch.float32
    ),
    "64 x 128": Case(n=72, segments=(160,), size=(1, 1, 200), tile=Tile(64, 128)),
    "64 x 64, no bias": Case(n=100, segments=(128,), size=(1, 1, 100), tile=Tile(64, 64), bias=None),
    "128 x 32, more pixel tiles than a band": Case(n=130, segments=(64,), size=(1, 1, 301), tile=Tile(128, 32)),
    "two stages, as on Turing": Case(n=72, segments=(352,), size=(1, 1, 40), capability=(7, 5)),
    "more rows than 16 bits count": Case(n=5, segments=(32,), size=(1, 1, 33000), tile=Tile(64, 128), scale_rows=33000),
    "fewer steps than stages": Case(n=70, segments=(96,), size=(1, 1, 40), tile=Tile(64, 32)),
    "odd blocks, eight stages": Case(
        n=70, segments=(96,), size=(1, 5, 7), kernel=(3, 3), padding=(1, 1), tile=Tile(64, 32)
    ),
    "odd blocks on Turing": Case(
        n=70, segments=(96,), size=(1, 5, 7), kernel=(3, 3), padding=(1, 1), capability=(7, 5), residual=True
    ),
    "two segments of 128 x 128": Case(
        n=130, segments=(64, 96), size=(2, 9, 9), kernel=(3, 3), padding=(1, 1), tile=Tile(128, 128), residual=True
    ),
    "two segments of 64 x 128, codebook": Case(
        n=70, segments=(32, 64), size=(2, 9, 9), tile=Tile(64, 128), weight=5, scale_rows=2
    ),
    "extremes": Case(n=70, segments=(1280,), size=(1, 1, 20), extremes=True),
    "extremes, codebook": Case(n=70, segments=(1280,), size=(1, 1, 20), extremes=True, weight=5),
    "extremes, int8": Case(n=70, segments=(1280,), size=(1, 1, 20), extremes=True, weight=8),
    "codebook": Case(n=130, segments=(96,), size=(1, 1, 200), tile=Tile(128, 64), weight=5),
    "int8": Case(n=130, segments=(96,), size=(1, 1, 200), tile=Tile(128, 128), weight=8, scale_rows=200),
    "3x3": Case(n=40, segments=(64,), size=(2, 7, 5), kernel=(3, 3), padding=(1, 1), scale_rows=2, shift=True),
    "3x3 without padding, stride 2": Case(segments=(32,), size=(1, 9, 8), kernel=(3, 3), stride=(2, 2)),
    "3x3, stride 2, C = 96": Case(
        n=70, segments=(96,), size=(3, 8, 6), kernel=(3, 3), stride=(2, 2), padding=(1, 1), shift=True, residual=True
    ),
    "2x3, strides and paddings unlike": Case(
        n=24, segments=(64,), size=(2, 6, 9), kernel=(2, 3), stride=(1, 2), padding=(0, 1), weight=8, tile=Tile(64, 64)
    ),
    "two segments": Case(
        n=70, segments=(64, 96), size=(4, 4, 5), kernel=(3, 3), padding=(1, 1), scale_rows=2, residual=True
    ),
    "four segments, codebook": Case(
        n=130, segments=(32, 96, 64, 32), size=(2, 9, 9), tile=Tile(128, 64), scale_rows=2, weight=5, shift=True
    ),
    "two segments, int8": Case(
        n=70, segments=(32, 64), size=(2, 4, 5), kernel=(3, 3), padding=(1, 1), weight=8, out_dtype=torch.float32
    ),
    "low-rank, float16": Case(n=70, size=(1, 1, 40), rank=32, residual=True, scale_rows=40, tile=Tile(64, 64)),
    "low-rank of 8, bfloat16": Case(n=77, rank=8, low_dtype=torch.bfloat16, out_dtype=torch.bfloat16, residual=True),
    "low-rank of 24, 128 x 128": Case(n=130, size=(1, 1, 200), rank=24, tile=Tile(128, 128), out_dtype=torch.float32),
    "low-rank, float32": Case(n=70, size=(1, 1, 40), rank=16, low_dtype=torch.float32, out_dtype=torch.float32),
    "low-rank of 5": Case(n=70, size=(1, 1, 40), rank=5, residual=True),
    "bfloat16 bias": Case(n=65, bias=torch.bfloat16, out_dtype=torch.bfloat16, residual=True),
}


@pytest.fixture
def run(emulated_kernel, problems, guarded, monkeypatch):
    """`run(case, problem, dtype)`: what `_gemm_mma.prepare`'s launch computes, its kernel emulated."""

    def run_one(case: Case, problem: SimpleNamespace, dtype: torch.dtype) -> torch.Tensor:
        monkeypatch.setattr(_cupy, "kernel", emulated_kernel)
        monkeypatch.setattr(_cupy, "capability", lambda device: case.capability)
        # A margin of sevens around the output shows writes beside it.
        count = problem.B * problem.OH * problem.OW * problem.N
        storage = torch.full((count + 512,), 7, dtype=dtype)
        out = storage[256 : 256 + count].view(-1, problem.N)
        problem = problems.guard(problem, guarded)
        _gemm_mma.prepare(problem, out, case.tile)(addresses(problem, out), True)
        assert (storage[:256] == 7).all()
        assert (storage[256 + count :] == 7).all()
        return out

    return run_one


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_accumulators_bit_for_bit(case, run, problems):
    problem = problems.make_problem(case)
    got = run(case, problems.replace_scales(problem), torch.int32)
    assert torch.equal(got.double(), sum(problems.accumulators(problem)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_result(case, run, problems):
    problem = problems.make_problem(case)
    problems.assert_result(run(case, problem, case.out_dtype), problem)
