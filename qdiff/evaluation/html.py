"""A report as one HTML page that needs nothing else: styles, charts and pictures are inside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Table:
    """Cells as they are shown: the first column names the row, `strong` is the index of the row to stress."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int | None = None


@dataclass(frozen=True)
class PictureGrid:
    """Pictures [captions, 3, height, width] in [0, 1] for each column, with a short note under each of `notes`."""

    captions: Sequence[str]
    columns: Mapping[str, Float[Tensor, "captions 3 height width"]]
    notes: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Section:
    """One model's part of the page. `figures` are (number, what it says) pairs, shown large; `charts` are SVGs."""

    title: str
    lead: str
    figures: Sequence[tuple[str, str]]
    table: Table
    charts: Sequence[str]
    pictures: PictureGrid


def render_page(title: str, lead: str, sections: Sequence[Section], footer: Sequence[str]) -> str:
    """Return the page. Every text is escaped; only `Section.charts` are put in as they are.

    footer: paragraphs that say how the figures were measured.

    Raises:
        ValueError: a grid's columns, captions and notes do not fit each other.
    """
    return document(title, lead, "".join(_section(section) for section in sections), footer)


# The page may show what is inside it and fetch nothing, whatever a text in it says.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(title: str, lead: str, body: str, footer: Sequence[str], script: str = "") -> str:
    """Return a page around `body`, which is put in as it is, as is `script`; the other texts are escaped.

    footer: paragraphs that say how the figures were measured.
    """
    notes = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in footer)
    style = resources.files("qdiff.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    code = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main><header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>"
        f"{body}<footer>{notes}</footer></main>{code}</body></html>\n"
    )


def png_data_uri(picture: Float[Tensor, "3 height width"]) -> str:
    """Return the picture, values in [0, 1], as an 8-bit PNG in a data URI."""
    pixels = (picture.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue())


def data_uri(png: bytes) -> str:
    """Return the bytes of a PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _section(section: Section) -> str:
    figures = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(number)}</dd></div>" for number, what in section.figures
    )
    return (
        f"<section><h2>{escape(section.title)}</h2><p>{escape(section.lead)}</p><dl>{figures}</dl>"
        f'<div class="wide">{_table(section.table)}</div><div class="charts">{"".join(section.charts)}</div>'
        f"{_pictures(section.pictures)}</section>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = []
    for index, row in enumerate(table.rows):
        name, *cells = map(escape, row)
        mark = ' class="strong"' if index == table.strong else ""
        rows.append(f'<tr{mark}><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    return f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _pictures(grid: PictureGrid) -> str:
    """Two tables of half the captions each, side by side where the page is wide enough."""
    _check_grid(grid)
    half = (len(grid.captions) + 1) // 2
    tables = "".join(_picture_table(grid, rows) for rows in (range(half), range(half, len(grid.captions))) if len(rows))
    return f'<div class="pictures">{tables}</div>'


def _picture_table(grid: PictureGrid, rows: range) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in grid.columns)
    body = "".join(_picture_row(grid, row) for row in rows)
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"


def _picture_row(grid: PictureGrid, row: int) -> str:
    cells = []
    for name, pictures in grid.columns.items():
        note = grid.notes[name][row] if name in grid.notes else ""
        alt = escape(f"{grid.captions[row]}: {name}", quote=True)
        cells.append(f'<td><img src="{png_data_uri(pictures[row])}" alt="{alt}"><small>{escape(note)}</small></td>')
    return f'<tr><th scope="row">{escape(grid.captions[row])}</th>{"".join(cells)}</tr>'


def _check_grid(grid: PictureGrid) -> None:
    lengths = {name: len(column) for name, column in grid.columns.items()}
    lengths |= {f"notes of {name}": len(notes) for name, notes in grid.notes.items()}
    if not grid.columns or set(lengths.values()) != {len(grid.captions)}:
        raise ValueError(
            f"every column and its notes must have {len(grid.captions)} rows, one a caption: got {lengths}"
        )
