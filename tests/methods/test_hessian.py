from __future__ import annotations

import dataclasses

import pytest
import torch

from qdiff.calibration import Moments
from qdiff.methods.quantize import prepare


def moments_of(samples):
    """Those of the samples themselves, each row as it is; K = (tap, channel)."""
    rows = samples.values.float().flatten(1)
    return Moments(rows.T @ rows / len(rows), rows.mean(0), torch.ones(()), len(rows))


@pytest.mark.parametrize("pipeline", ["plain", "smooth", "shift", "index", "rotation", "all"])
@pytest.mark.parametrize("segments", [(32,), (16, 16)], ids=["one", "two"])
def test_is_the_second_moment_after_the_input_pipeline(bench, layer, pipeline, segments):
    if layer.weight.shape[1] == 64:
        segments = tuple(2 * channels for channels in segments)
    if len(segments) == 2 and pipeline in ("index", "all"):
        pytest.skip("split layers have one segment")
    statistics = bench.statistics(layer, [x + 0.5 for x in bench.inputs(layer, outliers=5.0)]).layers["layer"]
    statistics = dataclasses.replace(statistics, moments=moments_of(statistics.samples))
    state = prepare(bench.plan(layer, segments), layer, statistics)
    generator = torch.Generator().manual_seed(0)
    channels = sum(segments)
    if pipeline in ("index", "all"):
        state.index = torch.cat([torch.arange(channels), torch.arange(16)])
    if pipeline in ("shift", "all"):
        state.shift = torch.randn(channels, generator=generator)
    if pipeline in ("smooth", "all"):
        state.smooth = 0.5 + torch.rand(sum(state.segments), generator=generator)
    if pipeline in ("rotation", "all"):
        state.rotation = torch.randint(0, 2, (16,), generator=generator, dtype=torch.int8) * 2 - 1
    rows = state.inputs().double()
    torch.testing.assert_close(state.hessian().double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-3)


def test_without_moments_there_is_none(bench, linear):
    state = prepare(bench.plan(linear), linear, bench.statistics(linear, bench.inputs(linear)).layers["layer"])
    assert state.hessian() is None


def test_carried_inputs_pass_the_pipeline(bench, conv):
    statistics = bench.statistics(conv, bench.inputs(conv)).layers["layer"]
    state = prepare(bench.plan(conv, (16, 16)), conv, statistics)
    assert state.carried_inputs() is None
    state.statistics = dataclasses.replace(statistics, carried=statistics.samples)
    state.smooth = torch.rand(32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(state.carried_inputs(), state.inputs())
    assert torch.equal(state.on_input_grid(state.carried_inputs()), state.quantized_inputs())
