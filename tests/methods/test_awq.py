from __future__ import annotations

import pytest
import torch

from qdiff.methods import resolve
from qdiff.methods.awq import AWQ
from qdiff.methods.quantize import prepare
from qdiff.recipe import MethodSpec


def state_of(bench, layer, outliers=10.0, **changes):
    statistics = bench.statistics(layer, bench.inputs(layer, outliers=outliers)).layers["layer"]
    return prepare(bench.plan(layer, **changes), layer, statistics)


def test_output_before_rounding_is_unchanged(bench, layer):
    state = state_of(bench, layer)
    expected = state.inputs() @ state.weight.T
    AWQ().apply(state)
    assert state.smooth is not None
    torch.testing.assert_close(state.inputs() @ state.weight.T, expected, rtol=1e-4, atol=1e-4)


def test_is_the_best_point_of_the_papers_grid(bench, linear):
    """Equation 5 by hand: every power of mean |X|, rounded, on the output; activations float, as in the paper."""
    state = state_of(bench, linear, outliers=20.0, activation_bits=16)
    x, w = state.inputs(), state.weight.clone()
    balance = state.balance()
    found = []
    for point in range(20):
        s = x.abs().mean(0) ** (point / 20)
        s = s / s.log().mean().exp()
        rounded = state.rounding.round(state.with_weight(w * s, smooth=1 / s)).dequantize()
        found.append((float(((x / s) @ rounded.T - x @ w.T).mul(balance).square().sum()), s))
    AWQ().apply(state)
    chosen = [torch.allclose(1 / state.smooth, s, rtol=1e-4) for _, s in found]
    assert sum(chosen) == 1
    # The search compares by the rounding's preview: what it takes may be next to the best.
    assert found[chosen.index(True)][0] < 1.02 * min(found, key=lambda item: item[0])[0]
    assert found[chosen.index(True)][0] < 0.8 * found[0][0]


@pytest.mark.parametrize("outliers", [1.0, 10.0, 100.0])
def test_is_never_worse_than_none(bench, layer, outliers):
    state = state_of(bench, layer, outliers)
    without = state.output_error(state.rounding.round(state))
    AWQ().apply(state)
    assert state.output_error(state.rounding.round(state)) <= without


def test_a_layer_that_never_ran_is_left_alone(bench, linear):
    state = prepare(bench.plan(linear, activation_bits=16), linear, None)
    AWQ().apply(state)
    assert state.smooth is None


@pytest.mark.parametrize("grid", [1, 0, True, 2.5])
def test_options_are_checked(grid):
    with pytest.raises(ValueError, match=r"awq\.grid must be an integer of at least 2: got"):
        resolve(MethodSpec.of("awq", grid=grid))
