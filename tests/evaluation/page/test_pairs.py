import pytest

from qdiff.evaluation import Record, Report
from qdiff.evaluation.page.pairs import choose_pairs, pairs_section
from qdiff.evaluation.page.sheet import Sheet


@pytest.mark.parametrize(
    ("count", "worst", "median"),
    [
        (0, [], []),
        (3, [0, 1, 2], []),
        (8, [0, 1, 2, 3], [4, 5, 6, 7]),
        (9, [0, 1, 2, 3], [4, 5, 6, 7]),
        (101, [0, 1, 2, 3], [48, 49, 50, 51]),
    ],
)
def test_the_worst_and_the_middle_ones_are_chosen(count, worst, median):
    pairs = [{"key": index, "psnr_db": float(index)} for index in reversed(range(count))]
    chosen = [[pair["key"] for pair in found] for found in choose_pairs(pairs).values()]
    assert chosen == [worst, median]


def test_identical_pictures_are_the_most_alike():
    pairs = [{"key": 0, "psnr_db": float("inf")}, {"key": 1, "psnr_db": 3.0}]
    assert [pair["key"] for pair in choose_pairs(pairs)["the least alike"]] == [1, 0]


def test_a_picture_that_is_gone_is_named_with_what_to_do(tmp_path):
    pair = {"prompt": "a", "candidate": "c", "psnr_db": 1.0, "reference_png": "r.png", "candidate_png": "gone.png"}
    report = Report("", (Record("psnr_db", 1, 1, 1, 1, {"candidate": "c"}),), pairs=(pair,))
    with pytest.raises(FileNotFoundError, match=r"gone\.png.*relative to the report's folder"):
        pairs_section(Sheet(report), tmp_path)
