import json

import pytest
from rich.console import Console

from qdiff.calibration import Calibration
from qdiff.demo import DemoSettings, run_demo
from qdiff.evaluation import Report


@pytest.fixture(scope="module")
def demo(tiny_sd, tmp_path_factory):
    """One run of the whole demo on a tiny model: (folder, report, console output)."""
    folder = tmp_path_factory.mktemp("demo")
    tiny_sd().save_pretrained(folder / "assets" / "emoji-sd")
    captions = [{"caption": f"{thing}, noto style", "name": "", "style": ""} for thing in ("cat", "house", "apple")]
    (folder / "assets" / "emoji-heldout.json").write_text(json.dumps(captions))
    console = Console(width=140, record=True, quiet=False)
    calibration = Calibration(["red apple", "green house"], steps=2)
    settings = DemoSettings(
        folder / "assets", models=("emoji-sd",), count=2, steps=3, replayed=1, calibration=calibration
    )
    report = run_demo(settings, folder / "out", console)
    return folder / "out", report, console.export_text()


def test_the_files_are_there_and_the_report_reads_back(demo):
    out, report, _ = demo
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html", "latent-error-emoji-sd.svg"}
    assert Report.from_json((out / "report.json").read_text()) == report


def test_the_table_has_a_row_for_each_variant(demo):
    _, report, text = demo
    for name in ("full precision", "naive", "w4a8"):
        assert name in text
    ratio = report.find("ratio_to_fp16", recipe="w4a8").value
    assert f"{ratio:.3f}" in text
    assert 0.2 < ratio < 0.5


def test_the_errors_are_those_of_four_bits(demo):
    _, report, _ = demo
    for recipe in ("naive", "w4a8"):
        # Random weights have no outliers: 4 bits are about 7 % of a layer's output, here through some twenty layers.
        assert 0.02 < report.find("denoiser_relative_error", recipe=recipe).value < 0.4


def test_every_step_and_picture_is_in_the_report(demo):
    _, report, _ = demo
    for recipe in ("naive", "w4a8"):
        assert len(report.series[f"emoji-sd/{recipe}/latent_error_by_step"]) == 3
        assert len(report.series[f"emoji-sd/{recipe}/denoiser_error_by_step"]) == 3
        assert len(report.series[f"emoji-sd/{recipe}/psnr_db_by_picture"]) == 2
    assert len(report.settings["captions"]["emoji-sd"]) == 2


def test_the_page_shows_every_picture(demo):
    out, _, _ = demo
    page = (out / "report.html").read_text()
    assert page.count("<img ") == 2 * 3
    assert page.count("<svg ") == 2
