"""A report as one HTML page that a person reads: the verdict, the figures, what they cost, and the pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from importlib import resources
from pathlib import Path

from qdiff.evaluation.html import document
from qdiff.evaluation.page.figures import figures_table
from qdiff.evaluation.page.heatmap import heat_maps
from qdiff.evaluation.page.pairs import pairs_section
from qdiff.evaluation.page.plots import drift_charts, drift_findings, group_charts, price_charts
from qdiff.evaluation.page.rules import RULES, Outcome
from qdiff.evaluation.page.sheet import Sheet
from qdiff.evaluation.page.verdict import WORDS, Verdict, judge
from qdiff.evaluation.pictures import written_whole
from qdiff.evaluation.report import Report

__all__ = ["write_page"]

LAYER_ERRORS = "layer-error/"
SIGNS = {Outcome.SHIP: "✓", Outcome.LOOK: "?", Outcome.STOP: "✕", Outcome.NOT_MEASURED: "-"}
CLASSES = {Outcome.SHIP: "ship", Outcome.LOOK: "look", Outcome.STOP: "stop", Outcome.NOT_MEASURED: "none"}


def write_page(report: Report, folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` to the report's folder and return its path. It opens from disk and fetches nothing.

    Raises:
        ValueError: the report has no record with a "candidate" tag.
        FileNotFoundError: a picture of `report.pairs` is not in the folder.
    """
    folder = Path(folder)
    sheet = Sheet(report)
    if not sheet.candidates:
        raise ValueError(f'report {report.title!r} has no record with a "candidate" tag: there is nothing to judge')
    sections = [
        _section("Verdict", _verdicts(sheet)),
        _section("Figures", figures_table(sheet)),
        _section("Quality and its price", _charts(price_charts(sheet)), PRICE),
        _section("Before and after", pairs_section(sheet, folder), PAIRS),
        _section("For whom", _groups(sheet), GROUPS),
        _section("Along the steps", _charts(drift_charts(sheet)) + _findings(drift_findings(sheet)), DRIFT),
        _section("Layer by layer", _layers(sheet), LAYERS),
    ]
    script = resources.files("qdiff.evaluation.page").joinpath("page.js").read_text(encoding="utf-8")
    page = document(report.title, lead_of(sheet), "".join(sections), _footer(report), script)
    path = folder / "report.html"
    with written_whole(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


def lead_of(sheet: Sheet) -> str:
    """Return what was compared with what, in one sentence."""
    names = ", ".join(sheet.candidates)
    settings = sheet.report.settings
    details = [f"{sheet.pictures:,} pictures"] if sheet.pictures else []
    details += [f"{settings['steps']} steps"] if settings.get("steps") else []
    details += [f"guidance {settings['guidance_scale']:g}"] if settings.get("guidance_scale") else []
    place = settings.get("sources", {}).get(sheet.reference, {}).get("from")
    reference = f"{sheet.reference} ({place})" if place else sheet.reference
    return f"{names} against {reference}{': ' if details else ''}{', '.join(details)}."


PRICE = "Up and left is better. The line is the front: what no other candidate beats in both. Whiskers: 95 % intervals."
PAIRS = (
    "Drag across a picture, or use the arrow keys. The same prompt and seed on both sides; a picture that took another "
    "turn along the way can score low and look as good."
)
GROUPS = (
    "Each measure for each group (in brackets: of how many pictures), with 95 % intervals, the worst first. p: how "
    "often groups as far apart come up when pictures are dealt to them at random (permutation test)."
)
DRIFT = "How far the latents are from the reference's after each step, mean of the pictures that were followed."
LAYERS = (
    "The relative error of each layer's output at each timestep. Blocks show their worst layer. Bright is worse; the "
    "scale is logarithmic and the same for all candidates."
)


def _section(title: str, body: str, lead: str = "") -> str:
    """A part of the page; nothing where there is nothing to show."""
    if not body:
        return ""
    return f"<section><h2>{escape(title)}</h2>{f'<p>{escape(lead)}</p>' if lead else ''}{body}</section>"


def _charts(charts: Iterable[str]) -> str:
    body = "".join(charts)
    return f'<div class="charts">{body}</div>' if body else ""


def _groups(sheet: Sheet) -> str:
    figures = []
    for svg, findings in group_charts(sheet):
        figures.append(f"<figure>{svg}<figcaption>{_findings(findings)}</figcaption></figure>")
    return _charts(figures)


def _findings(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="findings">{items}</ul>' if items else ""


def _layers(sheet: Sheet) -> str:
    tables = {name: sheet.report.tables.get(LAYER_ERRORS + name) for name in sheet.candidates}
    present = {name: table for name, table in tables.items() if table is not None}
    return heat_maps(present) if present else ""


def _verdicts(sheet: Sheet) -> str:
    cards = "".join(_card(judge(sheet, candidate)) for candidate in sheet.candidates)
    rules = "".join(f"<dt>{escape(rule.title)}</dt><dd>{escape(rule.statement)}</dd>" for rule in RULES)
    return (
        f'<div class="verdicts">{cards}</div><details class="rules"><summary>The rules</summary>'
        "<p>The worst finding decides. The limits are conventions, chosen by hand: they say what to look at, not what "
        f"a person will see.</p><dl>{rules}</dl></details>"
    )


def _card(verdict: Verdict) -> str:
    findings = "".join(
        f'<li class="{CLASSES[finding.outcome]}"><i title="{WORDS[finding.outcome]}">{SIGNS[finding.outcome]}</i>'
        f"<span>{escape(finding.says)}</span></li>"
        for finding in verdict.findings.values()
    )
    return (
        f'<article class="verdict {CLASSES[verdict.outcome]}"><h3>{escape(verdict.candidate)}</h3>'
        f'<p class="word"><i aria-hidden="true">{SIGNS[verdict.outcome]}</i>{escape(verdict.word)} '
        f"<small>{len(RULES) - len(verdict.missing)} of {len(RULES)} rules could be checked</small></p>"
        f"<ul>{findings}</ul></article>"
    )


def _footer(report: Report) -> list[str]:
    settings = "; ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in report.settings.items()
        if name != "reference" and _short(value)
    )
    sources = "; ".join(f"{name} from {source['from']}" for name, source in report.settings.get("sources", {}).items())
    versions = ", ".join(f"{name} {version}" for name, version in report.environment.items())
    return [
        *([f"Compared: {sources}."] if sources else []),
        *([f"Settings: {settings}."] if settings else []),
        f"Measured with {versions}. Every figure is in report.json, with its provenance.",
    ]


def _short(value: object) -> bool:
    return isinstance(value, str | int | float | bool) and len(str(value)) < 100
