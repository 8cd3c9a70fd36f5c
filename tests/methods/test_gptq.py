from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from qdiff.calibration import LayerStatistics, Moments
from qdiff.methods.gptq import Gptq, descended_codes, feedback_codes, scale_ratios, with_activation_error
from qdiff.methods.nearest import Nearest
from qdiff.methods.quantize import prepare
from qdiff.methods.sufficiency import shortages
from qdiff.methods.weight_grid import WeightGrid
from qdiff.ops import use_backend
from qdiff.recipe import WeightSpec

N, K = 12, 40


def correlated_hessian(width=K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    return mixing @ mixing.T + 1e-3 * torch.eye(width)


def state_of(bench, layer, hessian=None, **changes):
    """A layer of which calibration knows its Hessian (of one segment) and nothing else."""
    taps = layer.weight[0, 0].numel()
    width = layer.weight.shape[1] * taps
    hessian = correlated_hessian(width) if hessian is None else hessian
    moments = Moments(hessian, torch.zeros(width), torch.ones(()), 10 * width)
    absmax = torch.ones(1, layer.weight.shape[1])
    statistics = LayerStatistics(torch.tensor([1.0]), absmax, moments=moments)
    return prepare(bench.plan(layer, activation_bits=16, **changes), layer, statistics)


def loss(weight, rounded, hessian):
    error = (weight - rounded).double()
    return float(((error @ hessian.double()) * error).sum())


def papers_codes(weight, step, hessian, low, high):
    """Equations 2 and 3 of the paper, one column after the other, with the inverse of what remains; float64."""
    weight, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian.double()[j:, j:])
        codes[:, j] = (weight[:, j] / step[:, j]).round().clamp(low, high)
        error = (weight[:, j] - step[:, j] * codes[:, j]) / inverse[0, 0]
        weight[:, j:] -= error[:, None] * inverse[0]
    return codes


def test_feedback_is_the_papers_update():
    generator = torch.Generator().manual_seed(1)
    for width in (K, 300):  # of one block, and of three
        weight = torch.randn(N, width, generator=generator)
        step = 0.3 + torch.rand(N, width, generator=generator)
        hessian = correlated_hessian(width)
        factor = torch.linalg.cholesky(hessian.double().flip(0, 1)).flip(0, 1)
        grid = WeightGrid(step[:, 0], None, -8, 7)
        codes = feedback_codes(weight.double().T.contiguous(), step.double().T.contiguous(), factor, grid).T
        assert torch.equal(codes, papers_codes(weight, step.double(), hessian, -8, 7))


def test_descent_ends_where_no_single_code_is_better():
    generator = torch.Generator().manual_seed(1)
    weight, hessian = torch.randn(K, N, generator=generator), correlated_hessian()
    steps = torch.full_like(weight, 0.4)
    grid = WeightGrid(steps[0], None, -8, 7)
    codes = (weight / steps).round().clamp(-8, 7)
    losses = [loss(weight.T, (steps * codes).T, hessian)]
    for _ in range(30):
        codes = descended_codes(weight, steps, codes, hessian, grid)
        losses.append(loss(weight.T, (steps * codes).T, hessian))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    for k in range(K):
        for change in (-1, 1):
            other = codes.clone()
            other[k] += change
            error, best = weight - steps * other, weight - steps * codes
            of_row, at_best = ((hessian @ part * part).sum(0) for part in (error, best))
            inside = (other[k] >= -8) & (other[k] <= 7)
            assert (of_row >= at_best - 1e-4)[inside].all()


def test_scale_is_the_least_squares_one():
    generator = torch.Generator().manual_seed(2)
    weight, rounded = torch.randn(2, K, 3, generator=generator)
    hessian = correlated_hessian()
    root = torch.linalg.cholesky(hessian.double())
    ratio = scale_ratios(weight, weight + 0.1 * rounded, hessian)
    for row in range(3):
        left = root.T @ (weight + 0.1 * rounded)[:, row : row + 1].double()
        expected = torch.linalg.lstsq(left, root.T @ weight[:, row : row + 1].double()).solution
        assert ratio[row].item() == pytest.approx(expected.item(), rel=1e-4)


GRIDS = {
    "group": WeightSpec(4, 16),
    "two bits": WeightSpec(2, 16),
    "channel": WeightSpec(4, -1, "channel"),
    "tensor": WeightSpec(4, -1, "tensor"),
    "six bits": WeightSpec(6, -1, "channel"),
    "eight bits": WeightSpec(8, -1, "channel"),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_beats_nearest_on_every_grid(bench, layer, grid):
    state = state_of(bench, layer, weight=GRIDS[grid])
    hessian = state.hessian()
    nearest = loss(state.weight, Nearest().round(state).dequantize(), hessian)
    papers = loss(state.weight, Gptq(sweeps=0, damping=0.01).round(state).dequantize(), hessian)
    improved = loss(state.weight, Gptq(damping=0.01).round(state).dequantize(), hessian)
    assert papers < 0.5 * nearest
    assert improved < papers


@pytest.mark.parametrize("grid", ["channel", "tensor"])
def test_keeps_to_the_grid_of_the_plan(bench, linear, grid):
    rounded = Gptq().round(state_of(bench, linear, weight=GRIDS[grid]))
    assert rounded.codes.dtype == torch.int8
    assert rounded.codes.min() >= -8
    assert rounded.codes.max() <= 7
    assert (rounded.multipliers == 1).all()
    assert (len(rounded.scale.unique()) == 1) == (grid == "tensor")


def test_diagonal_hessian_gives_the_nearest_codes(bench, linear):
    state = state_of(bench, linear, hessian=torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(0))))
    rounded = Gptq(sweeps=0).round(state)
    grid = WeightGrid.fit(state.plan, state.weight, state.hessian().diagonal())
    assert torch.equal(rounded.codes, grid.nearest(state.weight))


