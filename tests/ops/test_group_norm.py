import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdiff.ops import group_norm


def image(shape=(2, 24, 5, 3), dtype=torch.float32, order=torch.channels_last):
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1
    return x.to(dtype).contiguous(memory_format=order)


def vectors(channels, dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(channels, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("silu", [False, True])
def test_values_are_those_of_the_modules(order, dtype, silu):
    x = image(dtype=dtype, order=order)
    norm = nn.GroupNorm(4, 24, eps=1e-3).to(dtype).requires_grad_(False)
    norm.weight[:], norm.bias[:] = vectors(24, dtype)
    expected = nn.SiLU()(norm(x)) if silu else norm(x)
    y = group_norm(x, 4, norm.weight, norm.bias, norm.eps, silu)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, expected)
    expected = F.group_norm(x, 4, eps=norm.eps)
    assert torch.equal(group_norm(x, 4, None, None, norm.eps, silu), F.silu(expected) if silu else expected)


def test_no_samples():
    assert group_norm(torch.zeros(0, 8, 2, 2), 2, None, None, 1e-5, True).shape == (0, 8, 2, 2)


def test_a_trainable_norm_gives_constants():
    weight, bias = (vector.requires_grad_() for vector in vectors(24, torch.float32))
    y = group_norm(image(), 4, weight, bias, 1e-5, True)
    with pytest.raises(RuntimeError, match="has no gradient"):
        y.sum().backward()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (2, 8, 1, 1)], ids=str)
def test_opcheck(shape, affine):
    weight, bias = vectors(8, torch.float32) if affine else (None, None)
    for order in (torch.contiguous_format, torch.channels_last):
        arguments = (image(shape, order=order), 2, weight, bias, 1e-5, affine)
        torch.library.opcheck(torch.ops.qdiff.group_norm.default, arguments)


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
    ],
    ids=str,
)
def test_wrong_arguments(change, named):
    good = {"x": torch.zeros(2, 8, 4, 4), "groups": 2, "weight": torch.ones(8), "bias": None, "eps": 1e-5, "silu": True}
    group_norm(**good)
    with pytest.raises(ValueError, match=f"^{named}: got"):
        group_norm(**good | change)
