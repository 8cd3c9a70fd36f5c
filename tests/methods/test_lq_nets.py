from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff.methods.lq_nets import LQNets, signs
from qdiff.methods.nearest import Nearest
from qdiff.methods.quantize import prepare
from qdiff.recipe import MethodSpec, WeightSpec


def state_of(bench, weight, bits=4):
    layer = nn.Linear(weight.shape[1], len(weight), bias=False)
    layer.weight.data = weight
    statistics = bench.statistics(layer, bench.inputs(layer, outliers=3.0)).layers["layer"]
    plan = bench.plan(layer, weight=WeightSpec(bits, -1, "channel"), rounding=MethodSpec.of("lq_nets"))
    return prepare(plan, layer, statistics)


def rows(kind="gauss", n=4, k=256):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=generator)
    return w if kind == "gauss" else w.sign() * torch.empty(n, k).exponential_(generator=generator)


def weighted_error(state, rounded):
    return float(((state.weight - rounded.dequantize()).square() * state.importance()).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_sums_and_differences_of_a_basis(bench, bits):
    levels = LQNets().round(state_of(bench, rows(), bits)).codebook[:, : 2**bits].double()
    assert torch.equal(levels, -levels.flip(1))  # v^T b and v^T (-b)
    if bits == 3:  # v = (a, b, c), a the largest: a + b + c, a + b - c, a - b + c, and |a - b - c|
        fourth, third, second, first = levels[:, 4:].T
        ends = (first - (second + third - fourth)).abs(), (first - (second + third + fourth)).abs()
        assert (torch.minimum(*ends) <= 2).all()  # four roundings to int8, of half each


@pytest.mark.parametrize("basis", [(1.0, 2.0), (0.3, 1.0), (0.9, 1.1), (1.0, 2.0, 4.0), (0.5, 0.9, 1.5)])
def test_finds_the_basis_that_made_the_weights(bench, basis):
    levels = signs(len(basis), torch.device("cpu")) @ torch.tensor(basis, dtype=torch.float64)
    chosen = torch.randint(0, len(levels), (3, 400), generator=torch.Generator().manual_seed(0))
    state = state_of(bench, levels.float()[chosen], len(basis))
    error = (LQNets().round(state).dequantize() - state.weight).norm() / state.weight.norm()
    assert error < 0.006  # what int8 leaves of the levels


@pytest.mark.parametrize("kind", ["gauss", "laplace"])
def test_as_good_as_an_alternation_written_out(bench, kind):
    """The paper's two steps with dense matrices in float64, from 30 random bases; the best of them."""
    state = state_of(bench, rows(kind, n=2))
    generator = torch.Generator().manual_seed(1)
    b = signs(4, torch.device("cpu"))
    h = state.importance().double()
    best = 0.0
    for w in state.weight.double():
        least = torch.inf
        for _ in range(30):
            v = torch.rand(4, generator=generator, dtype=torch.float64) * w.abs().max() / 2
            for _ in range(40):
                code = b[(w[:, None] - b @ v).abs().argmin(1)]
                v = torch.linalg.lstsq(code * h.sqrt()[:, None], w * h.sqrt(), driver="gelsd").solution
            least = min(least, float((h * (w[:, None] - b @ v).square().amin(1)).sum()))
        best += least
    assert weighted_error(state, LQNets().round(state)) < 1.1 * best


@pytest.mark.parametrize("kind", ["gauss", "laplace"])
def test_beats_nearest_with_one_scale_a_row(bench, kind):
    state = state_of(bench, rows(kind, n=8, k=512))
    assert weighted_error(state, LQNets().round(state)) < 0.95 * weighted_error(state, Nearest().round(state))


def test_rows_of_zeros(bench):
    state = state_of(bench, torch.zeros(2, 64))
    assert torch.equal(LQNets().round(state).dequantize(), state.weight)
