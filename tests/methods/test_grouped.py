from __future__ import annotations

import itertools

import pytest
import torch

from qdiff.methods.contract import RoundedWeight
from qdiff.methods.grouped import Grouped, partition
from qdiff.methods.quantize import prepare
from qdiff.methods.static import Static
from qdiff.methods.temporal import Temporal


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7])
def test_the_partition_is_the_best_of_all(groups):
    errors = torch.rand(7, 4, generator=torch.Generator().manual_seed(groups), dtype=torch.float64)

    def cost(cuts):
        ends = [0, *cuts, 7]
        return sum(float(errors[a:b].sum(0).min()) for a, b in itertools.pairwise(ends))

    best = min(cost(cuts) for cuts in itertools.combinations(range(1, 7), groups - 1))
    found = partition(errors, groups)
    assert len(found) == groups
    assert [first for first, _, _ in found] == [0, *(end for _, end, _ in found[:-1])]
    assert found[-1][1] == 7
    assert sum(float(errors[a:b, c].sum()) for a, b, c in found) == pytest.approx(best, rel=1e-12)


def state_of(bench, layer, range_, growth=4.0, bits=8):
    statistics = bench.statistics(layer, bench.inputs(layer, growth=growth)).layers["layer"]
    state = prepare(bench.plan(layer, activation_bits=bits), layer, statistics)
    state.range = range_
    return state


def error_of(state):
    return state.output_error(RoundedWeight(state.weight, None, torch.ones(len(state.weight))))


def test_two_groups_part_where_the_activations_jump(bench, conv):
    inputs = bench.inputs(conv)
    inputs[2] = inputs[2] * 20
    statistics = bench.statistics(conv, inputs).layers["layer"]
    table = Grouped(2).scales(prepare(bench.plan(conv, (16, 16)), conv, statistics))
    assert table.shape == (3, 2)
    assert torch.equal(table[0], table[1])
    assert (table[2] > 10 * table[1]).all()


def test_more_groups_err_less_from_static_to_temporal(bench, layer):
    errors = [error_of(state_of(bench, layer, Grouped(groups), bits=6)) for groups in (1, 2, 3)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    if layer.weight.ndim == 4:
        temporal, static = (error_of(state_of(bench, layer, range_, bits=6)) for range_ in (Temporal(), Static()))
        assert errors[2] == pytest.approx(temporal, rel=0.05)  # the same optimum on two grids of bounds
        assert errors[0] < static  # which counts absolute errors: the steps with small activations drown


def test_more_groups_than_timesteps_are_not_made(bench, conv):
    table = Grouped(50).scales(state_of(bench, conv, Grouped(50)))
    assert torch.equal(table, Grouped(3).scales(state_of(bench, conv, Grouped(3))))
    assert Grouped(50).least_timesteps == 50


def test_silent_timesteps_cost_nothing(bench, conv):
    inputs = bench.inputs(conv)
    silent = bench.statistics(conv, [0 * x for x in inputs]).layers["layer"]
    assert torch.equal(Grouped(2).scales(prepare(bench.plan(conv), conv, silent)), torch.ones(3, 1))
    inputs[0] = 0 * inputs[0]
    statistics = bench.statistics(conv, inputs).layers["layer"]
    table = Grouped(2).scales(prepare(bench.plan(conv), conv, statistics))
    assert (torch.isfinite(table) & (table > 0)).all()


@pytest.mark.parametrize("groups", [0, -1, 2.0, True, "8"])
def test_groups_must_be_a_count(groups):
    with pytest.raises(ValueError, match=r"grouped\.groups must be a positive whole number: got"):
        Grouped(groups)
