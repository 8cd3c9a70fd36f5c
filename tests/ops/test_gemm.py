"""What convolutions of any channels hand to the matrix kernels, which take segments of whole blocks; without a GPU."""

import math
import sys

import pytest
import torch

from qdiff import ops
from qdiff.numerics.packing import pack_int4, pack_multipliers
from qdiff.ops import _gemm
from qdiff.ops.w8a8_conv2d import int8_conv2d

N, KERNEL = 6, (3, 2)
SEGMENTS = [(4,), (40,), (4, 36), (32, 20), (32,), (64, 32)]


@pytest.fixture
def launched(monkeypatch):
    """The problems that came to a launch, where the reference computes them as int8 weights."""
    problems = []

    def run(p, out):
        problems.append(p)
        added = (p.scale, p.bias, p.shift, p.residual.permute(0, 3, 1, 2))
        geometry = (p.kernel, p.stride, p.padding, p.segments, p.out_dtype)
        out.copy_(int8_conv2d(p.x.permute(0, 3, 1, 2), p.x_scale, p.codes, *added, *geometry))

    monkeypatch.setattr(_gemm, "_run", run)
    return problems


def on_kernels(monkeypatch, name, arguments):
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[f"qdiff.ops.{name}"], "runs_kernel", lambda op, x, refusal: refusal is None)
        return getattr(ops, name)(**arguments)


def inputs(segments):
    x = torch.randint(-127, 128, (2, sum(segments), 6, 5), dtype=torch.int8)
    return {
        "x_codes": x.contiguous(memory_format=torch.channels_last),
        "x_scale": torch.rand(2, len(segments)) + 0.1,
        "scale": torch.rand(N) + 0.1,
        "bias": torch.randn(N),
        "shift": torch.randn(2, N),
        "residual": torch.randn(2, N, 3, 4),
        "kernel": KERNEL,
        "stride": (2, 1),
        "padding": (1, 0),
        "segments": segments,
        "out_dtype": torch.float32,
    }


def assert_whole_blocks(problem, segments):
    assert problem.segments == tuple(math.ceil(width / 32) * 32 for width in segments)
    assert problem.C == problem.x.shape[3] == sum(problem.segments)
    assert problem.x.is_contiguous()
    assert problem.codes.shape == (N, problem.C * math.prod(KERNEL))


@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_8_bit_weights(segments, launched, monkeypatch):
    codes = torch.randint(-127, 128, (N, sum(segments) * math.prod(KERNEL)), dtype=torch.int8)
    arguments = inputs(segments) | {"codes": codes}
    got = on_kernels(monkeypatch, "w8a8_conv2d", arguments)
    assert torch.equal(got, ops.w8a8_conv2d(**arguments))
    assert_whole_blocks(launched[0], segments)


@pytest.mark.parametrize("codebook", [False, True], ids=["multipliers", "codebook"])
@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_4_bit_weights_in_smaller_groups_become_8_bit_ones(segments, codebook, launched, monkeypatch):
    k, group_size = sum(segments) * math.prod(KERNEL), math.gcd(16, *segments)
    multipliers = pack_multipliers(torch.randint(1, 16, (N, k // group_size), dtype=torch.uint8))
    arguments = inputs(segments) | {
        "codes": pack_int4(torch.randint(-8, 8, (N, k), dtype=torch.int8), group_size),
        "multipliers": None if codebook else multipliers,
        "codebook": torch.randint(-127, 128, (N, 16), dtype=torch.int8) if codebook else None,
        "group_size": group_size,
    }
    got = on_kernels(monkeypatch, "w4a8_conv2d", arguments)
    assert torch.equal(got, ops.w4a8_conv2d(**arguments))
    assert_whole_blocks(launched[0], segments)
    assert launched[0].weight_kind == 8
