import re

import pytest

from qdiff.evaluation import Record, Report
from qdiff.evaluation.markdown import markdown


def test_verdicts_come_first_with_their_reasons_and_what_was_not_checked(evaluated):
    text = markdown(evaluated[1])
    assert "- **w4a8: ship.** The 6 rules that could be checked are met. Not checked: Prompt." in text
    assert re.search(r"- \*\*naive w4a8: do not ship\.\*\* Broken pictures: 2 black\.", text)
    assert text.index("do not ship") < text.index("| --- |")


def test_the_table_has_as_many_cells_in_every_row(evaluated):
    rows = [line for line in markdown(evaluated[1]).splitlines() if line.startswith("|")]
    assert len(rows) > 15
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}


def test_what_is_missing_and_where_figures_come_from_is_said(evaluated):
    text = markdown(evaluated[1])
    assert "Cold start (w4a8): not measured, known of a pipeline's folder alone." in text
    assert "2 black, left out of every measure: a cat, noto style; a house, noto style." in text
    assert "weights sha256 6726825d0af5…" in text
    assert "p \\< 0.001" in text


def test_texts_cannot_end_a_cell_or_start_markup():
    record = Record.exact("psnr_db", 20.0, candidate="a|b<script>*")
    assert "a\\|b\\<script>\\*" in markdown(Report("x", (record,)))


def test_a_report_without_candidates_is_refused():
    with pytest.raises(ValueError, match="candidate"):
        markdown(Report("Nothing", (Record.exact("psnr_db", 1.0),)))
