from __future__ import annotations

import pytest
import torch

from qdiff.methods import resolve
from qdiff.methods.quantize import prepare
from qdiff.methods.smoothquant import SmoothQuant
from qdiff.recipe import MethodSpec


def state_of(bench, layer, outliers=30.0, **changes):
    statistics = bench.statistics(layer, bench.inputs(layer, outliers=outliers)).layers["layer"]
    return prepare(bench.plan(layer, **changes), layer, statistics)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, "search"])
def test_output_before_rounding_is_unchanged(bench, layer, alpha):
    state = state_of(bench, layer)
    expected = state.inputs() @ state.weight.T
    SmoothQuant(alpha).apply(state)
    assert state.smooth is not None
    torch.testing.assert_close(state.inputs() @ state.weight.T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_is_the_papers_equation_channel_by_channel(bench, conv, alpha):
    state = state_of(bench, conv)
    SmoothQuant(alpha).apply(state)
    absmax, weight = state.statistics.channel_absmax.amax(0), conv.weight.detach()
    s = [float(absmax[j]) ** alpha / float(weight[:, j].abs().max()) ** (1 - alpha) for j in range(32)]
    mean = torch.tensor(s, dtype=torch.float64).log().mean().exp()
    torch.testing.assert_close(
        (1 / state.smooth).double(), torch.tensor(s, dtype=torch.float64) / mean, rtol=1e-4, atol=0
    )


def test_beats_no_smoothing_with_static_ranges(bench, linear):
    state = state_of(bench, linear, outliers=100.0, linear_range=MethodSpec.of("static"))
    without = state.output_error(state.rounding.round(state))
    SmoothQuant().apply(state)
    assert state.output_error(state.rounding.round(state)) < 0.6 * without


@pytest.mark.parametrize("outliers", [1.0, 10.0, 100.0])
def test_search_is_never_worse_than_none(bench, layer, outliers):
    state = state_of(bench, layer, outliers)
    without = state.output_error(state.rounding.round(state))
    SmoothQuant("search").apply(state)
    assert state.output_error(state.rounding.round(state)) <= without


def test_a_layer_that_never_ran_is_left_alone(bench, linear):
    state = prepare(bench.plan(linear, activation_bits=16), linear, None)
    SmoothQuant().apply(state)
    assert state.smooth is None


@pytest.mark.parametrize("alpha", [1.5, -0.1, "auto", True])
def test_options_are_checked(alpha):
    with pytest.raises(
        ValueError, match=rf"smoothquant\.alpha must be a number in \[0, 1\] or 'search': got {alpha!r}"
    ):
        resolve(MethodSpec.of("smoothquant", alpha=alpha))
