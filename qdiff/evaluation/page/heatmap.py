"""The error of every layer at every timestep as a picture of colours that tells its values."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from qdiff.evaluation.html import data_uri
from qdiff.evaluation.page.measures import percent

MOST_ROWS = 48  # as many as fit a screen
MOST_CHARACTERS = 36  # of a row's name
LARGEST = 5
WIDEST = 1000  # the largest error over the smallest one that has a colour of its own
# Of cividis (Nunez, Anderton and Renslow 2018): the same to eyes with and without colour vision deficiency.
COLOURS = ("#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838")


@dataclass(frozen=True)
class HeatMap:
    """Rows are layers or blocks of layers; a block's value is that of its worst layer.

    values: [rows, columns].  worst: the layer's name behind each value, [rows, columns].
    """

    rows: Sequence[str]
    columns: Sequence[float]
    values: np.ndarray
    worst: Sequence[Sequence[str]]


def gather(layers: Sequence[str], columns: Sequence[float], values: Sequence[Sequence[float]]) -> HeatMap:
    """Return the map of a table, layers gathered by the first parts of their names until there are few enough rows.

    Raises:
        ValueError: the table is empty, or its names and values do not fit each other.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.shape != (len(layers), len(columns)) or table.size == 0:
        raise ValueError(f"values must be [{len(layers)} layers, {len(columns)} columns], not empty: got {table.shape}")
    depths = range(max(name.count(".") for name in layers) + 1, 0, -1)
    cut = next((depth for depth in depths if len(_blocks(layers, depth)) <= MOST_ROWS), 1)
    blocks = _blocks(layers, cut)
    worst = [[members[row] for row in table[members].argmax(0)] for members in blocks.values()]
    return HeatMap(
        list(blocks),
        list(columns),
        np.stack([table[members].max(0) for members in blocks.values()]),
        [[layers[index] for index in row] for row in worst],
    )


def heat_maps(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one figure for each name's table, all on one scale of colours."""
    maps = {name: gather(table["rows"], table["columns"], table["values"]) for name, table in tables.items()}
    finite = np.concatenate([heat.values[np.isfinite(heat.values)] for heat in maps.values()])
    highest = float(finite.max(initial=0.0)) or 1.0
    scale = max(float(finite[finite > 0].min(initial=highest)), highest / WIDEST), highest
    figures = "".join(_figure(name, heat, scale) for name, heat in maps.items())
    return f'{_scale(*scale)}<div class="maps">{figures}</div>'


def picture(heat: HeatMap, lowest: float, highest: float) -> bytes:
    """Return the map as a PNG of one pixel a value, logarithmic from the first colour to the last; NaN is the last."""
    clipped = np.clip(np.nan_to_num(heat.values, nan=np.inf), lowest, highest)
    place = np.log(clipped / lowest) / math.log(max(highest / lowest, 1 + 1e-9))
    stops = np.linspace(0, 1, len(COLOURS))
    anchors = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS])
    pixels = np.stack([np.interp(place, stops, anchors[:, channel]) for channel in range(3)], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def label(name: str) -> str:
    """Return a layer's name with parts left out of its middle where it is too long: its block and its end tell it."""
    parts = name.split(".")
    end = next(index for index in range(len(parts) - 1, -1, -1) if index == 0 or not parts[index].isdecimal())
    for kept in range(end, 0, -1):
        short = ".".join(parts[:kept]) + ("." if kept == end else "…") + ".".join(parts[end:])
        if len(short) <= MOST_CHARACTERS:
            return short
    return name


def _blocks(layers: Sequence[str], depth: int) -> dict[str, list[int]]:
    blocks: dict[str, list[int]] = {}
    for index, name in enumerate(layers):
        blocks.setdefault(".".join(name.split(".")[:depth]), []).append(index)
    return blocks


def _figure(name: str, heat: HeatMap, scale: tuple[float, float]) -> str:
    labels = "".join(f'<li title="{escape(row, quote=True)}"><bdi>{escape(label(row))}</bdi></li>' for row in heat.rows)
    middle = len(heat.columns) // 2
    ticks = "".join(f"<span>{heat.columns[i]:g}</span>" for i in sorted({0, middle, len(heat.columns) - 1}))
    layers = list(dict.fromkeys(layer for row in heat.worst for layer in row))
    data = {
        "columns": heat.columns,
        "layers": layers,
        "worst": [[layers.index(layer) for layer in row] for row in heat.worst],
        "values": [[float(f"{value:.3g}") if math.isfinite(value) else None for value in row] for row in heat.values],
    }
    return (
        f'<figure class="heat"><figcaption>{escape(name)}</figcaption><div class="map">'
        f'<ol aria-hidden="true">{labels}</ol><div class="cells" tabindex="0" role="application" '
        f'aria-label="{escape(name, quote=True)}: error of each layer at each timestep; arrow keys read it">'
        f'<img class="sharp" src="{data_uri(picture(heat, *scale))}" style="height:{14 * len(heat.rows)}px" alt="">'
        f'<span class="cell" hidden></span></div><div class="ticks">{ticks}</div></div>'
        f'<output>Point at a cell to read it.</output><ol class="largest">{_largest(heat)}</ol>'
        f'<script type="application/json">{_json(data)}</script></figure>'
    )


def _largest(heat: HeatMap) -> str:
    """The worst layers, each once, with the timestep of its largest error."""
    items: dict[str, str] = {}
    for place in np.argsort(heat.values, axis=None)[::-1]:
        row, column = divmod(int(place), len(heat.columns))
        text = f"{percent(heat.values[row, column])} at timestep {heat.columns[column]:g}"
        items.setdefault(heat.worst[row][column], text)
        if len(items) == LARGEST:
            break
    return "".join(f"<li><code>{escape(layer)}</code> {escape(text)}</li>" for layer, text in items.items())


def _scale(lowest: float, highest: float) -> str:
    low, high = percent(lowest), percent(highest)
    return (
        f'<p class="scale"><span>{escape(low)}</span>'
        f'<i style="background:linear-gradient(90deg,{",".join(COLOURS)})"></i><span>{escape(high)}</span></p>'
    )


def _json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the element around it."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
