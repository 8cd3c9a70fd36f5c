from __future__ import annotations

import pytest
import torch

from qdiff.methods import resolve
from qdiff.methods.hadamard import Hadamard
from qdiff.methods.quantize import prepare
from qdiff.methods.smoothing import Smoothing
from qdiff.recipe import MethodSpec, WeightSpec


def state_of(bench, layer, outliers=30.0, segments=None, **changes):
    statistics = bench.statistics(layer, bench.inputs(layer, outliers=outliers)).layers["layer"]
    return prepare(bench.plan(layer, segments, **changes), layer, statistics)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("segments", [None, (16, 16)])
def test_output_before_rounding_is_unchanged(bench, layer, smoothed, segments):
    if segments and layer.weight.ndim == 2:
        segments = None
    state = state_of(bench, layer, segments=segments)
    expected = state.raw_inputs() @ state.weight.T
    if smoothed:
        Smoothing(0.5).apply(state)
    Hadamard().apply(state)
    assert state.rotation is not None
    torch.testing.assert_close(state.inputs() @ state.weight.T, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.raw_weight() @ state.raw_inputs().T, expected.T, rtol=1e-4, atol=1e-4)


def test_is_the_product_with_the_written_out_matrix(bench, linear):
    state = state_of(bench, linear)
    x, w = state.raw_inputs().double(), state.weight.double()
    Hadamard(block=16).apply(state)
    h = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(16)], dtype=torch.float64) / 4
    q = torch.block_diag(*[torch.diag(state.rotation.double()) @ h] * 4)
    torch.testing.assert_close(state.inputs().double(), x @ q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.weight.double(), w @ q, rtol=1e-4, atol=1e-5)


def test_spreads_outliers_that_a_static_range_cannot_take(bench, linear):
    """QuaRot's case: 1 of 16 channels a hundred times as large, one step for all, weights a channel."""
    options = {"linear_range": MethodSpec.of("static"), "activation_bits": 4}
    state = state_of(bench, linear, outliers=100.0, **options)
    largest = state.inputs().abs().amax() / state.inputs().square().mean().sqrt()
    Hadamard().apply(state)
    assert state.inputs().abs().amax() / state.inputs().square().mean().sqrt() < 0.6 * largest


@pytest.mark.parametrize(("channels", "block"), [(64, 64), (48, 16), (32, 32), (33, None)])
def test_the_block_divides_every_segment(bench, channels, block):
    layer = torch.nn.Linear(channels, 8)
    state = state_of(bench, layer, weight=WeightSpec(8, -1, "channel"))
    Hadamard().apply(state)
    assert (None if state.rotation is None else len(state.rotation)) == block


def test_works_without_statistics_and_is_the_same_every_time(bench, linear):
    first, second = (prepare(bench.plan(linear, activation_bits=16), linear, None) for _ in range(2))
    for state in (first, second):
        Hadamard().apply(state)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.rotation, second.rotation)


@pytest.mark.parametrize("block", [0, 1, 24, 2048, True])
def test_options_are_checked(block):
    with pytest.raises(ValueError, match=r"hadamard\.block must be a power of two from 2 to 1024: got"):
        resolve(MethodSpec.of("hadamard", block=block))
