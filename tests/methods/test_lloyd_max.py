from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from qdiff.calibration import collect
from qdiff.methods import needs_of, quantize_layer, resolve
from qdiff.methods.lloyd_max import LloydMax
from qdiff.methods.lq_nets import LQNets
from qdiff.methods.nearest import Nearest
from qdiff.methods.quantize import prepare
from qdiff.recipe import MethodSpec, WeightSpec

LEARNED = MethodSpec.of("lloyd_max")


class OneLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, sample, timestep):
        return self.layer(sample)


def state_of(bench, bits=4, kind="gauss", rounding=LEARNED, n=8, k=512):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(k, n, bias=False)
    layer.weight.data = torch.randn(n, k, generator=generator)
    if kind == "laplace":
        layer.weight.data = layer.weight.sign() * torch.empty(n, k).exponential_(generator=generator)
    statistics = bench.statistics(layer, bench.inputs(layer, outliers=3.0)).layers["layer"]
    return prepare(bench.plan(layer, weight=WeightSpec(bits, -1, "channel"), rounding=rounding), layer, statistics)


def weighted_error(state, rounded):
    return float(((state.weight - rounded.dequantize()).square() * state.importance()).sum())


def k_means(values, weights, count, restarts=40):
    """Lloyd's algorithm in float64 from random starts, with a dense distance matrix: the least error found."""
    generator = torch.Generator().manual_seed(1)
    least = torch.inf
    for _ in range(restarts):
        levels = values[torch.multinomial(weights, count, generator=generator)]
        for _ in range(60):
            member = torch.nn.functional.one_hot((values[:, None] - levels).abs().argmin(1), count) * weights[:, None]
            mass = member.sum(0)
            levels = torch.where(mass > 0, (member * values[:, None]).sum(0) / mass.clamp_min(1e-300), levels)
        least = min(least, float((weights * (values[:, None] - levels).square().amin(1)).sum()))
    return least


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["gauss", "laplace"])
def test_as_good_as_the_best_of_many_k_means(bench, bits, kind):
    state = state_of(bench, bits, kind, n=3, k=256)
    weights = state.importance().double()
    best = sum(k_means(row, weights, 2**bits) for row in state.weight.double())
    # 5 %: int8 levels cost a little, and so does a start that is not random.
    assert weighted_error(state, LloydMax().round(state)) < 1.05 * best


@pytest.mark.parametrize("kind", ["gauss", "laplace"])
def test_beats_nearest_with_one_scale_a_row(bench, kind):
    state = state_of(bench, kind=kind)
    assert weighted_error(state, LloydMax().round(state)) < 0.8 * weighted_error(state, Nearest().round(state))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_as_many_as_the_bits_name(bench, bits):
    rounded = LloydMax().round(state_of(bench, bits))
    assert rounded.multipliers is None
    assert (int(rounded.codes.min()), int(rounded.codes.max())) == (0, 2**bits - 1)
    assert all(len(row.unique()) <= 2**bits for row in rounded.dequantize())


def test_handed_to_the_layer(bench, layer):
    statistics = bench.statistics(layer, bench.inputs(layer))
    weights = quantize_layer(bench.plan(layer, rounding=LEARNED), layer, statistics)
    assert weights.codebook.shape == (len(layer.weight), 16)
    assert weights.multipliers is None


def test_without_statistics_every_input_counts_alike(bench, linear):
    state = prepare(bench.plan(linear, rounding=LEARNED), linear, None)
    error = (LloydMax().round(state).dequantize() - state.weight).square().mean()
    assert error < 0.015 * state.weight.square().mean()


@pytest.mark.parametrize("name", ["lloyd_max", "lq_nets"])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (WeightSpec(8, -1, "channel"), "at most 16 levels, of 4 bits: got weight_bits=8"),
        (WeightSpec(4, 16, "tensor"), "learns levels for every row: got granularity='tensor'"),
    ],
)
def test_plans_without_levels_of_their_own_are_refused(bench, linear, name, weight, message):
    plan = bench.plan(linear, weight=weight, rounding=MethodSpec.of(name))
    with pytest.raises(ValueError, match=f"layer: {name} .*{message}"):
        needs_of(plan)  # asked before calibration


@pytest.mark.parametrize("name", ["lloyd_max", "lq_nets"])
def test_options_are_checked(bench, linear, name):
    with pytest.raises(ValueError, match=f"unknown option 'levels' of method '{name}'"):
        resolve(MethodSpec.of(name, levels=16))
    with pytest.raises(ValueError, match=f"{name}.feedback must be true or false: got 1"):
        resolve(MethodSpec.of(name, feedback=1))
    for feedback in (False, True):
        plan = bench.plan(linear, rounding=MethodSpec.of(name, feedback=feedback))
        assert ("hessian" in needs_of(plan)) == feedback


@pytest.mark.parametrize("method", [LloydMax, LQNets])
def test_feedback_takes_errors_off_the_output(bench, linear, method):
    """Of inputs that are mixtures: the same levels, other codes."""
    generator = torch.Generator().manual_seed(3)
    mixture = torch.randn(64, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    x = torch.randn(1, 900, 64, generator=generator) @ mixture
    denoiser = OneLayer(linear)
    with torch.no_grad():
        needs = {"samples", "hessian"}
        statistics = collect(
            lambda: denoiser(x, torch.tensor(100.0)), denoiser, {"layer": linear}, needs, progress=False
        )
    state = prepare(bench.plan(linear, rounding=LEARNED), linear, statistics.layers["layer"])
    plain, compensated = method().round(state), method(feedback=True).round(state)
    assert torch.equal(plain.codebook, compensated.codebook)

    def error(rounded):
        return float((x @ (rounded.dequantize() - state.weight).T).square().sum())

    assert error(compensated) < 0.7 * error(plain)
    assert torch.equal(method(feedback=True).preview(state).codes, plain.codes)


def test_same_codes_every_time(bench):
    first, second = (LloydMax().round(state_of(bench)) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(dataclasses.astuple(first), dataclasses.astuple(second)) if a is not None
    )
