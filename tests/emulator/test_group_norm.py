"""The kernels of a group norm and their launcher, run on the CPU, against float64 and the reference."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from qdiff.ops import _cupy, _group_norm_cuda, group_norm, quantize_group_norm, quantize_per_sample
from qdiff.ops.checks import Checked

# Each kernel variant costs two seconds of g++: the cases are chosen to need few.
HALF, FLOAT, SINGLY = (torch.float16, True), (torch.float32, False), (torch.bfloat16, True)  # dtype, silu

_spec = importlib.util.spec_from_file_location("bound", Path(__file__).parents[1] / "ops" / "group_norm_bound.py")
bound = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bound)


@pytest.fixture(autouse=True)
def device(monkeypatch, emulated_kernel):
    """A GPU of a few multiprocessors, emulated."""
    monkeypatch.setattr(_cupy, "kernel", emulated_kernel)
    monkeypatch.setattr(_cupy, "multiprocessors", lambda device: 22)


@pytest.fixture
def result_of(guarded):
    """What the kernels make; arrays end where memory does."""

    def run(*arguments):
        given = (guarded(value) if isinstance(value, torch.Tensor) else value for value in arguments)
        return _group_norm_cuda.group_norm(Checked(None), *given)

    return run


def problem(shape, groups, kind, segments, rows, affine=True, smoothed=True):
    """The operator's arguments: channels with means and deviations of their own, and an outlier."""
    dtype, silu = kind
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.linspace(0.5, 3, shape[1])[:, None, None]
    x += torch.linspace(-2, 5, shape[1])[:, None, None]
    x[0, 0, 0, 0] = 1e4
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], generator=generator).to(dtype) if affine else None for _ in range(2))
    scale = torch.rand(rows, len(segments), generator=generator) / 50 + 0.005
    smooth = torch.rand(shape[1], generator=generator) + 0.5 if smoothed else None
    return x, groups, weight, bias, 1e-5, silu, scale, smooth, list(segments)


CASES = {
    "chunks that groups cut": ((2, 40, 9, 7), 4, HALF, (40,), 1),
    "SDXL's widths": ((1, 320, 6, 5), 32, HALF, (320,), 1),
    "slices and segments": ((2, 2560, 2, 3), 32, HALF, (1280, 1280), 2),
    "several groups a chunk": ((1, 64, 3, 3), 32, HALF, (64,), 1),
    "one pixel": ((3, 16, 1, 1), 2, HALF, (16,), 1),
    "groups of one channel": ((2, 16, 3, 2), 16, HALF, (8, 8), 2),
    "many pixels a thread": ((2, 72, 60, 45), 8, FLOAT, (72,), 1),
    "no multiple of 8": ((3, 30, 7, 3), 5, SINGLY, (12, 18), 3),
    "more segments": ((1, 12, 9, 40), 2, SINGLY, (1,) * 12, 1),
}


@pytest.mark.parametrize(("shape", "groups", "kind", "segments", "rows"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("plain", [False, True])
def test_codes(result_of, shape, groups, kind, segments, rows, plain):
    arguments = problem(shape, groups, kind, segments, rows, not plain, not plain)
    codes = result_of(*arguments)
    bound.assert_codes_near(codes, *arguments)
    expected = quantize_group_norm(*arguments)
    assert codes.stride() == expected.stride()
    # Where a sum in another order tips a rounding over, a code changes: rarely.
    assert (codes != expected).double().mean() < 0.01


@pytest.mark.parametrize(("shape", "groups", "kind", "segments", "rows"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("plain", [False, True])
def test_values(result_of, shape, groups, kind, segments, rows, plain):
    arguments = problem(shape, groups, kind, segments, rows, not plain)[:6]
    values = result_of(*arguments)
    bound.assert_values_near(values, *arguments)
    expected = group_norm(*arguments)
    assert values.stride() == expected.stride()
    eps = torch.finfo(values.dtype).eps
    torch.testing.assert_close(values, expected, rtol=2 * eps + 1e-5, atol=2 * eps + 1e-5)


def test_codes_are_the_quantizers_where_nothing_is_rounded(result_of):
    """Halves of ones and minus ones have mean 0 and deviation 1."""
    x = torch.ones(2, 48, 4, 6, dtype=torch.float32)
    x[:, :, ::2] = -1
    _, _, weight, bias, _, _, scale, smooth, segments = problem(x.shape, 3, FLOAT, (16, 32), 2)
    for order in (torch.channels_last, torch.contiguous_format):
        y = x.contiguous(memory_format=order)
        codes = result_of(y, 3, weight, bias, 0.0, False, scale, smooth, segments)
        expected = torch.addcmul(bias[:, None, None], y, weight[:, None, None])
        assert torch.equal(codes, quantize_per_sample(expected, scale, smooth, segments, 1))


@pytest.mark.parametrize("mean", [0.0, 1e3, -3e4])
@pytest.mark.parametrize("deviation", [0.0, 1.0])
def test_large_means(result_of, mean, deviation):
    x, *rest = problem((2, 72, 60, 45), 8, FLOAT, (72,), 1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    x = (mean + deviation * noise).contiguous(memory_format=torch.channels_last)
    bound.assert_codes_near(result_of(x, *rest), x, *rest)


def test_views_that_start_anywhere(result_of):
    x, groups, weight, bias, *rest = problem((2, 40, 9, 7), 4, HALF, (40,), 1)
    *rest, smooth, segments = rest
    expected = result_of(x, groups, weight, bias, *rest, smooth, segments)
    moved = [torch.cat([vector[:1], vector])[1:] for vector in (weight, bias, smooth)]
    flat = x.permute(0, 2, 3, 1).flatten()
    x = torch.cat([flat[:1], flat])[1:].view(2, 9, 7, 40).permute(0, 3, 1, 2)
    assert torch.equal(result_of(x, groups, *moved[:2], *rest, moved[2], segments), expected)


def test_a_second_call_of_a_kind_is_the_first_one_of_other_tensors(monkeypatch):
    known, arguments = Checked(None), problem((2, 40, 9, 7), 4, HALF, (40,), 1)
    x, groups, weight, *rest = arguments
    others = [
        (x, groups, weight, *rest),
        (x.flip(2), groups, weight.flip(0), *rest),
        (x.contiguous(), groups, weight, *rest),
    ]
    expected = [_group_norm_cuda.group_norm(Checked(None), *other) for other in others]
    _group_norm_cuda.group_norm(known, *arguments)
    monkeypatch.setattr(_cupy, "kernel", None)  # nobody asks for it again
    for other, codes in zip(others, expected):
        assert torch.equal(_group_norm_cuda.group_norm(known, *other), codes)


def test_a_second_call_without_codes(monkeypatch):
    known, (*arguments, _, _, _) = Checked(None), problem((2, 40, 9, 7), 4, HALF, (40,), 1)
    x, *rest = arguments
    expected = _group_norm_cuda.group_norm(Checked(None), x.flip(2), *rest)
    _group_norm_cuda.group_norm(known, *arguments)
    monkeypatch.setattr(_cupy, "kernel", None)
    assert torch.equal(_group_norm_cuda.group_norm(known, x.flip(2), *rest), expected)


def test_what_the_kernels_refuse():
    refuses = _group_norm_cuda.refuses_group_norm
    assert refuses(2048, 1, [2048]) is None
    assert refuses(256, 1, [255, 1]) is None
    assert "4096 channels a group of 4096" in refuses(4096, 1, [4096])
    assert "257 channels a group of 514" in refuses(514, 2, [514])
