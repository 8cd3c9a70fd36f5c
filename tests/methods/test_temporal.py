from __future__ import annotations

import pytest
import torch

from qdiff.calibration.bounds import ESTIMATORS
from qdiff.methods.contract import RoundedWeight
from qdiff.methods.quantize import prepare
from qdiff.methods.smoothing import Smoothing
from qdiff.methods.static import Static
from qdiff.methods.temporal import Temporal


def state_of(bench, layer, growth=4.0):
    statistics = bench.statistics(layer, bench.inputs(layer, growth=growth)).layers["layer"]
    return prepare(bench.plan(layer), layer, statistics)


def test_minmax_is_absmax_over_127(bench, layer):
    state = state_of(bench, layer)
    absmax = torch.stack([x.abs().max() for x in bench.inputs(layer, growth=4.0)])[:, None]
    torch.testing.assert_close(Temporal("minmax").scales(state), absmax / 127)
    torch.testing.assert_close(Static("minmax").scales(state), absmax.amax(0, keepdim=True) / 127)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_table_follows_the_activations(bench, layer, estimator):
    table = Temporal(estimator).scales(state_of(bench, layer))[:, 0]
    ratios = table[1:] / table[:-1]
    assert ((ratios > 3.3) & (ratios < 4.8)).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_smoothing_is_in_the_table(bench, layer, estimator):
    state = state_of(bench, layer)
    before = Temporal(estimator).scales(state)
    state.smooth, state.weight = torch.full((state.channels,), 0.25), state.weight * 4
    torch.testing.assert_close(Temporal(estimator).scales(state), before / 4, rtol=1e-4, atol=0)


def test_temporal_errs_less_than_static_where_the_range_moves(bench, conv):
    errors = {}
    for range_ in (Temporal(), Static()):
        state = state_of(bench, conv)
        state.range = range_
        exact = RoundedWeight(state.weight, None, torch.ones(len(state.weight)))
        errors[range_.mode] = state.output_error(exact)
    assert errors["temporal"] < 1e-3
    # Steps sized for activations 16, 4 and 1 times as large as those of the three timesteps: (256 + 16 + 1) / 3 = 91.
    assert errors["temporal"] < errors["static"] / 50


def test_searched_smoothing_and_range_work_together(bench, conv):
    statistics = bench.statistics(conv, bench.inputs(conv, outliers=100.0)).layers["layer"]
    state = prepare(bench.plan(conv), conv, statistics)
    exact = lambda: RoundedWeight(state.weight, None, torch.ones(len(state.weight)))  # noqa: E731
    before = state.output_error(exact())
    Smoothing(0.5).apply(state)
    assert state.output_error(exact()) < before / 4
