from __future__ import annotations

import pytest
import torch

from qdiff.methods.low_rank import LowRank, leading_part
from qdiff.methods.quantize import prepare


def outlier_weight(layer, rank=2, strength=8.0):
    generator = torch.Generator().manual_seed(3)
    n, k = layer.weight.shape
    layer.weight.data += (
        strength * torch.randn(n, rank, generator=generator) @ torch.randn(rank, k, generator=generator)
    )


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (5, 60), (64, 64)])
def test_leading_part_is_the_svds(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rank = 4
    down, up = leading_part(matrix, rank)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert down.shape == (rank, shape[1])
    assert up.shape == (shape[0], rank)
    # The residual is at most 1 % above the optimum for a flat (random) spectrum, the hardest there is.
    assert (matrix - up @ down).norm() < 1.01 * (matrix - best).norm()
    torch.testing.assert_close(down.norm(), up.norm(), rtol=1e-3, atol=0)


def test_output_before_rounding_is_unchanged(bench, linear):
    outlier_weight(linear)
    state = prepare(bench.plan(linear), linear, bench.statistics(linear, bench.inputs(linear)).layers["layer"])
    before = state.weight.clone()
    LowRank(rank=2).apply(state)
    assert state.low_rank is not None
    torch.testing.assert_close(state.whole_weight(), before, rtol=1e-5, atol=1e-4)


def test_branch_takes_outliers_that_four_bits_cannot(bench, linear):
    outlier_weight(linear)
    state = prepare(bench.plan(linear), linear, bench.statistics(linear, bench.inputs(linear)).layers["layer"])
    without = state.output_error(state.rounding.round(state))
    LowRank(rank=2).apply(state)
    assert state.output_error(state.rounding.round(state)) < 0.05 * without


def test_branch_is_dropped_where_it_does_not_help(bench, linear):
    state = prepare(bench.plan(linear), linear, bench.statistics(linear, bench.inputs(linear)).layers["layer"])
    before = state.weight.clone()
    LowRank(rank=1, min_gain=0.5).apply(state)
    assert state.low_rank is None
    assert torch.equal(state.weight, before)


def test_branch_is_exact_in_half_precision(bench, linear):
    outlier_weight(linear)
    state = prepare(bench.plan(linear), linear, bench.statistics(linear, bench.inputs(linear)).layers["layer"])
    LowRank(rank=2).apply(state)
    for part in state.low_rank:
        assert torch.equal(part.half().float(), part)


@pytest.mark.parametrize("budget", [0.05, 0.10, 0.15, 0.5])
def test_budget_bounds_the_bytes(bench, linear, budget):
    state = prepare(bench.plan(linear), linear, None)
    rank = LowRank(budget=budget).rank_of(state)
    layer_bytes = 48 * (64 / 2 + 2 + 4)  # codes, two multipliers' bytes, a scale
    assert rank * (48 + 64) * 2 <= budget * layer_bytes < (rank + 1) * (48 + 64) * 2


def test_rank_is_at_most_the_smaller_side(bench, linear):
    assert LowRank(rank=1000).rank_of(prepare(bench.plan(linear), linear, None)) == 48


def test_works_without_samples(bench, linear):
    outlier_weight(linear)
    state = prepare(bench.plan(linear, activation_bits=16), linear, None)
    LowRank(rank=2).apply(state)
    assert state.low_rank is not None


def test_convolutions_have_no_branch(bench, conv):
    state = prepare(bench.plan(conv), conv, bench.statistics(conv, bench.inputs(conv)).layers["layer"])
    LowRank(rank=4).apply(state)
    assert state.low_rank is None
