from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff.numerics.log2 import dequantize_log2, quantize_log2

bits_of = st.integers(2, 8)


@given(st.floats(2.0**-40, 1.0), bits_of)
def test_codes_are_those_of_the_equation(x, bits):
    x = torch.tensor(x, dtype=torch.float32)
    exact = -math.log2(x.item())
    code = int(quantize_log2(x, bits))
    assert 0 <= code < 2**bits
    if abs(exact % 1 - 0.5) > 1e-5:  # at a half, float32 may round either way
        assert code == min(round(exact), 2**bits - 1)


@given(st.floats(2.0**-14, 1.0))
def test_within_a_factor_of_the_root_of_two(x):
    ratio = float(dequantize_log2(quantize_log2(torch.tensor(x), 4))) / x
    assert 2**-0.5 * (1 - 1e-5) <= ratio <= 2**0.5 * (1 + 1e-5)


def test_powers_of_two_are_exact_and_order_is_kept():
    powers = 2.0 ** -torch.arange(16)
    assert torch.equal(dequantize_log2(quantize_log2(powers, 4)), powers)
    values = torch.linspace(0, 1, 4001)
    assert (dequantize_log2(quantize_log2(values, 4)).diff() >= 0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_takes_the_largest_code(bits):
    assert int(quantize_log2(torch.tensor(0.0), bits)) == 2**bits - 1
