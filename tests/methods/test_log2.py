from __future__ import annotations

import pytest
import torch

from qdiff.methods.log2 import Log2


def test_better_than_a_uniform_grid_of_as_many_bits():
    """Of attention over 256 keys: the paper's reason. Output error of P V, against float64."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, 64, 256, generator=generator) * 1.5
    value = torch.randn(8, 256, 32, generator=generator).double() + 0.5
    p = scores.softmax(-1)
    exact = p.double() @ value

    def error(rounded):
        return float((rounded.double() @ value - exact).norm() / exact.norm())

    uniform = (p * 15).round() / 15
    assert error(Log2(4).quantize(p)) < error(uniform) / 4


def test_masked_keys_stay_masked_and_the_dtype_stays():
    p = torch.tensor([[0.0, 0.75, 0.25, 1e-9]], dtype=torch.float16)
    assert Log2(4).quantize(p).tolist() == [[0.0, 1.0, 0.25, 0.0]]  # 1e-9 is zero in float16
    assert Log2(4).quantize(p.float()).dtype == torch.float32
    assert Log2(4).quantize(torch.tensor([1e-9])).item() == 2.0**-15


@pytest.mark.parametrize("bits", [1, 9, 4.0, True])
def test_bits_are_checked(bits):
    with pytest.raises(ValueError, match=r"log2\.bits must be a whole number in 2 to 8: got"):
        Log2(bits)
