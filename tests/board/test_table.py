import pytest
from board.table import MARKER, into_readme, markdown, plot, report_of

from qdiff.evaluation import Report


def line(recipe, seed, psnr, error, *, baseline=None, section="rounding", model="emoji-sd"):
    figures = {"ratio_to_fp16": 0.3, "ssim": 0.9}
    tags = {"model": model, "recipe": recipe, "section": section, "baseline": baseline, "seed": seed}
    return {**tags, **figures, "psnr_db": psnr, "denoiser_relative_error": error}


BASE = [line("nearest", seed, psnr, 0.10) for seed, psnr in enumerate((20.0, 21.0, 25.0))]


def test_a_figure_is_the_median_over_the_seeds_with_its_ends():
    record = report_of(BASE, {}).find("psnr_db", recipe="nearest")
    assert (record.value, record.low, record.high, record.n) == (21.0, 20.0, 25.0, 3)


def test_what_a_row_gains_is_compared_seed_by_seed():
    # Medians: 22 and 21. Seed by seed, the gains are 4, 1 and -3: their median is 1 and their least -3.
    better = [line("gptq", seed, psnr, 0.05, baseline="nearest") for seed, psnr in enumerate((24.0, 22.0, 22.0))]
    report = report_of([*BASE, *better], {})
    gain = report.find("psnr_over_baseline_db", recipe="gptq")
    assert (gain.value, gain.low, gain.high) == (1.0, -3.0, 4.0)
    assert report.find("error_over_baseline", recipe="gptq").value == pytest.approx(0.5)
    assert "| gptq | nearest | +1.00 dB, error x 0.50 |" in markdown(report)


def test_a_method_that_is_no_better_is_said_to_be_none():
    worse = [line("lq", seed, 20.0, 0.12, baseline="nearest") for seed in range(3)]
    assert "-1.00 dB, error x 1.20: here it is not better" in markdown(report_of([*BASE, *worse], {}))


def test_only_seeds_that_both_have_are_compared():
    report = report_of([*BASE, line("gptq", 1, 23.0, 0.05, baseline="nearest")], {})
    assert report.find("psnr_over_baseline_db", recipe="gptq").n == 1


def test_a_row_that_failed_says_why_and_the_report_survives_json():
    failed = {"model": "emoji-dit", "recipe": "quanto", "section": "peers", "baseline": None, "seed": 0}
    report = report_of([*BASE, failed | {"failed": "ImportError: no quanto"}], {"pictures": 2})
    assert "quanto (emoji-dit): ImportError: no quanto" in markdown(report)
    assert Report.from_json(report.to_json()) == report


def test_presets_and_peers_have_a_line_of_figures_for_each_model():
    lines = [line("w4a8", 0, 27.0, 0.09, section="presets", model=model) for model in ("emoji-sd", "emoji-dit")]
    lines.append(line("SDNQ int4", 0, 23.0, 0.12, section="peers"))
    text = markdown(report_of(lines, {"order": ["w4a8", "SDNQ int4"]}))
    assert "| **w4a8** | 0.300 | 9.00 % | 27.0 | 0.900 | 0.300 | 9.00 % | 27.0 | 0.900 |" in text
    assert "| SDNQ int4 | 0.300 | 12.00 % | 23.0 | 0.900 |  | | |  |" in text


def test_the_plot_names_presets_and_peers_and_leaves_ablations_out():
    lines = [line("w4a8", 0, 27.0, 0.09, section="presets"), line("SDNQ int4", 0, 23.0, 0.12, section="peers")]
    svg = plot(report_of([*lines, *BASE], {}), "emoji-sd")
    assert "w4a8" in svg
    assert "SDNQ int4" in svg
    assert "nearest" not in svg


def test_the_readme_keeps_everything_around_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{MARKER}\nold\n{MARKER}\nafter\n")
    into_readme(readme, "| new |")
    into_readme(readme, "| new |")
    assert readme.read_text() == f"before\n{MARKER}\n| new |\n{MARKER}\nafter\n"


def test_a_readme_without_both_markers_is_left_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{MARKER}\n")
    with pytest.raises(ValueError, match="twice, around the tables: found 1"):
        into_readme(readme, "| new |")
    assert readme.read_text() == f"before\n{MARKER}\n"


def test_the_default_is_compared_with_the_peer_of_its_size():
    lines = [
        line("w4a8", 0, 27.0, 0.06, section="presets", baseline="SDNQ int4"),
        line("SDNQ int4", 0, 23.0, 0.12, section="peers"),
    ]
    text = markdown(report_of(lines, {}))
    assert "w4a8 against SDNQ int4 on emoji-sd: +4.00 dB, error x 0.50 (+4.00 to +4.00 over 1 seeds)." in text
