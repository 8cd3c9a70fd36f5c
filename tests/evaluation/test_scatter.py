import itertools
import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdiff.evaluation.scatter import scatter_chart, spread

SVG = "{http://www.w3.org/2000/svg}"
POINTS = {"ours": [("w4a8", 0.3, 27.0), ("naive & worse", 0.27, 19.0)], "peers": [("int4", 0.32, 23.0)]}


def chart(groups):
    return ElementTree.fromstring(scatter_chart(groups, title="Likeness", x_label="bytes", y_label="dB"))


def dots(svg):
    found = [circle for circle in svg.iter(f"{SVG}circle") if circle.find(f"{SVG}title") is not None]
    titles = {circle.find(f"{SVG}title").text.split(":")[0]: circle for circle in found}
    return {name: (float(circle.get("cx")), float(circle.get("cy"))) for name, circle in titles.items()}


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
        assert 62 - 0.1 <= x <= 510 + 0.1
        assert 62 - 0.1 <= y <= 362 + 0.1


@pytest.mark.parametrize("groups", [{}, {"a": []}, {"a": [("x", math.inf, 1.0)]}], ids=["none", "empty", "infinite"])
def test_what_cannot_be_drawn_is_refused(groups):
    with pytest.raises(ValueError, match="points"):
        scatter_chart(groups, title="", x_label="", y_label="")
