import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from qdiff.evaluation.page.heatmap import COLOURS, MOST_ROWS, HeatMap, gather, heat_maps, label, picture


def test_few_layers_keep_a_row_each():
    heat = gather(["a.b", "a.c"], [2, 1], [[1.0, 2.0], [3.0, 4.0]])
    assert list(heat.rows) == ["a.b", "a.c"]
    assert heat.values.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_many_layers_are_gathered_in_blocks_that_show_their_worst(evaluated):
    _, report = evaluated
    table = report.tables["layer-error/w4a8"]
    heat = gather(table["rows"], table["columns"], table["values"])
    assert 20 < len(heat.rows) <= MOST_ROWS < len(table["rows"])
    values = dict(zip(table["rows"], table["values"]))
    members = [name for name in values if name.startswith("down_blocks.1.attentions.0")]
    row = list(heat.rows).index("down_blocks.1.attentions.0")
    for column in range(20):
        worst = max(members, key=lambda name: values[name][column])
        assert heat.worst[row][column] == worst
        assert heat.values[row, column] == values[worst][column]


def test_colours_are_of_the_logarithm_from_the_smallest_to_the_largest():
    heat = HeatMap(["a"], [1, 2, 3, 4], np.array([[0.0, 0.01, 0.1, np.inf]]), [["a"] * 4])
    pixels = np.asarray(Image.open(io.BytesIO(picture(heat, 0.01, 1.0))))
    hexes = ["#" + bytes(pixel).hex() for pixel in pixels[0]]
    assert hexes[0] == hexes[1] == COLOURS[0]
    assert hexes[3] == COLOURS[-1]
    middle = [(int(a, 16) + int(b, 16)) / 2 for a, b in zip(*(re.findall("..", c[1:]) for c in COLOURS[2:4]))]
    assert np.abs(pixels[0, 2] - middle).max() <= 1


def test_the_largest_errors_are_listed_and_the_values_are_in_the_page():
    html = heat_maps({"w4a8": {"rows": ["a<", "b"], "columns": [9, 1], "values": [[0.5, 0.25], [0.125, float("inf")]]}})
    assert re.search(r"<li><code>a&lt;</code> 50.0 % at timestep 9</li>", html)
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html)[1])
    assert data["values"] == [[0.5, 0.25], [0.125, None]]
    assert data["layers"][data["worst"][0][0]] == "a<"


@pytest.mark.parametrize("values", [[], [[1.0]], [[1.0, 2.0], [3.0]]], ids=["empty", "narrow", "ragged"])
def test_a_table_that_does_not_fit_is_refused(values):
    with pytest.raises(ValueError, match=r"values must be|inhomogeneous"):
        gather(["a", "b"], [1, 2], values)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.attn1.to_out.0"),
        ("transformer_blocks.3.norm1.emb.timestep_embedder.linear_1", "transformer_blocks.3.norm1…linear_1"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "down_blocks.1.attentions.0…to_out.0"),
        ("a" * 50, "a" * 50),
    ],
)
def test_a_rows_label_keeps_its_block_and_its_end(name, shown):
    assert label(name) == shown
