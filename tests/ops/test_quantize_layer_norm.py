from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qdiff.ops import quantize_layer_norm, quantize_per_token


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
def test_equals_the_norm_and_then_the_quantizer(dtype, affine):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 48, generator=generator).to(dtype)
    weight, bias = (torch.randn(2, 48, generator=generator).to(dtype)) if affine else (None, None)
    smooth = torch.rand(48, generator=generator) + 0.5 if affine else None
    codes, scale = quantize_layer_norm(x, weight, bias, 1e-5, smooth)
    expected = quantize_per_token(F.layer_norm(x, (48,), weight, bias, 1e-5), smooth, None)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


def test_fake_agrees_with_the_operator():
    x = torch.randn(2, 3, 16)
    torch.library.opcheck(torch.ops.qdiff.quantize_layer_norm.default, (x, torch.ones(16), None, 1e-5, torch.ones(16)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, r"x: got torch.int32 \(2, 8\), expected a float tensor"),
        ({"weight": torch.ones(7)}, r"weight: got .*\(7,\).*, expected .*\[8\]"),
        ({"bias": torch.ones(8).half()}, "bias: got torch.float16"),
        ({"smooth": torch.ones(8).half()}, "smooth: got torch.float16"),
        ({"eps": -1.0}, "eps: got -1.0, expected a number that is not negative"),
        ({"eps": float("nan")}, "eps: got nan"),
    ],
    ids=str,
)
def test_bad_input(changed, message):
    given = {"x": torch.ones(2, 8), "weight": None, "bias": None, "eps": 1e-5, "smooth": None} | changed
    with pytest.raises(ValueError, match=message):
        quantize_layer_norm(*given.values())
