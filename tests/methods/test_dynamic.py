from __future__ import annotations

import pytest
import torch

from qdiff.layers import QuantLinear
from qdiff.methods import needs_of, quantize_layer
from qdiff.methods.dynamic import Dynamic
from qdiff.methods.quantize import prepare
from qdiff.recipe import MethodSpec

DYNAMIC = MethodSpec.of("dynamic")


@pytest.mark.parametrize("bits", [4, 8])
def test_every_token_has_the_step_of_its_largest_input(bench, linear, bits):
    inputs = bench.inputs(linear, outliers=20.0, growth=5.0)
    inputs[0][0, 0] = 0  # a token of zeros
    plan = bench.plan(linear, linear_range=DYNAMIC, activation_bits=bits)
    state = prepare(plan, linear, bench.statistics(linear, inputs).layers["layer"])
    levels = 2 ** (bits - 1) - 1
    for row, quantized in zip(state.inputs().double(), state.quantized_inputs().double()):
        step = max(abs(float(value)) for value in row) / levels or 1.0
        expected = torch.tensor([round(float(value) / step) * step for value in row], dtype=torch.float64)
        # A value half way between two codes may go to either, in float32.
        assert ((quantized - expected).abs() <= 1.001 * step).all()
        assert ((quantized - expected).abs() > 1e-5 * step).sum() <= 1


def test_nothing_is_measured_or_stored(bench, linear):
    plan = bench.plan(linear, linear_range=DYNAMIC, rounding=MethodSpec.of("nearest", search=False))
    assert needs_of(plan) == frozenset()
    weights = quantize_layer(plan, linear)
    assert weights.act_scales is None
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    x[3] *= 1000  # its grid is its own
    with torch.no_grad():
        y = QuantLinear.from_float(linear, plan, weights)(x)
        alone = QuantLinear.from_float(linear, plan, weights)(x[[*range(3), *range(4, 20)]])
    assert torch.equal(y[[*range(3), *range(4, 20)]], alone)


def test_a_convolution_has_none(bench, conv):
    assert Dynamic.mode == "dynamic"
    with pytest.raises(ValueError, match="a convolution has no per-token range: use 'static' or 'temporal'"):
        bench.plan(conv, conv_range=DYNAMIC)
