from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from qdiff.calibration import collect
from qdiff.methods import needs_of, resolve
from qdiff.methods.adaround import AdaRound
from qdiff.methods.nearest import Nearest
from qdiff.methods.quantize import prepare
from qdiff.methods.weight_grid import WeightGrid
from qdiff.recipe import MethodSpec, WeightSpec

TIMESTEPS = (100.0, 500.0, 900.0)


class OneLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, sample, timestep):
        return self.layer(sample)


def correlated_inputs(layer, seed=1):
    """One a timestep: a mixture of fewer sources than channels, smooth in space, and a little of its own a channel."""
    generator = torch.Generator().manual_seed(seed)
    conv = isinstance(layer, nn.Conv2d)
    channels = layer.weight.shape[1]
    mixture = torch.randn(channels, channels // 4, generator=torch.Generator().manual_seed(7))
    inputs = []
    for _ in TIMESTEPS:
        shape = (8, 12, 12) if conv else (2, 400)
        x = torch.randn(*shape, channels // 4, generator=generator) @ mixture.T
        x = x + 0.5 * torch.randn(x.shape, generator=generator)
        inputs.append(x.permute(0, 3, 1, 2) if conv else x)
    return inputs


def statistics_of(layer, inputs):
    denoiser = OneLayer(layer)

    def run():
        for timestep, x in zip(TIMESTEPS, inputs):
            denoiser(x, torch.tensor(timestep))

    with torch.no_grad():
        return collect(run, denoiser, {"layer": layer}, {"samples", "hessian", "histograms"}, progress=False)


def state_of(bench, layer, inputs=None, **plan):
    statistics = statistics_of(layer, correlated_inputs(layer) if inputs is None else inputs)
    plan = bench.plan(layer, rounding=MethodSpec.of("adaround"), **plan)
    return prepare(plan, layer, statistics.layers["layer"])


def squared_error(layer, weight, inputs):
    """Of the layer's output, relative."""
    x = (
        torch.cat([x.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 4, 5, 1).flatten(3) for x in inputs])
        if isinstance(layer, nn.Conv2d)
        else torch.cat(inputs)
    )
    matrix = layer.weight.permute(0, 2, 3, 1).flatten(1) if isinstance(layer, nn.Conv2d) else layer.weight
    return float((x @ (weight - matrix).T).square().sum() / (x @ matrix.T).square().sum())


@pytest.mark.parametrize("spec", [WeightSpec(4, 16), WeightSpec(4, -1, "channel"), WeightSpec(3, -1, "tensor")])
def test_a_third_less_output_error_than_nearest_on_other_inputs(bench, layer, spec):
    state = state_of(bench, layer, weight=spec)
    others = correlated_inputs(layer, seed=2)
    learned, nearest = (
        squared_error(layer, rounding.round(state).dequantize(), others) ** 0.5 for rounding in (AdaRound(), Nearest())
    )
    assert learned < 0.67 * nearest


def test_close_to_the_best_of_all_roundings(bench):
    """Of ten weights a row, all 2^10 ways to round them up or down."""
    torch.manual_seed(0)
    layer = nn.Linear(10, 6, bias=False)
    generator = torch.Generator().manual_seed(3)
    mixture = torch.randn(10, 10, generator=generator)
    inputs = [torch.randn(1, 300, 10, generator=generator) @ mixture.T for _ in TIMESTEPS]
    state = state_of(bench, layer, inputs, weight=WeightSpec(4, 2, "channel"), activation_bits=16)
    rounded = AdaRound(shrinkage=0.0, iterations=500).round(state)
    low, high = -8, 7
    hessian, w, step = state.hessian().double(), state.weight.double(), rounded.scale[:, None].double()
    ups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=10)), dtype=torch.float64)

    def loss(q):
        return torch.einsum("...i,ij,...j->...", w - q, hessian, w - q)

    every = torch.stack([loss(((w / step).floor() + up).clamp(low, high) * step) for up in ups])
    nearest = loss((w / step).round().clamp(low, high) * step)
    best, ours = every.amin(0), loss(rounded.dequantize().double())
    assert (ours >= best * (1 - 1e-6)).all()
    assert (ours <= nearest * (1 + 1e-6)).all()
    # What can be gained over nearest is, most of it.
    assert (nearest.sum() - ours.sum()) > 0.8 * (nearest.sum() - best.sum())


