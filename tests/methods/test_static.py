from __future__ import annotations

import pytest
import torch

from qdiff.calibration.bounds import ESTIMATORS
from qdiff.methods.quantize import prepare
from qdiff.methods.static import Static


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_row_for_the_whole_trajectory(bench, conv, estimator):
    statistics = bench.statistics(conv, bench.inputs(conv, growth=3.0)).layers["layer"]
    scales = Static(estimator).scales(prepare(bench.plan(conv, (16, 16)), conv, statistics))
    absmax = max(float(x.abs().max()) for x in bench.inputs(conv, growth=3.0))
    assert scales.shape == (1, 2)
    assert (scales <= absmax / 127 * 1.0001).all()
    assert (scales > absmax / 127 / 3).all()


def test_a_lower_percentile_clips_more(bench, conv):
    statistics = bench.statistics(conv, bench.inputs(conv)).layers["layer"]
    state = prepare(bench.plan(conv), conv, statistics)
    scales = [Static("percentile", q).scales(state).item() for q in (0.9, 0.99, 0.999)]
    assert scales[0] < scales[1] < scales[2]


def test_no_statistics_is_an_error(bench, conv):
    state = prepare(bench.plan(conv, activation_bits=16), conv, None)
    with pytest.raises(ValueError, match="needs calibration statistics"):
        Static().scales(state)


def test_silence_has_a_usable_step(bench, conv):
    statistics = bench.statistics(conv, [0 * x for x in bench.inputs(conv)]).layers["layer"]
    for estimator in ESTIMATORS:
        assert torch.equal(Static(estimator).scales(prepare(bench.plan(conv), conv, statistics)), torch.ones(1, 1))
