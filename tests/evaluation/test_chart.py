import itertools
import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdiff.evaluation.chart import line_chart, nice_ticks, step_ticks

SVG = "{http://www.w3.org/2000/svg}"


def chart(series):
    return ElementTree.fromstring(line_chart(series, title="Drift & more", x_label="step", y_label="error (%)"))


def points(line):
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


@given(st.floats(1e-6, 1e6))
def test_ticks_reach_the_highest_value_in_a_few_round_steps(highest):
    ticks = nice_ticks(highest)
    assert ticks[0] == 0
    assert ticks[-1] >= highest * (1 - 1e-9)
    assert ticks[-2] < highest
    assert 3 <= len(ticks) <= 8
    leading = ticks[1] / 10 ** math.floor(math.log10(ticks[1]) + 1e-9)
    assert round(leading, 6) in (1, 2, 5)


@pytest.mark.parametrize(
    ("count", "ticks"),
    [(1, [1]), (4, [1, 2, 3, 4]), (20, [1, 5, 10, 15, 20]), (50, [1, 10, 20, 30, 40, 50]), (22, [1, 5, 10, 15, 22])],
)
def test_steps_are_labelled_at_round_numbers_and_both_ends(count, ticks):
    assert step_ticks(count) == ticks


def test_each_series_is_a_line_with_a_point_a_step_and_its_name():
    svg = chart({"naive": [0.0, 1.0, 4.0], "w4a8": [0.0, 0.5, 1.0]})
    lines = list(svg.iter(f"{SVG}polyline"))
    assert [len(points(line)) for line in lines] == [3, 3]
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"naive", "w4a8", "step", "error (%)", "Drift & more", "1", "2", "3"} <= set(texts)


def test_a_larger_value_is_drawn_higher_and_in_proportion():
    (line,) = chart({"a": [0.0, 1.0, 2.0]}).iter(f"{SVG}polyline")
    heights = [y for _, y in points(line)]
    assert heights[0] > heights[1] > heights[2]
    # Coordinates are written with one decimal.
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_labels_of_lines_that_end_together_do_not_overlap():
    svg = chart({"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.01]})
    heights = sorted(float(text.get("y")) for text in svg.iter(f"{SVG}text") if text.text in "abc")
    assert all(later - earlier >= 17 for earlier, later in itertools.pairwise(heights))


def test_a_series_has_the_same_colour_in_every_chart_of_a_page():
    def colours(series):
        text = line_chart(series, title="", x_label="", y_label="", names=["naive", "w4a8"])
        groups = list(ElementTree.fromstring(text).iter(f"{SVG}g"))
        return {group.find(f".//{SVG}title").text.split(",")[0]: group.get("class") for group in groups}

    both = colours({"naive": [1.0], "w4a8": [1.0]})
    assert both["naive"] != both["w4a8"]
    assert colours({"w4a8": [1.0]}) == {"w4a8": both["w4a8"]}


def test_constant_zero_is_a_chart_too():
    assert list(chart({"a": [0.0]}).iter(f"{SVG}polyline"))


@pytest.mark.parametrize(
    "series",
    [{}, {"a": []}, {"a": [1.0], "b": [1.0, 2.0]}, {"a": [math.nan]}, {"a": [-1.0]}],
    ids=["none", "empty", "unequal", "nan", "negative"],
)
def test_what_cannot_be_drawn_is_refused(series):
    with pytest.raises(ValueError, match="series"):
        chart(series)
