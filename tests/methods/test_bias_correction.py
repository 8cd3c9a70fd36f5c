from __future__ import annotations

import dataclasses

import pytest
import torch

from qdiff.methods import RoundedWeight, quantize_layer
from qdiff.methods.bias_correction import BiasCorrection
from qdiff.methods.quantize import prepare
from qdiff.recipe import MethodSpec, WeightSpec


def state_of(bench, layer, mean=1.0, **changes):
    inputs = [x + mean for x in bench.inputs(layer, growth=2.0)]
    return prepare(bench.plan(layer, **changes), layer, bench.statistics(layer, inputs).layers["layer"])


def test_is_the_rounding_error_times_the_mean_input(bench, linear):
    """DFQ's correction in float64, with activations that are not quantized and nothing to shrink."""
    state = state_of(bench, linear, activation_bits=16)
    wrong = state.weight + 1.0  # every weight off by one: an error without scatter to speak of
    BiasCorrection().finish(
        state, RoundedWeight(torch.zeros_like(wrong, dtype=torch.int8), None, torch.ones(len(wrong)))
    )
    share = state.balance().double().square()
    expected = state.weight.double() @ ((share * state.inputs()).sum(0) / share.sum())
    # Only outputs with a large mean keep nearly all of it.
    large = expected.abs() > 0.5 * expected.abs().amax()
    torch.testing.assert_close(state.bias_change[large].double(), expected[large], rtol=0.1, atol=0)
    assert (state.bias_change.abs() <= expected.abs() * (1 + 1e-4)).all()


def test_lessens_the_error_and_leaves_the_codes_alone(bench, layer):
    plan = bench.plan(layer, weight=WeightSpec(4, 16, "tensor"))
    inputs = [x + 1 for x in bench.inputs(layer)]
    statistics = bench.statistics(layer, inputs).layers["layer"]
    without = quantize_layer(plan, layer, statistics)
    corrected = quantize_layer(
        dataclasses.replace(plan, transforms=(MethodSpec.of("bias_correction"),)), layer, statistics
    )
    assert torch.equal(without.codes_q, corrected.codes_q)
    assert without.bias_change is None
    state = prepare(plan, layer, statistics)
    rounded = state.rounding.round(state)
    error = (state.inputs() @ state.weight.T - state.quantized_inputs() @ rounded.dequantize().T) * state.balance()
    after = error - corrected.bias_change * state.balance()
    assert after.square().sum() < 0.8 * error.square().sum()


def test_corrects_for_the_steps_that_the_rounding_fitted(bench, linear):
    """A grid so fine that it clips most inputs: what is lost has a mean, which the range's own steps do not lose."""
    state = state_of(bench, linear, linear_range=MethodSpec.of("static"))
    rounded = dataclasses.replace(state.rounding.round(state), step_ratio=torch.tensor([0.1]))
    steps = 0.1 * state.range.scales(state)
    arriving = (state.inputs() / steps).round().clamp(-127, 127) * steps
    error = state.inputs() @ state.weight.T - arriving @ rounded.dequantize().T
    share = state.balance().square()
    BiasCorrection().finish(state, rounded)
    mean = (share * error).sum(0) / share.sum()
    assert (state.bias_change - mean).norm() < 0.1 * mean.norm()


def test_an_error_without_a_mean_is_left_alone(bench, linear):
    """Of zero-mean inputs the correction is noise: it has to be near nothing."""
    state = state_of(bench, linear, mean=0.0)
    rounded = state.rounding.round(state)
    error = state.inputs() @ state.weight.T - state.quantized_inputs() @ rounded.dequantize().T
    share = state.balance().square()
    BiasCorrection().finish(state, rounded)
    assert state.bias_change.norm() < 0.7 * ((share * error).sum(0) / share.sum()).norm()


def test_adds_to_what_is_there(bench, linear):
    first, second = state_of(bench, linear), state_of(bench, linear)
    second.add_bias(torch.full((48,), 3.0))
    for state in (first, second):
        BiasCorrection().finish(state, state.rounding.round(state))
    torch.testing.assert_close(second.bias_change, first.bias_change + 3)


def test_a_layer_that_never_ran_is_left_alone(bench, linear):
    state = prepare(bench.plan(linear, activation_bits=16), linear, None)
    BiasCorrection().finish(state, state.rounding.round(state))
    assert state.bias_change is None


def test_is_asked_for_samples():
    assert BiasCorrection().needs == {"samples"}
    with pytest.raises(TypeError):
        BiasCorrection(strength=1)
