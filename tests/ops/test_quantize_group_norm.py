import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdiff.ops import quantize_group_norm, quantize_per_sample


def image(shape=(2, 24, 5, 3), dtype=torch.float32, order=torch.contiguous_format, seed=0):
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1
    return x.to(dtype).contiguous(memory_format=order)


def vectors(channels, dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(channels, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("segments", "rows"), [((24,), 2), ((10, 14), 1)], ids=str)
def test_codes_are_those_of_the_three_modules(order, dtype, silu, segments, rows):
    x, scale, smooth = (
        image(dtype=dtype, order=order),
        torch.rand(rows, len(segments)) / 40 + 0.01,
        torch.rand(24) + 0.5,
    )
    norm = nn.GroupNorm(4, 24, eps=1e-3).to(dtype).requires_grad_(False)
    norm.weight[:], norm.bias[:] = vectors(24, dtype)
    y = norm(x)
    expected = quantize_per_sample(nn.SiLU()(y) if silu else y, scale, smooth, segments, 1)
    codes = quantize_group_norm(x, 4, norm.weight, norm.bias, norm.eps, silu, scale, smooth, segments)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(codes, expected)
    assert len(codes.unique()) > 60
    plain = quantize_group_norm(x, 4, None, None, norm.eps, silu, scale, None, segments)
    y = F.group_norm(x, 4, eps=norm.eps)
    assert torch.equal(plain, quantize_per_sample(F.silu(y) if silu else y, scale, None, segments, 1))


def test_no_samples():
    codes = quantize_group_norm(torch.zeros(0, 8, 2, 2), 2, None, None, 1e-5, True, torch.ones(1, 1), None, [8])
    assert codes.shape == (0, 8, 2, 2)


def test_a_trainable_norm_gives_constants():
    weight, bias = (vector.requires_grad_() for vector in vectors(24, torch.float32))
    codes = quantize_group_norm(image(), 4, weight, bias, 1e-5, True, torch.full((1, 1), 0.02), None, [24])
    assert not codes.requires_grad


@pytest.mark.parametrize("affine", [False, True])
def test_opcheck(affine):
    weight, bias = vectors(8, torch.float32) if affine else (None, None)
    arguments = (image((2, 8, 4, 4)), 2, weight, bias, 1e-5, affine, torch.rand(2, 2) + 0.1, weight, [3, 5])
    torch.library.opcheck(torch.ops.qdiff.quantize_group_norm.default, arguments)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 8, 4)}, "x"),
        ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.double)}, "x"),
        ({"groups": 3}, "groups"),
        ({"groups": 0}, "groups"),
        ({"weight": torch.ones(7)}, "weight"),
        ({"bias": torch.ones(8, dtype=torch.half)}, "bias"),
        ({"eps": -1.0}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"scale": torch.ones(3, 1)}, "scale"),
        ({"smooth": torch.ones(3)}, "smooth"),
        ({"segments": [4, 5]}, "segments"),
    ],
    ids=str,
)
def test_wrong_arguments(change, named):
    good = {"x": torch.zeros(2, 8, 4, 4), "groups": 2, "weight": torch.ones(8), "bias": None, "eps": 1e-5}
    good |= {"silu": True, "scale": torch.ones(2, 1), "smooth": None, "segments": [8]}
    quantize_group_norm(**good)
    with pytest.raises(ValueError, match=f"^{named}: got"):
        quantize_group_norm(**good | change)
