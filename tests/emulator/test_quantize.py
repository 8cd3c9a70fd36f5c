"""The quantizing kernels and their launchers, run on the CPU, against the operators' references."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from qdiff.ops import _cupy, _quantize_cuda, quantize_per_sample, quantize_per_token
from qdiff.ops.activation import activated_width
from qdiff.ops.checks import Checked

_spec = importlib.util.spec_from_file_location("bound", Path(__file__).parents[1] / "ops" / "token_bound.py")
bound = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bound)

# Each kernel variant costs two seconds of g++: the cases are chosen to need few.


@pytest.fixture(autouse=True)
def device(monkeypatch, emulated_kernel, guarded):
    """A GPU of two multiprocessors, emulated, whose launchers get arrays after which there is no memory."""

    monkeypatch.setattr(_cupy, "kernel", emulated_kernel)
    monkeypatch.setattr(_cupy, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(_cupy, "capability", lambda device: (9, 0))

    for name in ("quantize_per_token", "quantize_layer_norm", "quantize_per_sample"):
        launcher = getattr(_quantize_cuda, name)

        def with_guards(x, *rest, launcher=launcher):
            return launcher(Checked(None), *(guarded(t) if isinstance(t, torch.Tensor) else t for t in (x, *rest)))

        monkeypatch.setattr(_quantize_cuda, name, with_guards)


def rows(shape, dtype, seed=0):
    """Values of very different rows: ordinary, zeros, tiny, huge, one outlier, ties, a single value."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).view(-1, shape[-1])
    x[1 % len(x)] = 0
    x[2 % len(x)] *= 1e-6
    x[3 % len(x)] *= 1e4
    x[4 % len(x), 3] = 500
    x[5 % len(x)] = torch.arange(shape[-1]) % 255 - 127
    return x.view(shape).to(dtype)


def vector(k):
    return torch.rand(k, generator=torch.Generator().manual_seed(9)) + 0.1


def assert_token_equal(x, smooth):
    codes, scale, low = _quantize_cuda.quantize_per_token(x, smooth, None)
    expected = quantize_per_token(x, smooth, None)
    assert torch.equal(scale, expected[1])
    assert torch.equal(codes, expected[0])
    assert codes.is_contiguous()
    assert low.shape == (*x.shape[:-1], 0)
    assert low.dtype == x.dtype


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((7, 40), torch.float16),
        ((2, 150, 640), torch.float16),  # many rows: several chunks a thread
        ((6, 2568), torch.bfloat16),  # several warps a row
        ((3, 5128), torch.float16),  # warps that are no power of two
        ((5, 15360), torch.float16),
        ((33, 24), torch.float32),
        ((7, 33), torch.float16),  # value by value
        ((8, 1100), torch.float16),
        ((6, 32768), torch.bfloat16),
    ],
    ids=str,
)
def test_per_token(dtype, smoothed, shape):
    assert_token_equal(rows(shape, dtype), vector(shape[-1]) if smoothed else None)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "activation"),
    [
        ((7, 40), torch.float16, "gelu"),
        ((2, 150, 640), torch.float16, "geglu"),
        ((6, 2568), torch.bfloat16, "gelu_tanh"),
        ((6, 5128), torch.bfloat16, "geglu"),
        ((33, 24), torch.float32, "gelu"),
        ((7, 66), torch.float16, "geglu"),  # value by value
    ],
    ids=str,
)
def test_per_token_of_an_activation(dtype, smoothed, shape, activation):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1.5, shape[-2])[:, None]
    x.view(-1, shape[-1])[1] = 0
    k = activated_width(x, activation)
    smooth = vector(k) if smoothed else None
    x = x.to(dtype)
    codes, scale, low = _quantize_cuda.quantize_per_token(x, smooth, None, activation)
    assert low.shape == (*shape[:-1], 0)
    bound.assert_activated_near(codes, scale, x, smooth, activation)
    assert (codes.view(-1, k)[1] == 0).all()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((7, 40), torch.float16), ((2, 150, 640), torch.float16), ((6, 2568), torch.bfloat16), ((9, 24), torch.float32)],
    ids=str,
)
def test_layer_norm(dtype, affine, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, shape[-2])[:, None]
    rows = x.view(-1, shape[-1])
    rows[1], rows[2] = 3, rows[2] + 300  # a constant, and a mean far from zero
    x, k = x.to(dtype), shape[-1]
    weight, bias, smooth = (vector(k).to(dtype), -vector(k).to(dtype), vector(k)) if affine else (None, None, None)
    codes, scale = _quantize_cuda.quantize_layer_norm(x, weight, bias, 1e-5, smooth)
    bound.assert_normalized_near(codes, scale, x, weight, bias, 1e-5, smooth)


