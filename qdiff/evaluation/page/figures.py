"""The table of figures: candidates as columns, each figure with its interval and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from qdiff.evaluation.page.measures import FAMILIES, Measure, measure_of
from qdiff.evaluation.page.sheet import Sheet
from qdiff.evaluation.report import Record

DIGEST_SHOWN = 12  # characters of a sha256: enough to tell weights apart; the report's JSON has the whole
READING = (
    "↑ more is better, ↓ less is better. Small: the 95 % bootstrap interval; of a cost, its least and largest "
    "repetition. Bold: the best candidate, where its interval meets no other's. -: not measured."
)


class Notes:
    """Provenances in the order in which they are first mentioned, each with a number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, provenance: Mapping[str, str]) -> int | None:
        """Return the number of a provenance, a new one at its first mention; None where there is nothing to say."""
        if not provenance:
            return None
        text = provenance_text(provenance)
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def provenance_text(provenance: Mapping[str, str]) -> str:
    """Return a provenance as one line; a warning comes first."""
    parts = [f"Warning: {provenance['warning']}"] if "warning" in provenance else []
    parts += [f"{key.replace('_', ' ')} {_short(value)}" for key, value in provenance.items() if key != "warning"]
    return "; ".join(parts)


def best_of(records: Mapping[str, Record | None], measure: Measure) -> str | None:
    """Return the candidate whose whole interval is better than every other's; None where no such one is.

    Nor where a figure has no interval: of two single measurements, chance may have made one the better.
    """
    measured = {name: record for name, record in records.items() if record is not None}
    certain = all(record.low < record.high for record in measured.values())
    if len(measured) < 2 or measure.better == "neither" or not certain:
        return None
    for name, record in measured.items():
        others = [other for other_name, other in measured.items() if other_name != name]
        worst, ends = (
            (record.low, [o.high for o in others])
            if measure.better == "higher"
            else (
                record.high,
                [o.low for o in others],
            )
        )
        if all(measure.worse(end, worst) for end in ends):
            return name
    return None


def shown_interval(record: Record, measure: Measure) -> str:
    """Return the interval as it is written; nothing where the value does not vary."""
    return "" if record.low == record.high else f"{measure.write(record.low)} to {measure.write(record.high)}"


def figures_table(sheet: Sheet) -> str:
    """Return the table and its notes as HTML. On a narrow screen each row becomes a block."""
    notes = Notes()
    bodies = []
    for family in FAMILIES:
        names = [name for name in sheet.names if measure_of(name).family == family]
        if names:
            heading = (
                f'<tr class="family"><th colspan="{1 + len(sheet.columns)}" scope="colgroup">{escape(family)}</th></tr>'
            )
            bodies.append(f"<tbody>{heading}{''.join(_row(sheet, name, notes) for name in names)}</tbody>")
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in sheet.columns)
    items = "".join(f"<li>{escape(text)}</li>" for text in notes.texts)
    sources = f'<ol class="notes">{items}</ol>' if items else ""
    gaps = "".join(f"<li>{escape(sentence)}</li>" for sentence in sheet.gaps)
    missing = f'<h3>Not in the figures</h3><ul class="findings">{gaps}</ul>' if gaps else ""
    body = f"<thead><tr><td></td>{head}</tr></thead>{''.join(bodies)}"
    return (
        f'<div class="wide"><table class="numbers stack">{body}</table></div>'
        f'<p class="reading">{escape(READING)}</p>{sources}{missing}'
    )


def _row(sheet: Sheet, name: str, notes: Notes) -> str:
    measure = measure_of(name)
    records = {column: sheet.record(name, column) for column in sheet.columns}
    best = best_of({column: record for column, record in records.items() if column != sheet.reference}, measure)
    sizes = {record.n for record in records.values() if record is not None}
    size = f"<small>n = {sizes.pop():,}</small>" if len(sizes) == 1 and max(sizes) > 1 else ""
    cells = "".join(
        _cell(column, record, measure, notes, strong=column == best, sized=not size)
        for column, record in records.items()
    )
    arrow = f' <abbr title="{measure.better} is better">{measure.arrow}</abbr>' if measure.arrow else ""
    return f'<tr><th scope="row">{escape(measure.label)}{arrow} {size}</th>{cells}</tr>'


def _cell(column: str, record: Record | None, measure: Measure, notes: Notes, *, strong: bool, sized: bool) -> str:
    label = f'data-label="{escape(column, quote=True)}"'
    if record is None:
        return f'<td {label} class="none"><span title="not measured">-</span></td>'
    number = notes.number(record.provenance)
    sup = f'<sup title="{escape(provenance_text(record.provenance), quote=True)}">{number}</sup>' if number else ""
    sign = '<span class="warn" title="see the note">!</span> ' if "warning" in record.provenance else ""
    size = f"n = {record.n:,}" if sized and record.n > 1 else ""
    small = " ".join(filter(None, [shown_interval(record, measure), size]))
    value = escape(measure.write(record.value))
    shown = f"<b>{value}</b>" if strong else value
    return f"<td {label}><span>{sign}{shown}{sup}<small>{escape(small)}</small></span></td>"


def _short(value: str) -> str:
    is_digest = len(value) == 64 and set(value) <= set("0123456789abcdef")
    return f"{value[:DIGEST_SHOWN]}…" if is_digest else value
