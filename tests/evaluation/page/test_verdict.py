import pytest

from qdiff.evaluation import Record, Report
from qdiff.evaluation.page.rules import RULES, Outcome
from qdiff.evaluation.page.sheet import Sheet
from qdiff.evaluation.page.verdict import judge

GOOD = {
    "psnr_db": (30.0, 29.0, 31.0, 200),
    "lpips_alex": (0.05, 0.04, 0.06, 200),
    "psnr_db_group_gap": (4.0, 3.5, 4.5, 200),
    "psnr_db_group_p_value": (0.5, 0.5, 0.5, 200),
    "psnr_db_worst_group": (28.0, 27.0, 29.0, 50),
    "clip_score": (30.0, 29.0, 31.0, 200),
    "stored_bytes": (3e6, 3e6, 3e6, 1),
    "pictures_black": (0.0, 0.0, 0.0, 200),
    "pictures_nan": (0.0, 0.0, 0.0, 200),
}
REFERENCE = {"clip_score": (31.0, 30.5, 31.5, 200), "stored_bytes": (1e7, 1e7, 1e7, 1)}


def verdict(**changes):
    """The verdict on a good candidate with some records changed, or left out where None."""
    figures = {name: figure for name, figure in (GOOD | changes).items() if figure is not None}
    tagged = [("reference", REFERENCE), ("w4a8", figures)]
    records = [Record(name, *figure, {"candidate": who}) for who, found in tagged for name, figure in found.items()]
    return judge(Sheet(Report("", tuple(records))), "w4a8")


def test_what_meets_every_rule_is_shipped():
    found = verdict()
    assert (found.outcome, found.missing) == (Outcome.SHIP, [])
    assert found.reason == f"The {len(RULES)} rules that could be checked are met."


@pytest.mark.parametrize(
    ("changes", "outcome", "words"),
    [
        ({"pictures_black": (1.0, 1.0, 1.0, 200)}, Outcome.STOP, "1 black"),
        ({"pictures_nan": (2.0, 2.0, 2.0, 200)}, Outcome.STOP, "2 NaN"),
        ({"psnr_db": (14.0, 13.0, 14.9, 200)}, Outcome.STOP, "beyond the limit of 15"),
        ({"psnr_db": (15.0, 14.0, 15.1, 200)}, Outcome.LOOK, "not all of the interval reaches 25"),
        ({"psnr_db": (26.0, 24.9, 27.0, 200)}, Outcome.LOOK, "PSNR 26.0 dB (24.9 to 27.0)"),
        ({"lpips_alex": (0.5, 0.41, 0.6, 200)}, Outcome.STOP, "LPIPS (alex) 0.500"),
        ({"lpips_alex": (0.09, 0.08, 0.11, 200)}, Outcome.LOOK, "reaches 0.1"),
        ({"psnr_db_group_p_value": (0.001, 0.001, 0.001, 200)}, Outcome.LOOK, "p = 0.001"),
        ({"psnr_db_worst_group": (14.0, 13.0, 14.5, 50)}, Outcome.STOP, "worst group 14.0 dB"),
        # One picture is no evidence against others.
        ({"psnr_db_worst_group": (14.0, 14.0, 14.0, 1)}, Outcome.SHIP, "rules that could be checked are met"),
        ({"psnr_db": (14.0, 14.0, 14.0, 1), "lpips_alex": None}, Outcome.LOOK, "Only 1 picture: "),
        ({"clip_score": (30.0, 29.6, 30.4, 200)}, Outcome.LOOK, "below the reference's 30.50"),
        ({"stored_bytes": (1.1e7, 1.1e7, 1.1e7, 1)}, Outcome.LOOK, "110 % of the denoiser's bytes"),
        (
            {"psnr_db": (30.0, 29.0, 31.0, 64), "lpips_alex": None},
            Outcome.LOOK,
            "Only 64 pictures: a fault in fewer than 1 of 21",
        ),
        ({"psnr_db": None, "lpips_alex": None}, Outcome.LOOK, "No picture was compared"),
    ],
)
def test_each_rule_is_applied_and_says_why(changes, outcome, words):
    found = verdict(**changes)
    assert found.outcome == outcome
    assert words in found.reason


def test_a_gap_that_chance_explains_is_no_reason():
    assert verdict(psnr_db_group_gap=(20.0, 18.0, 22.0, 200)).outcome == Outcome.SHIP


def test_what_was_not_measured_is_said_and_not_counted_as_met():
    found = verdict(lpips_alex=None, psnr_db_group_p_value=None, clip_score=None)
    assert found.missing == ["LPIPS", "Groups", "Prompt"]
    assert found.reason.startswith(f"The {len(RULES) - 3} rules")