def test_a_multiprocessor_has_two_long_rows():
    for k in (12288, 13824, 15360, 16384, 18432):
        (_, _), (_, lanes), (_, vectors), (_, threads), *_ = _quantize_cuda._token_plan(1, 4096, k, True, 132).defines
        assert threads == lanes < k // 8 <= lanes * vectors
        assert 2 * threads * (32 + 8 * vectors) <= 65536


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 1e-20, 3e38])
def test_per_token_of_extreme_magnitudes(magnitude):
    assert_token_equal(torch.tensor([magnitude, -magnitude, 0.0, magnitude / 3]).repeat(2, 8), None)


def test_per_token_keeps_what_is_not_finite_visible():
    x = torch.ones(4, 64)
    x[0, 5], x[1, 6], x[3, 7] = float("nan"), float("inf"), float("-inf")
    for values, down in ((x[:, :24], None), (x.half(), torch.ones(32, 64))):
        _, scale, _ = _quantize_cuda.quantize_per_token(values, None, down)
        assert torch.isnan(scale).tolist() == [True, False, False, False]
        assert torch.isinf(scale).tolist() == [False, True, False, True]


def test_per_token_of_strides_and_addresses_that_vectors_do_not_fit():
    x = rows((6, 4, 64), torch.float16)
    assert_token_equal(x.transpose(0, 1), None)
    assert_token_equal(torch.cat([x.flatten()[:3], x.flatten()])[3:].view(6, 4, 64), vector(64))
    assert_token_equal(x[0, 0], vector(65)[1:])


def assert_branch_equal(x, smooth, rank):
    dtype = x.dtype
    down = torch.randn(rank, x.shape[-1], generator=torch.Generator().manual_seed(1))
    codes, scale, low = _quantize_cuda.quantize_per_token(x, smooth, down)
    expected = quantize_per_token(x, smooth, down)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])
    assert low.dtype == dtype
    # Two orders of summation differ by 2^-20 of the sum of magnitudes; rounding to the dtype may then go either way.
    v = (x if smooth is None else (x * smooth).to(dtype)).double()
    exact, magnitudes = v @ down.to(dtype).double().T, v.abs() @ down.to(dtype).double().abs().T
    slack = magnitudes * 2**-20 + exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    finite = exact.abs() < torch.finfo(dtype).max
    assert torch.equal(finite, torch.isfinite(low))
    assert ((low.double() - exact).abs() <= slack)[finite].all()


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "rank"),
    [
        ((2, 24, 64), torch.float16, 32),  # a block with two tiles of rows, and one with the third
        ((17, 1280), torch.bfloat16, 13),  # clusters of two blocks
        ((3, 1024), torch.float16, 32),
        ((70, 416), torch.float16, 40),  # a last block with fewer tiles, and a last warp with no slices
        ((5, 96), torch.float16, 128),
        ((3, 40), torch.float16, 4),  # K that takes two launches
        ((3, 24), torch.float32, 8),
    ],
    ids=str,
)
def test_per_token_with_a_low_rank_branch(dtype, smoothed, shape, rank):
    assert_branch_equal(rows(shape, dtype), vector(shape[-1]) if smoothed else None, rank)


@pytest.mark.parametrize("k", [96, 256])  # of a cluster of four blocks: one of them with no slices; eight
@pytest.mark.parametrize("count", [125, 41])  # of rows: four tiles each, the last one ragged; and two, and one
def test_per_token_with_a_low_rank_branch_of_several_tiles_a_cluster(monkeypatch, k, count):
    monkeypatch.setattr(_cupy, "multiprocessors", lambda device: 128)
    assert_branch_equal(rows((count, k), torch.float16), vector(k), 24)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=["no clusters", "large", "small"])
