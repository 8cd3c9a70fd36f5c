from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdiff.calibration.timesteps import TimestepBins


def test_every_value_has_its_bin_while_there_is_room():
    bins = TimestepBins(capacity=4)
    keys = [bins.add(value)[0] for value in (999.0, 500.0, 999.0, 0.0)]
    assert len(set(keys)) == 3
    assert keys[0] == keys[2]
    assert [bins.value(key) for key in keys] == [999.0, 500.0, 999.0, 0.0]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=200))
def test_bins_are_bounded_and_each_stands_for_values_it_took(values):
    bins, took = TimestepBins(capacity=8), {}
    for value in values:
        key, moved = bins.add(float(value))
        if moved is not None:
            joined = {}
            for old, members in took.items():
                joined.setdefault(moved[old], []).extend(members)
            took = joined
        took.setdefault(key, []).append(value)
        assert len(took) <= 8
    for key, members in took.items():
        assert bins.value(key) == pytest.approx(sum(members) / len(members))


def test_joined_bins_hold_neighbours_only():
    bins = TimestepBins(capacity=8)
    took: dict[float, list[int]] = {}
    for value in range(1000, 0, -1):
        key, moved = bins.add(float(value))
        if moved is not None:
            joined: dict[float, list[int]] = {}
            for old, members in took.items():
                joined.setdefault(moved[old], []).extend(members)
            took = joined
        took.setdefault(key, []).append(value)
    ranges = sorted((min(members), max(members)) for members in took.values())
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(ranges))
    assert len(ranges) >= 4