def test_codes_are_the_floor_or_the_one_above(bench, layer):
    state = state_of(bench, layer)
    rounded = AdaRound(iterations=30).round(state)
    # On the grid as it was fitted first; the scales follow the codes.
    floor = (
        state.weight / WeightGrid.fit(state.plan, state.weight, state.hessian().diagonal()).steps(state.weight.shape[1])
    ).floor()
    above = rounded.codes - floor
    inside = (floor >= -8) & (floor < 7)
    assert inside.float().mean() > 0.9
    assert ((above == 0) | (above == 1))[inside].all()
    assert rounded.codes.min() >= -8
    assert rounded.codes.max() <= 7


def test_every_row_is_at_least_as_good_as_nearest(bench, linear):
    """One step of Adam leaves some worse: the nearest codes are kept there."""
    state = state_of(bench, linear, activation_bits=16)
    hessian = state.hessian()
    rounded = AdaRound(iterations=1, shrinkage=0.0).round(state)
    grid = WeightGrid.fit(state.plan, state.weight, hessian.diagonal())
    nearest = grid.rounded(grid.nearest(state.weight))

    def losses(rounded):
        error = state.weight - rounded.dequantize()
        return ((error @ hessian) * error).sum(1)

    assert (losses(rounded) <= losses(nearest) * (1 + 1e-5)).all()
    assert not torch.equal(rounded.codes, nearest.codes)


def test_scales_are_the_best_for_the_codes(bench, linear):
    state = state_of(bench, linear, activation_bits=16)
    rounded, hessian = AdaRound(shrinkage=0.0).round(state), state.hessian()

    def loss(factor):
        error = state.weight - factor * rounded.dequantize()
        return ((error @ hessian) * error).sum(1)

    assert (loss(1.0) <= torch.minimum(loss(0.999), loss(1.001))).all()


def test_preview_and_a_layer_without_statistics_are_nearest(bench, linear):
    state = state_of(bench, linear)
    assert torch.equal(AdaRound().preview(state).codes, Nearest().preview(state).codes)
    state = prepare(bench.plan(linear, rounding=MethodSpec.of("adaround")), linear, None)
    assert torch.equal(AdaRound().round(state).codes, Nearest().round(state).codes)


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_scales_of_weights_and_inputs_change_nothing(bench, linear, scale):
    codes = AdaRound(iterations=50).round(state_of(bench, linear)).codes
    inputs = [x * 2.0**-6 for x in correlated_inputs(linear)]
    linear.weight.data *= scale
    same = AdaRound(iterations=50).round(state_of(bench, linear, inputs)).codes == codes
    assert same.float().mean() > 0.99


def test_rows_and_inputs_of_zeros(bench, linear):
    linear.weight.data[3] = 0
    inputs = [x * (torch.arange(x.shape[-1]) != 5) for x in correlated_inputs(linear)]
    rounded = AdaRound(iterations=20).round(state_of(bench, linear, inputs))
    assert torch.isfinite(rounded.dequantize()).all()
    assert not rounded.dequantize()[3].any()


def test_same_codes_every_time(bench, linear):
    first, second = (AdaRound(iterations=20).round(state_of(bench, linear)) for _ in range(2))
    assert all(torch.equal(getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(first)[:3])


def test_asks_for_the_second_moment_and_for_order_where_there_are_blocks(bench, linear):
    needs = needs_of(bench.plan(linear, rounding=MethodSpec.of("adaround")))
    assert needs >= {"hessian", "samples"}
    blocks = MethodSpec.of("adaround", block_iterations=1)
    assert needs_of(bench.plan(linear, rounding=blocks)) == needs | {"carried"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, r"adaround.iterations must be a whole number of at least 1: got 0"),
        ({"iterations": 1.5}, r"adaround.iterations must be a whole number"),
        ({"regularization": 0.0}, r"adaround.regularization must be a positive number: got 0.0"),
        ({"regularization": float("nan")}, r"adaround.regularization must be a positive number"),
        ({"warm_start": 1.0}, r"adaround.warm_start must be in \[0, 1\): got 1.0"),
        ({"shrinkage": -0.1}, r"adaround.shrinkage must be in \[0, 1\): got -0.1"),
        ({"shrinkage": True}, r"adaround.shrinkage must be in"),
        ({"block_iterations": -1}, r"adaround.block_iterations must be a whole number, 0 or more: got -1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        resolve(MethodSpec.of("adaround", **options))
