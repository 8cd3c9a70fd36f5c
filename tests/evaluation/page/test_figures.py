from html.parser import HTMLParser

from qdiff.evaluation import Record, Report
from qdiff.evaluation.page.figures import Notes, best_of, figures_table, provenance_text
from qdiff.evaluation.page.measures import measure_of
from qdiff.evaluation.page.sheet import Sheet


class Rows(HTMLParser):
    """The table's rows as lists of texts."""

    def __init__(self, text):
        super().__init__()
        self.rows = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_candidates_are_columns_and_each_figure_has_its_interval_size_and_source(evaluated):
    _, report = evaluated
    table = figures_table(Sheet(report))
    rows = {row[0].split(" ")[0]: row for row in Rows(table).rows if len(row) > 1}
    assert rows[""][1:] == ["reference", "w4a8", "naive w4a8", "SDNQ int4"]
    psnr = Sheet(report).record("psnr_db", "w4a8")
    assert rows["PSNR,"][2] == f"{psnr.value:.1f}1{psnr.low:.1f} to {psnr.high:.1f}"
    assert "n = 2,000" in rows["PSNR,"][0]
    assert rows["PSNR,"][1] == "-"
    assert "<li>package torchmetrics 1.9.0</li>" in table
    assert '<sup title="package torchmetrics 1.9.0">1</sup>' in table
    assert "<li>Energy an image (reference, w4a8): not measured, no counter.</li>" in table


def test_every_record_of_a_candidate_as_a_whole_is_in_the_table(evaluated):
    _, report = evaluated
    rows = [row for row in Rows(figures_table(Sheet(report))).rows if len(row) == 5]
    names = {record.name for record in report.records if "group" not in record.tags}
    assert len(rows) == 1 + len(names)


def test_a_warning_comes_first_and_marks_its_figure():
    digest = "0123456789abcdef" * 4
    provenance = {"weights_sha256": digest, "warning": "few pictures"}
    assert provenance_text(provenance) == "Warning: few pictures; weights sha256 0123456789ab…"
    record = Record("fid", 3.0, 2.0, 4.0, 10, {"candidate": "a"}, provenance)
    assert 'class="warn"' in figures_table(Sheet(Report("", (record,))))


def test_equal_sources_share_a_note():
    notes = Notes()
    numbers = [notes.number(source) for source in ({"package": "a 1"}, {}, {"package": "b 2"}, {"package": "a 1"})]
    assert numbers == [1, None, 2, 1]


def test_the_best_is_marked_only_where_its_interval_meets_no_other():
    def best(name, **figures):
        records = {who: figure and Record(name, *figure, 10) for who, figure in figures.items()}
        return best_of(records, measure_of(name))

    assert best("psnr_db", a=(20, 19, 21), b=(30, 29, 31), c=None) == "b"
    assert best("psnr_db", a=(29, 28, 29.5), b=(30, 29, 31)) is None
    assert best("lpips_alex", a=(0.1, 0.1, 0.12), b=(0.3, 0.2, 0.4)) == "a"
    assert best("psnr_db", a=(20, 19, 21)) is None
    assert best("stored_bytes", a=(1, 1, 1), b=(2, 2, 2)) is None
    assert best("something", a=(1, 1, 1), b=(2, 2, 2)) is None


def test_texts_are_escaped():
    record = Record("x", 1, 1, 1, 1, {"candidate": "<i>"}, {"package": "<b>"})
    table = figures_table(Sheet(Report("", (record,))))
    assert "<i>" not in table
    assert "<b>" not in table
