from __future__ import annotations

import pytest
import torch

from qdiff.methods.clipping import SHARES, Clipping
from qdiff.methods.quantize import prepare
from qdiff.recipe import MethodSpec, WeightSpec

MINMAX = MethodSpec.of("nearest", search=False)


def correlated(bench, layer):
    """Inputs with a common part: what errors of neighbouring weights add up on."""
    inputs = bench.inputs(layer)
    return [x + 2 * x.mean(-1 if layer.weight.ndim == 2 else 1, keepdim=True) for x in inputs]


def state_of(bench, layer, **changes):
    torch.manual_seed(0)
    layer.weight.data = torch.distributions.Laplace(0.0, 0.1).sample(layer.weight.shape)
    statistics = bench.statistics(layer, correlated(bench, layer)).layers["layer"]
    return prepare(bench.plan(layer, **changes), layer, statistics)


@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_lessens_the_error_of_min_max_ranges(bench, layer, granularity):
    state = state_of(bench, layer, weight=WeightSpec(4, 32, granularity), rounding=MINMAX)
    target = state.inputs() @ state.weight.T * state.balance()

    def error():
        product = state.quantized_inputs() @ state.rounding.round(state).dequantize().T * state.balance()
        return float((product - target).square().sum())

    without = error()
    Clipping().apply(state)
    assert error() < {"channel": 0.85, "tensor": 0.6, "group": 0.97}[granularity] * without


def test_bounds_are_the_best_of_the_grid_by_brute_force(bench, linear):
    """Every group of every row on its own, in float64, on the samples rather than on their Gram matrix."""
    state = state_of(bench, linear, rounding=MINMAX, activation_bits=16)
    x, w = (state.inputs() * state.balance()).double(), state.weight.double()
    bounds = Clipping()._bounds(state)
    for row, group in ((0, 0), (3, 1), (47, 3)):
        part = slice(16 * group, 16 * group + 16)
        values = w[row, part]

        def error(share, values=values, part=part):
            step = values.abs().max() * share / 7
            rounded = (values / step).round().clamp(-7, 7) * step
            return float((x[:, part] @ (rounded - values)).square().sum())

        got = float(bounds[row, part.start] / values.abs().max())
        assert error(got) <= min(map(error, SHARES)) * (1 + 1e-3)


@pytest.mark.parametrize("rounding", ["min-max", "search"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_is_never_worse_than_none(bench, layer, rounding, bits):
    weight = WeightSpec(bits, 16) if bits <= 4 else WeightSpec(bits, -1, "channel")
    spec = MINMAX if rounding == "min-max" else MethodSpec.of("nearest")
    whole = state_of(bench, layer, weight=weight, rounding=spec)
    clipped = whole.with_weight(whole.weight)
    Clipping().apply(clipped)
    errors = [whole.output_error(state.rounding.round(state)) for state in (whole, clipped)]
    assert errors[1] <= errors[0]


def test_only_large_weights_are_cut(bench, linear):
    state = state_of(bench, linear, weight=WeightSpec(4, 16, "channel"), rounding=MINMAX)
    before = state.weight.clone()
    Clipping().apply(state)
    moved = state.weight != before
    assert 0 < moved.float().mean() < 0.1
    assert (state.weight[moved].abs() < before[moved].abs()).all()
    assert torch.equal(state.weight.sign(), before.sign())


def test_works_without_samples(bench, linear):
    state = prepare(bench.plan(linear, activation_bits=16, rounding=MINMAX), linear, None)
    Clipping().apply(state)
    assert torch.isfinite(state.weight).all()
