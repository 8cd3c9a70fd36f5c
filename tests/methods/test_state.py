from __future__ import annotations

import dataclasses

import pytest
import torch

from qdiff.calibration.bounds import Estimator
from qdiff.methods.contract import RoundedWeight
from qdiff.methods.quantize import prepare
from qdiff.methods.state import LowRankBranch


def state_of(bench, layer, segments=None, **changes):
    statistics = bench.statistics(layer, bench.inputs(layer)).layers["layer"]
    return prepare(bench.plan(layer, segments, **changes), layer, statistics)


@pytest.mark.parametrize("segments", [(32,), (16, 16)])
def test_channel_and_input_axis_views_are_inverse(bench, conv, segments):
    state = state_of(bench, conv, segments)
    values = torch.arange(32.0)
    assert state.taps == 9
    assert torch.equal(state.per_channel(state.along_k(values)), values[:, None].expand(32, 9))


@pytest.mark.parametrize("segments", [(32,), (16, 16)])
def test_inputs_times_weight_is_the_convolution(bench, conv, segments):
    state = state_of(bench, conv, segments)
    windows = state.statistics.samples.values.float().transpose(1, 2).unflatten(2, (3, 3))  # [R, C, kh, kw]
    expected = torch.einsum("rchw,nchw->rn", windows, conv.weight.detach())
    torch.testing.assert_close(state.inputs() @ state.weight.T, expected, rtol=1e-4, atol=1e-4)


def test_sixteen_bit_activations_are_not_rounded(bench, layer):
    state = state_of(bench, layer, activation_bits=16)
    assert torch.equal(state.quantized_inputs(), state.inputs())


def test_eight_bit_activations_lie_on_a_grid_of_255_points(bench, layer):
    state = state_of(bench, layer)
    quantized = state.quantized_inputs()
    for row in quantized[:: len(quantized) // 8]:
        assert len(row.unique()) <= 255
    # A uniform grid up to at most 6 sigma: 6 / 127 / sqrt(12) = 1.4 %
    assert 0 < (quantized - state.inputs()).norm() / state.inputs().norm() < 0.015


def test_dynamic_steps_follow_each_row(bench, linear):
    state = state_of(bench, linear)
    inputs, quantized = state.inputs(), state.quantized_inputs()
    largest = inputs.abs().amax(1)
    torch.testing.assert_close(quantized.abs().amax(1), largest)
    assert ((inputs - quantized).abs().amax(1) <= largest / 127 / 2 * 1.001).all()


def test_exact_weights_and_activations_err_nothing(bench, layer):
    state = state_of(bench, layer, activation_bits=16)
    exact = RoundedWeight(state.weight, None, torch.ones(len(state.weight)))
    assert state.output_error(exact) == 0


def test_output_error_is_the_layers_own(bench, linear):
    state = state_of(bench, linear, activation_bits=16)
    rounded = state.rounding.round(state)
    x = torch.cat([x.flatten(0, 1) for x in bench.inputs(linear)])
    whole = x @ linear.weight.detach().T
    error = (x @ rounded.dequantize().T - whole).square().sum() / whole.square().sum()
    assert state.output_error(rounded) == pytest.approx(error.item(), rel=0.15)  # 258 of 768 rows are sampled


def test_some_rows_is_the_same_layer_with_fewer_outputs(bench, linear):
    state = state_of(bench, linear)
    state.low_rank = LowRankBranch(torch.randn(2, 64), torch.randn(48, 2))
    few = state.some_rows(12)
    assert torch.equal(few.weight, state.weight[::4])
    assert torch.equal(few.whole_weight(), state.whole_weight()[::4])
    assert torch.equal(state.some_rows(100).weight, state.weight)


def test_rounded_weight_by_group():
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.int8)
    rounded = RoundedWeight(codes, torch.tensor([[2, 10]], dtype=torch.uint8), torch.tensor([0.5]))
    assert rounded.dequantize().tolist() == [[1.0, 2.0, 15.0, 20.0]]
    assert RoundedWeight(codes, None, torch.tensor([2.0])).dequantize().tolist() == [[2.0, 4.0, 6.0, 8.0]]


@pytest.mark.parametrize("estimator", ["minmax", "mse", "percentile", "ksigma"])
def test_ranges_of_a_remade_input_are_measured_on_its_rows(bench, layer, estimator):
    """A shift of zero changes nothing but the way the range is found: from samples and not from channels."""
    statistics = bench.statistics(layer, bench.inputs(layer, growth=3.0)).layers["layer"]
    state = prepare(bench.plan(layer, activation_bits=6), layer, statistics)
    for per_timestep in (True, False):
        expected = state.measured_steps(Estimator(estimator), per_timestep)
        shifted = dataclasses.replace(state, shift=torch.zeros(state.channels))
        found = shifted.measured_steps(Estimator(estimator), per_timestep)
        # 85 rows a timestep, which do not reach the largest value of 256 or more.
        torch.testing.assert_close(found, expected, rtol=0.25 if estimator == "minmax" else 0.12, atol=0)
    moved = dataclasses.replace(state, shift=torch.full((state.channels,), 1000.0))
    assert (moved.measured_steps(Estimator(estimator), True) * 31 > 900).all()


def test_a_remade_input_without_samples_is_an_error(bench, linear):
    statistics = bench.statistics(linear, bench.inputs(linear)).layers["layer"]
    bare = dataclasses.replace(statistics, samples=None)
    state = prepare(bench.plan(linear), linear, bare)
    state.shift = torch.zeros(64)
    with pytest.raises(ValueError, match="is measured on samples, and calibration kept none"):
        state.measured_steps(Estimator("mse"), per_timestep=True)


def test_histograms_are_made_again_only_for_another_input_or_weight(bench, conv):
    state = state_of(bench, conv)
    first = state.input_histograms(per_timestep=True)
    assert state.input_histograms(per_timestep=True) is first
    assert len(state.input_histograms(per_timestep=False)[0].absmax) == 1
    smoothed = state.with_weight(state.weight, smooth=torch.full((32,), 2.0))
    torch.testing.assert_close(smoothed.input_histograms(per_timestep=True)[0].absmax, 2 * first[0].absmax)
    heavier = state.with_weight(2 * state.weight).input_histograms(per_timestep=True)
    torch.testing.assert_close(heavier[0].weights, 4 * first[0].weights)
