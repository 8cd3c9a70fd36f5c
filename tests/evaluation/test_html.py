import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from qdiff.evaluation.html import PictureGrid, Section, Table, png_data_uri, render_page

CAPTIONS = ["a <b>cat</b>", "an apple", "a house"]


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def grid(**changes):
    columns = {"before": torch.zeros(3, 3, 8, 8), "after": torch.ones(3, 3, 8, 8)}
    return PictureGrid(
        **{"captions": CAPTIONS, "columns": columns, "notes": {"after": ["1 dB", "2 dB", "3 dB"]}} | changes
    )


def page(**changes):
    table = Table(["recipe", "bytes"], [["full", "10"], ["w4a8", "3"]], strong=1)
    section = Section("A model", "What it is.", [("0.30", "of the bytes")], table, ["<svg></svg>"], grid(**changes))
    return render_page("Title & all", "Lead.", [section], ["How."])


def test_a_picture_survives_as_eight_bit_png():
    picture = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = base64.b64decode(png_data_uri(picture).removeprefix("data:image/png;base64,"))
    pixels = torch.frombuffer(bytearray(Image.open(io.BytesIO(data)).tobytes()), dtype=torch.uint8)
    expected = (picture * 255).round().byte().permute(1, 2, 0).flatten()
    assert torch.equal(pixels, expected)


def test_the_page_needs_nothing_from_elsewhere():
    for tag, attributes in Elements(page()).found:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in page()
    assert "@import" not in page()


def test_every_caption_has_a_picture_of_every_column():
    pictures = [attributes for tag, attributes in Elements(page()).found if tag == "img"]
    assert len(pictures) == 6
    assert {"an apple: before", "an apple: after"} <= {attributes["alt"] for attributes in pictures}
    assert "2 dB" in page()


def test_texts_are_escaped():
    assert "<b>" not in page()
    assert "Title &amp; all" in page()


def test_the_row_to_stress_is_stressed():
    assert re.search(r'<tr class="strong"><th scope="row">w4a8</th><td>3</td>', page())
    assert page().count('class="strong"') == 1


@pytest.mark.parametrize(
    "changes",
    [{"columns": {}}, {"captions": CAPTIONS[:2]}, {"notes": {"after": ["1 dB"]}}],
    ids=["no-column", "captions", "notes"],
)
def test_a_grid_that_does_not_fit_is_refused(changes):
    with pytest.raises(ValueError, match="every column"):
        page(**changes)
