from __future__ import annotations

import pytest
import torch

from qdiff.methods.nearest import Nearest
from qdiff.methods.quantize import prepare
from qdiff.recipe import WeightSpec


@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
@pytest.mark.parametrize("search", [True, False])
def test_every_code_is_the_nearest(bench, layer, granularity, search):
    statistics = bench.statistics(layer, bench.inputs(layer)).layers["layer"]
    state = prepare(bench.plan(layer, weight=WeightSpec(4, 16, granularity)), layer, statistics)
    rounded = Nearest(search).round(state)
    multipliers = rounded.multipliers.repeat_interleave(state.weight.shape[1] // rounded.multipliers.shape[1], 1)
    step = rounded.scale[:, None] * multipliers
    grid = step[..., None] * torch.arange(-8, 8)
    best = (grid - state.weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((rounded.dequantize() - state.weight).abs(), best, rtol=1e-5, atol=1e-6)


def test_search_beats_minmax_on_the_output(bench, layer):
    statistics = bench.statistics(layer, bench.inputs(layer, outliers=10.0)).layers["layer"]
    state = prepare(bench.plan(layer), layer, statistics)
    assert state.output_error(Nearest(True).round(state)) < 0.95 * state.output_error(Nearest(False).round(state))


def test_eight_bits_err_sixteen_times_less(bench, layer):
    def error(spec):
        state = prepare(bench.plan(layer, weight=spec, activation_bits=16), layer, None)
        return float((Nearest(False).round(state).dequantize() - state.weight).norm())

    ratio = error(WeightSpec(4, -1, "channel")) / error(WeightSpec(8, -1, "channel"))
    assert 12 < ratio < 24  # 127 / 7 = 18 steps for one
