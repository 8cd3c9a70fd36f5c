import re
from html.parser import HTMLParser

import pytest

from qdiff.evaluation import Record, Report
from qdiff.evaluation.page import write_page


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def page(evaluated):
    folder, report = evaluated
    return write_page(report, folder).read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_elsewhere(page):
    for tag, attributes in Elements(page).found:
        assert tag not in ("link", "iframe")
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in page
    assert "@import" not in page


def test_it_is_small_without_its_pictures(page):
    assert len(re.sub(r'<img class="(before|after)[^>]*>', "", page).encode()) < 200_000


def test_every_part_is_there_and_every_slider_has_its_name(page):
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        *("Verdict", "Figures", "Quality and its price", "Before and after", "For whom"),
        *("Along the steps", "Layer by layer"),
    ]
    sliders = [attributes for tag, attributes in Elements(page).found if tag == "input"]
    assert len(sliders) == 3 * 8
    assert all("prompt" in slider["aria-label"] for slider in sliders)
    assert all(
        attributes["alt"] for tag, attributes in Elements(page).found if attributes.get("class") == "before sharp"
    )


def test_texts_are_escaped(page):
    assert "<b>of many" not in page


def test_a_report_of_little_has_the_parts_that_it_can(tmp_path):
    record = Record.exact("psnr_db", 20.0, candidate="w4a8")
    page = write_page(Report("Little <i>", (record,)), tmp_path).read_text(encoding="utf-8")
    assert "<i>" not in page.partition("<main>")[0]
    assert "<h1>Little &lt;i&gt;</h1>" in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Verdict", "Figures"]
    assert "Look closer" in page


def test_a_report_without_candidates_is_refused(tmp_path):
    with pytest.raises(ValueError, match="candidate"):
        write_page(Report("Nothing", (Record.exact("psnr_db", 1.0),)), tmp_path)
