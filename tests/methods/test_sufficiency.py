from __future__ import annotations

import dataclasses

from qdiff.calibration import Statistics
from qdiff.methods.sufficiency import shortages
from qdiff.recipe import MethodSpec


def plans_and_statistics(bench, conv, groups, rows):
    statistics = bench.statistics(conv, bench.inputs(conv))
    samples = statistics.layers["layer"].samples
    samples = dataclasses.replace(samples, values=samples.values[:rows], timesteps=samples.timesteps[:rows])
    layer = dataclasses.replace(statistics.layers["layer"], samples=samples)
    plan = dataclasses.replace(bench.plan(conv), range=MethodSpec.of("grouped", groups=groups))
    names = [f"layer {number}" for number in range(5)]
    return dict.fromkeys(names, plan), Statistics(statistics.timesteps, dict.fromkeys(names, layer))


def test_enough_is_not_worth_a_word(bench, conv):
    assert shortages(*plans_and_statistics(bench, conv, 3, 16)) == []


def test_numbers_and_layers_are_named(bench, conv):
    rows, timesteps = shortages(*plans_and_statistics(bench, conv, 4, 15))
    assert "layer 0, layer 1, layer 2 and 2 more layers saw as few as 15 rows of input, at least 16" in rows
    assert "layer 0, layer 1, layer 2 and 2 more layers asks for 4, 3 were seen; calibrate with more steps" in timesteps


def test_layers_without_samples_need_none(bench, conv):
    plans, statistics = plans_and_statistics(bench, conv, 2, 15)
    bare = {name: dataclasses.replace(layer, samples=None) for name, layer in statistics.layers.items()}
    assert shortages(plans, dataclasses.replace(statistics, layers=bare)) == []
