"""A report as Markdown: the verdicts, the table, and where each figure comes from."""

from __future__ import annotations

from qdiff.evaluation.page import lead_of
from qdiff.evaluation.page.figures import READING, Notes, best_of, shown_interval
from qdiff.evaluation.page.measures import FAMILIES, measure_of
from qdiff.evaluation.page.plots import group_findings
from qdiff.evaluation.page.rules import RULES
from qdiff.evaluation.page.sheet import Sheet
from qdiff.evaluation.page.verdict import judge
from qdiff.evaluation.report import Report


def markdown(report: Report) -> str:
    """Return the report as GitHub-flavoured Markdown, without its pictures and charts.

    Raises:
        ValueError: the report has no record with a "candidate" tag.
    """
    sheet = Sheet(report)
    if not sheet.candidates:
        raise ValueError(f'report {report.title!r} has no record with a "candidate" tag: there is nothing to judge')
    notes = Notes()
    table = _table(sheet, notes)
    parts = [
        f"# {_cell(report.title)}",
        _cell(lead_of(sheet)),
        _verdicts(sheet),
        table,
        READING.replace("Small", "In brackets"),
    ]
    parts.append("\n".join(f"{index}. {_cell(text)}" for index, text in enumerate(notes.texts, 1)))
    parts.append("\n".join(f"- {_cell(line)}" for line in (*sheet.gaps, *_groups(sheet))))
    parts.append("The rules, of which the worst finding decides:")
    parts.append("\n".join(f"- **{rule.title}.** {rule.statement}" for rule in RULES))
    versions = ", ".join(f"{name} {version}" for name, version in report.environment.items())
    parts.append(f"Measured with {versions}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdicts(sheet: Sheet) -> str:
    lines = []
    for candidate in sheet.candidates:
        verdict = judge(sheet, candidate)
        missing = f" Not checked: {', '.join(verdict.missing)}." if verdict.missing else ""
        lines.append(f"- **{_cell(candidate)}: {verdict.word.lower()}.** {_cell(verdict.reason)}{missing}")
    return "\n".join(lines)


def _table(sheet: Sheet, notes: Notes) -> str:
    lines = ["| | " + " | ".join(map(_cell, sheet.columns)) + " |", "| --- |" + " --: |" * len(sheet.columns)]
    for family in FAMILIES:
        names = [name for name in sheet.names if measure_of(name).family == family]
        if names:
            lines.append(f"| **{family}** |" + " |" * len(sheet.columns))
        lines += [_row(sheet, name, notes) for name in names]
    return "\n".join(lines)


def _row(sheet: Sheet, name: str, notes: Notes) -> str:
    measure = measure_of(name)
    records = {column: sheet.record(name, column) for column in sheet.columns}
    best = best_of({column: record for column, record in records.items() if column != sheet.reference}, measure)
    sizes = {record.n for record in records.values() if record is not None}
    cells = []
    for column, record in records.items():
        if record is None:
            cells.append("-")
            continue
        value = f"**{measure.write(record.value)}**" if column == best else measure.write(record.value)
        details = [shown_interval(record, measure), f"n = {record.n:,}" if len(sizes) > 1 and record.n > 1 else ""]
        shown = ", ".join(filter(None, details))
        number = notes.number(record.provenance)
        cells.append(value + (f" ({shown})" if shown else "") + (f" <sup>{number}</sup>" if number else ""))
    size = f", n = {sizes.pop():,}" if len(sizes) == 1 and max(sizes) > 1 else ""
    label = f"{_cell(measure.label)} {measure.arrow}".strip() + size
    return f"| {label} | {' | '.join(cells)} |"


def _groups(sheet: Sheet) -> list[str]:
    names = [name for name in sheet.grouped_names if group_findings(sheet, name)]
    return [f"{measure_of(name).label}, by group. {line}" for name in names for line in group_findings(sheet, name)]


def _cell(text: str) -> str:
    """Text that can stand in a table's cell and starts no markup."""
    for sign in "\\|*_`<[":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