def test_without_statistics_or_inputs_the_codes_are_the_nearest(bench, linear):
    embedding = nn.Embedding(20, 64)
    for module in (linear, embedding):
        state = prepare(bench.plan(module, activation_bits=16), module, None)
        assert torch.equal(Gptq().round(state).codes, Nearest().round(state).codes)


def test_generalizes_to_rows_it_was_not_fitted_on(bench, layer):
    """Inputs whose channels are correlated, as those of networks are."""
    mixing = torch.randn(layer.weight.shape[1], 6, generator=torch.Generator().manual_seed(5))

    def mixed(x):
        return x + torch.einsum("ck,bkhw->bchw", mixing, x[:, :6]) if x.ndim == 4 else x + x[..., :6] @ mixing.T

    inputs = [mixed(x) for x in bench.inputs(layer)]
    fitted = bench.statistics(layer, [x[:2] for x in inputs], {"hessian", "samples"}).layers["layer"]
    fresh = bench.statistics(layer, [x[2:] for x in inputs], {"samples"}).layers["layer"]
    state = prepare(bench.plan(layer, activation_bits=16), layer, fitted)
    held_out = dataclasses.replace(state, statistics=fresh)
    gptq, nearest = (held_out.output_error(method.round(state)) for method in (Gptq(), Nearest()))
    assert gptq**0.5 < 0.7 * nearest**0.5


def test_dead_inputs_and_a_layer_that_saw_only_zeros(bench, linear):
    dead = correlated_hessian(64)
    dead[5], dead[:, 5] = 0, 0
    for hessian in (dead, torch.zeros(64, 64)):
        rounded = Gptq().round(state_of(bench, linear, hessian=hessian))
        assert torch.isfinite(rounded.dequantize()).all()


def test_hessian_that_damping_does_not_mend_is_reported(bench, linear):
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 1.2
    with pytest.warns(UserWarning, match="Hessian of layer 'layer' is singular; damped by 1 of"):
        rounded = Gptq(damping=0.1).round(state_of(bench, linear, hessian=indefinite))
    assert torch.isfinite(rounded.dequantize()).all()


def test_too_few_rows_are_reported(bench, linear):
    plan = bench.plan(linear)
    for rows, said in ((4, 1), (64, 0)):
        inputs = [x[:1, :rows] for x in bench.inputs(linear)]
        statistics = bench.statistics(linear, inputs, {"hessian", "samples"})
        singular = [text for text in shortages({"layer": plan}, statistics) if "Hessian" in text]
        assert len(singular) == said
        rounded = Gptq().round(prepare(plan, linear, statistics.layers["layer"]))
        assert torch.isfinite(rounded.dequantize()).all()


def test_error_of_quantized_inputs_is_on_the_diagonal(bench, linear):
    """With inputs at 4 bits, the true second moment of what is multiplied is nearer with it than without."""
    statistics = bench.statistics(linear, bench.inputs(linear, outliers=5.0), {"hessian", "samples"}).layers["layer"]
    state = prepare(bench.plan(linear, activation_bits=4), linear, statistics)
    rows = state.quantized_inputs() * state.balance()
    plain = state.inputs() * state.balance()
    expected = (rows.T @ rows - plain.T @ plain).diagonal() / len(rows)
    added = (with_activation_error(state.hessian(), state) - state.hessian()).diagonal()
    quiet = torch.arange(64) % 16 != 0
    torch.testing.assert_close(added[quiet].mean(), expected[quiet].mean(), rtol=0.2, atol=0)


@pytest.mark.parametrize("damping", [0, -0.1, 1.5, True])
def test_damping_is_a_fraction(damping):
    with pytest.raises(ValueError, match=r"gptq\.damping must be in \(0, 1\]"):
        Gptq(damping=damping)


@pytest.mark.parametrize("sweeps", [-1, 1.5, True])
def test_sweeps_are_counted(sweeps):
    with pytest.raises(ValueError, match=r"gptq\.sweeps must be a whole number"):
        Gptq(sweeps=sweeps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `pytest -m gpu` on one")
@pytest.mark.parametrize("grid", GRIDS)
def test_a_gpu_rounds_as_well_as_the_cpu(bench, layer, grid):
    """Sums in another order move a few codes, each to one that is as good."""
    state = state_of(bench, layer, weight=GRIDS[grid])
    with use_backend("cuda"):
        moved = state_of(bench, copy.deepcopy(layer).cuda(), state.hessian().cuda(), weight=GRIDS[grid])
        on_gpu = Gptq().round(moved)
    on_cpu = Gptq().round(state)
    losses = [loss(state.weight, rounded.dequantize().cpu(), state.hessian()) for rounded in (on_gpu, on_cpu)]
    assert losses[0] < 1.05 * losses[1]
    assert (on_gpu.codes.cpu() == on_cpu.codes).float().mean() > 0.9
