"""Pictures before and after, under a slider: the least alike and the typical ones."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from qdiff.evaluation.html import data_uri
from qdiff.evaluation.page.measures import decimals
from qdiff.evaluation.page.sheet import Sheet
from qdiff.evaluation.shown_pairs import MEDIAN, WORST

SMALL = 160  # pixels: a picture up to here is enlarged with sharp pixels, so that its own are seen


def choose_pairs(pairs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the worst pairs and those around the median, by PSNR; no pair twice.

    A report of an evaluation has chosen them already, among all pictures: then every pair is returned.
    """
    ordered = sorted(pairs, key=lambda pair: float(pair["psnr_db"]))
    worst, rest = ordered[:WORST], ordered[WORST:]
    start = 0 if len(rest) <= MEDIAN else max(0, len(ordered) // 2 - WORST - MEDIAN // 2)
    return {"the least alike": worst, "around the median": rest[start : start + MEDIAN]}


def pairs_section(sheet: Sheet, folder: Path) -> str:
    """Return every candidate's pairs as HTML, with the pictures of `folder` inside.

    Raises:
        FileNotFoundError: a picture of a pair is not in the folder.
    """
    parts = []
    for candidate in sheet.candidates:
        for kind, pairs in choose_pairs(sheet.pairs(candidate)).items():
            if pairs:
                figures = "".join(_figure(sheet.reference, candidate, pair, folder) for pair in pairs)
                heading = f"<h3>{escape(candidate)} <small>{kind}</small></h3>"
                parts.append(f'{heading}<div class="pairs">{figures}</div>')
    return "".join(parts)


def _figure(reference: str, candidate: str, pair: Mapping[str, Any], folder: Path) -> str:
    prompt, psnr = str(pair["prompt"]), f"{decimals(1)(float(pair['psnr_db']))} dB"
    details = " · ".join(filter(None, [psnr, pair.get("group")]))
    what = escape(f"{prompt}: share of the picture that is {reference}, the rest is {candidate}", quote=True)
    return (
        '<figure class="pair"><div class="compare">'
        f"{_image(folder / pair['candidate_png'], 'after', f'{prompt}, {candidate}')}"
        f"{_image(folder / pair['reference_png'], 'before', f'{prompt}, {reference}')}"
        f'<span class="tag">{escape(reference)}</span><span class="tag">{escape(candidate)}</span>'
        f'<input type="range" min="0" max="100" step="0.5" value="50" aria-label="{what}"><span class="line"></span>'
        f"</div><figcaption>{escape(prompt)}<small>{escape(details)}</small></figcaption></figure>"
    )


def _image(path: Path, role: str, alt: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"no picture {path}: a pair's paths are relative to the report's folder; write the page where the "
            "report is, or evaluate again to draw what is missing"
        )
    content = path.read_bytes()
    width, height = Image.open(io.BytesIO(content)).size
    sharp = " sharp" if max(width, height) <= SMALL else ""
    attributes = f'width="{width}" height="{height}" alt="{escape(alt, quote=True)}" draggable="false"'
    return f'<img class="{role}{sharp}" src="{data_uri(content)}" {attributes}>'
