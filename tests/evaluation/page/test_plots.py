import math
import xml.etree.ElementTree as ElementTree

from qdiff.evaluation import Record, Report
from qdiff.evaluation.page.plots import drift_charts, drift_findings, group_charts, price_charts
from qdiff.evaluation.page.sheet import Sheet

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return {text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}


def test_quality_is_drawn_against_bytes_and_against_time_with_the_reference_and_the_front(evaluated):
    _, report = evaluated
    of_bytes, of_time = price_charts(Sheet(report))
    assert {"LPIPS (alex) against bytes", "MB stored for the denoiser", "w4a8", "SDNQ int4", "reference"} <= texts(
        of_bytes
    )
    assert {"LPIPS (alex) against time", "seconds an image"} <= texts(of_time)
    assert 'class="front"' in of_bytes


def test_a_candidate_without_a_finite_quality_is_no_point():
    def records(name, quality):
        tags = {"candidate": name}
        return [Record("psnr_db", quality, quality, quality, 9, tags), Record.exact("disk_bytes", 1e6, **tags)]

    (chart,) = price_charts(Sheet(Report("", (*records("a", 30.0), *records("same", math.inf)))))
    assert "same" not in texts(chart)
    assert price_charts(Sheet(Report("", tuple(records("same", math.inf))))) == []


def test_runs_of_different_lengths_have_a_chart_each():
    records = tuple(Record.exact("psnr_db", 1, candidate=name) for name in "abc")
    series = {"drift/a": [0.1, 0.2], "drift/b": [0.1, 0.3], "drift/c": [0.1], "cost/a": [1.0]}
    charts = drift_charts(Sheet(Report("", records, series=series)))
    assert len(charts) == 2
    assert {"a", "b"} <= texts(charts[0])
    assert "c" in texts(charts[1])


def test_latents_that_did_not_stay_finite_are_named_where_no_line_can_show_them():
    records = tuple(Record.exact("psnr_db", 1, candidate=name) for name in "ab")
    sheet = Sheet(Report("", records, series={"drift/a": [0.1, 0.2], "drift/b": [0.1, math.inf]}))
    (chart,) = drift_charts(sheet)
    assert "b" not in texts(chart)
    assert drift_findings(sheet) == ["b: not finite from step 2 on."]


def test_groups_come_worst_first_with_what_the_test_says_of_their_gap(evaluated):
    _, report = evaluated
    (psnr, findings), (ssim, nothing) = group_charts(Sheet(report))
    order = [text.text for text in ElementTree.fromstring(psnr).iter(f"{SVG}text") if "(500)" in text.text]
    assert order[:2] == ["twemoji (500)", "noto (500)"]
    assert findings[1] == "naive w4a8: 9.6 dB between the best and the worst group (twemoji), p < 0.001."
    assert "SSIM by group" in texts(ssim)
    less_is_better = [
        Record("lpips_alex", value, value, value, 5, {"candidate": "a", "group": group})
        for group, value in (("good", 0.1), ("bad", 0.5))
    ]
    ((lpips, _),) = group_charts(Sheet(Report("", tuple(less_is_better))))
    assert lpips.index("bad (5)") < lpips.index("good (5)")
    assert nothing == []
