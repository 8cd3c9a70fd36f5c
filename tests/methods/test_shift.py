from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff.layers import QuantLinear
from qdiff.methods import quantize_layer, resolve
from qdiff.methods.quantize import prepare
from qdiff.methods.shift import Shift
from qdiff.methods.smoothing import Smoothing
from qdiff.recipe import MethodSpec, WeightSpec

STATIC = {"linear_range": MethodSpec.of("static"), "conv_range": MethodSpec.of("static")}
EIGHT = WeightSpec(8, -1, "channel")


def inputs_of(bench, layer, offset):
    """Channels that are centred `offset` times a random number away from zero."""
    place = torch.randn(layer.weight.shape[1], generator=torch.Generator().manual_seed(5)) * offset
    place = place[:, None, None] if layer.weight.ndim == 4 else place
    return [x + place for x in bench.inputs(layer)]


def state_of(bench, layer, offset=5.0, segments=None, **changes):
    statistics = bench.statistics(layer, inputs_of(bench, layer, offset)).layers["layer"]
    return prepare(bench.plan(layer, segments, **(STATIC | changes)), layer, statistics)


@pytest.fixture(params=["linear", "conv2d", "conv2d of two segments"])
def unpadded(request):
    torch.manual_seed(0)
    if request.param == "linear":
        return nn.Linear(64, 48), None
    return nn.Conv2d(32, 24, 3), ((16, 16) if "two" in request.param else None)


@pytest.mark.parametrize("centre", ["channel", "tensor"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_output_before_rounding_is_unchanged(bench, unpadded, centre, smoothed):
    layer, segments = unpadded
    state = state_of(bench, layer, segments=segments)
    expected = state.raw_inputs() @ state.weight.T
    Shift(centre).apply(state)
    if centre == "channel":
        assert state.shift is not None
    if smoothed:
        Smoothing(0.5).apply(state)
    bias = 0 if state.bias_change is None else state.bias_change
    torch.testing.assert_close(state.inputs() @ state.weight.T + bias, expected, rtol=1e-4, atol=1e-3)


def test_centres_are_the_middle_of_each_channels_range(bench, linear):
    state = state_of(bench, linear, offset=50.0)
    x = state.raw_inputs()
    Shift().apply(state)
    torch.testing.assert_close(state.shift, (x.amin(0) + x.amax(0)) / 2)
    torch.testing.assert_close(state.bias_change, linear.weight.detach() @ state.shift, rtol=1e-4, atol=1e-3)


def test_channels_off_centre_cost_nothing_more(bench, unpadded):
    layer, segments = unpadded
    state = state_of(bench, layer, segments=segments, weight=EIGHT, activation_bits=5)
    raw = state.raw_inputs() @ state.weight.T

    def error():
        product = state.quantized_inputs() @ state.weight.T
        return float((product + (0 if state.bias_change is None else state.bias_change) - raw).norm())

    without = error()
    Shift().apply(state)
    assert error() < 0.5 * without


@pytest.mark.parametrize("offset", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("centre", ["channel", "tensor"])
def test_is_never_worse_than_none(bench, linear, offset, centre):
    state = state_of(bench, linear, offset)
    without = state.output_error(state.rounding.preview(state))
    Shift(centre).apply(state)
    assert state.output_error(state.rounding.preview(state)) <= without * (1 + 1e-6)


def test_the_whole_layer_with_its_bias(bench):
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=False)
    inputs = inputs_of(bench, layer, 5.0)
    plan = bench.plan(layer, transforms=(MethodSpec.of("shift"),), weight=EIGHT, **STATIC)
    quantized = QuantLinear.from_float(
        layer, plan, quantize_layer(plan, layer, bench.statistics(layer, inputs).layers["layer"])
    )
    assert quantized.bias is not None
    with torch.no_grad():
        got, expected = quantized(inputs[0]), layer(inputs[0])
    assert float((got - expected).norm() / expected.norm()) < 0.01


def test_padded_convolutions_and_float_activations_are_left_alone(bench, conv, linear):
    padded = state_of(bench, conv)
    Shift().apply(padded)
    assert padded.shift is None
    state = state_of(bench, linear, activation_bits=16)
    Shift().apply(state)
    assert state.shift is None


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"shift\.centre must be one of channel, tensor: got 'row'"):
        resolve(MethodSpec.of("shift", centre="row"))
