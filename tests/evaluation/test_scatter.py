import itertools
import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdiff.evaluation.scatter import pareto_front, scatter_chart
from qdiff.evaluation.svg import spread

SVG = "{http://www.w3.org/2000/svg}"
POINTS = {"ours": [("w4a8", 0.3, 27.0), ("naive & worse", 0.27, 19.0)], "peers": [("int4", 0.32, 23.0)]}


def chart(groups):
    return ElementTree.fromstring(scatter_chart(groups, title="Likeness", x_label="bytes", y_label="dB"))


def position(mark):
    if mark.get("cx"):
        return float(mark.get("cx")), float(mark.get("cy"))
    x, y = mark.get("transform").removeprefix("translate(").removesuffix(")").split()
    return float(x), float(y)


def dots(svg):
    marks = [mark for mark in svg.iter() if mark.find(f"{SVG}title") is not None]
    return {mark.find(f"{SVG}title").text.split(":")[0]: position(mark) for mark in marks}


def test_every_point_is_drawn_and_named_with_its_group_in_the_legend():
    svg = chart(POINTS)
    texts = {text.text for text in svg.iter(f"{SVG}text")}
    assert {"w4a8", "naive & worse", "int4", "ours", "peers", "Likeness", "bytes", "dB"} <= texts
    assert set(dots(svg)) == {"w4a8", "naive & worse", "int4"}


def test_positions_are_in_proportion_and_up_is_more():
    found = dots(chart(POINTS))
    (x0, y0), (x1, y1), (x2, y2) = found["naive & worse"], found["w4a8"], found["int4"]
    assert x0 < x1 < x2
    assert y1 < y2 < y0
    assert (x1 - x0) / (x2 - x0) == pytest.approx((0.3 - 0.27) / (0.32 - 0.27), abs=0.01)
    assert (y0 - y2) / (y0 - y1) == pytest.approx((23 - 19) / (27 - 19), abs=0.01)


@given(st.lists(st.floats(0, 500), min_size=1, max_size=20).map(sorted))
def test_names_keep_their_order_and_do_not_overlap(heights):
    placed = spread(heights, 10, 0, 500)
    assert all(later - earlier >= 10 - 1e-9 for earlier, later in itertools.pairwise(placed))
    assert placed[-1] <= 500
    assert placed[0] >= -1e-9


def test_names_with_room_stay_beside_their_points():
    assert spread([10, 100, 300], 14, 0, 400) == [10, 100, 300]


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=5))
def test_any_finite_points_fit_between_the_axes(values):
    found = chart({"a": [(str(index), x, y) for index, (x, y) in enumerate(values)]})
    for x, y in dots(found).values():
        assert 58 - 0.1 <= x <= 338 + 0.1
        assert 64 - 0.1 <= y <= 264 + 0.1


def test_where_less_is_better_less_is_up():
    svg = scatter_chart(POINTS, title="", x_label="", y_label="", lower_is_better=True)
    found = dots(ElementTree.fromstring(svg))
    assert found["naive & worse"][1] < found["int4"][1] < found["w4a8"][1]


POINT = st.tuples(st.sampled_from("abc"), st.integers(0, 5).map(float), st.integers(0, 5).map(float))


@given(st.lists(POINT, min_size=1, max_size=12), st.booleans())
def test_the_front_is_what_no_other_point_beats(points, lower):
    def beats(other, point):
        better = other[2] <= point[2] if lower else other[2] >= point[2]
        return other[1] <= point[1] and better and other[1:] != point[1:]

    unbeaten = {point[1:] for point in points if not any(beats(other, point) for other in points)}
    front = pareto_front(points, lower_is_better=lower)
    assert [point[1:] for point in front] == sorted(unbeaten)


def test_the_front_and_the_reference_are_drawn():
    text = scatter_chart(
        POINTS, title="", x_label="", y_label="", front=True, reference=("full", 1.0), intervals={"w4a8": (26.0, 28.5)}
    )
    svg = ElementTree.fromstring(text)
    (front,) = (path for path in svg.iter(f"{SVG}path") if path.get("class") == "front")
    # From the cheapest point to the best one; the third is beaten by w4a8.
    assert front.get("d").count("V") == 1
    assert "full" in {element.text for element in svg.iter(f"{SVG}text")}


@pytest.mark.parametrize("groups", [{}, {"a": []}, {"a": [("x", math.inf, 1.0)]}], ids=["none", "empty", "infinite"])
def test_what_cannot_be_drawn_is_refused(groups):
    with pytest.raises(ValueError, match="points"):
        scatter_chart(groups, title="", x_label="", y_label="")