def test_per_token_with_a_low_rank_branch_of_long_rows(monkeypatch, capability):
    """Shared memory holds `down`, or a part of it at a time."""
    monkeypatch.setattr(_cupy, "capability", lambda device: capability)
    x, smooth = rows((34, 6176), torch.float16), vector(6176)
    down = torch.randn(16, 6176, generator=torch.Generator().manual_seed(1)) / 80
    codes, scale, low = _quantize_cuda.quantize_per_token(x, smooth, down)
    expected = quantize_per_token(x, smooth, down)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])
    torch.testing.assert_close(low, expected[2], rtol=2e-3, atol=1e-3, equal_nan=True)


def assert_sample_equal(x, scale, smooth, segments, channel_dim):
    codes = _quantize_cuda.quantize_per_sample(x, scale, smooth, segments, channel_dim)
    expected = quantize_per_sample(x, scale, smooth, segments, channel_dim)
    assert torch.equal(codes, expected)
    assert codes.stride() == expected.stride()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("shape", "dtype", "segments", "scale_rows"),
    [
        ((4, 64, 8, 8), torch.float16, (64,), 1),
        ((2, 112, 16, 9), torch.float32, (48, 64), 2),
        ((2, 320, 5, 5), torch.float16, (320,), 1),
        ((2, 33, 7, 3), torch.float16, (12, 21), 2),
        ((2, 48, 4, 8), torch.float16, (20, 28), 1),  # chunks that a segment cuts
        ((2, 2560, 2, 4), torch.float16, (1280, 1280), 2),
        ((2, 4, 1, 1), torch.float16, (4,), 2),
        ((3, 1, 5, 6), torch.float16, (1,), 1),
        ((1, 10, 4, 4), torch.float16, (1,) * 10, 1),
        ((1, 12, 4, 4), torch.float16, (1,) * 9 + (3,), 1),
    ],
    ids=str,
)
def test_per_sample_of_images(dtype, order, shape, segments, scale_rows):
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype).contiguous(memory_format=order)
    scale = torch.rand(scale_rows, len(segments), generator=torch.Generator().manual_seed(1)) / 50
    scale[0, 0] = 0
    for smooth in (None, vector(shape[1])):
        assert_sample_equal(x, scale, smooth, segments, 1)


@pytest.mark.parametrize(
    ("shape", "dtype", "channel_dim", "scale_rows"),
    [
        ((6, 77, 64), torch.bfloat16, -1, 2),
        ((4, 33), torch.float16, 1, 4),
        ((2, 3, 5, 40), torch.bfloat16, 3, 1),
        ((300, 128), torch.float16, -1, 1),
        ((2, 16, 6), torch.float16, 1, 2),
        ((0, 8), torch.float16, 1, 0),
    ],
    ids=str,
)
def test_per_sample_of_other_tensors(dtype, shape, channel_dim, scale_rows):
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    scale = torch.rand(scale_rows, 1, generator=torch.Generator().manual_seed(1)) / 50 + 1e-3
    assert_sample_equal(x, scale, vector(shape[channel_dim]), (shape[channel_dim],), channel_dim)


def test_per_sample_saturates_and_takes_any_strides():
    x = rows((6, 16, 8, 8), torch.float16)
    assert_sample_equal(x.permute(0, 1, 3, 2), torch.full((1, 1), 1e-3), None, (16,), 1)
    assert_sample_equal(x[:, :, ::2], torch.full((1, 1), 1e-3), None, (16,), 1)
    assert_sample_equal(x[1:, 1:].contiguous()[:, :8], torch.full((5, 1), 1e-3), vector(8), (8,), 1)
    assert_sample_equal(x.flatten()[3:131].view(2, 64), torch.full((1, 1), 1e-3), None, (64,), 1)
    assert_sample_equal(x, torch.full((1, 1), 1e-3), vector(17)[1:], (16,), 1)
