import math
import xml.etree.ElementTree as ElementTree

import pytest

from qdiff.evaluation.intervals import interval_chart

SVG = "{http://www.w3.org/2000/svg}"
ROWS = {
    "noto": {"w4a8": (27.0, 26.0, 28.0), "int4 & more": (24.0, 23.0, 26.0)},
    "a group whose name is too long for its column": {"w4a8": (20.0, 18.0, 22.0)},
}


def chart(rows, **options):
    return ElementTree.fromstring(interval_chart(rows, title="By group", x_label="PSNR, dB", **options))


def test_every_interval_is_drawn_in_proportion_with_its_value_inside():
    svg = chart(ROWS)
    ends = {}
    for group in svg.iter(f"{SVG}g"):
        title = group.find(f".//{SVG}title")
        if title is not None:
            line = group.find(f"{SVG}path").get("d")
            ends[title.text.split(":")[0]] = [float(part.split(",")[0]) for part in line[1:].split("H")]
    (a, b), (c, d) = ends["noto, w4a8"], ends["noto, int4 & more"]
    assert (b - a) / (d - c) == pytest.approx(2 / 3, abs=0.02)
    assert c < a == d < b
    assert len(ends) == 3


def test_names_are_there_the_long_one_cut_with_the_whole_in_its_tooltip():
    svg = chart(ROWS)
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"noto", "w4a8", "int4 & more", "PSNR, dB", "By group"} <= set(texts)
    titles = {title.text for title in svg.iter(f"{SVG}title")}
    assert "a group whose name is too long for its column" in titles
    assert max(map(len, texts)) <= 26


def test_a_single_series_needs_no_key():
    svg = chart({"noto": {"w4a8": (1.0, 0.5, 1.5)}})
    assert "w4a8" not in {text.text for text in svg.iter(f"{SVG}text")}


@pytest.mark.parametrize("rows", [{}, {"a": {}}, {"a": {"b": (math.inf, 0.0, 1.0)}}], ids=["none", "empty", "infinite"])
def test_what_cannot_be_drawn_is_refused(rows):
    with pytest.raises(ValueError, match="rows"):
        chart(rows)
