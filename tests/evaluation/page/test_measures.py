import math

import pytest

from qdiff.evaluation.page.measures import FAILURES, GROUPS, OTHER, measure_of, order_of


@pytest.mark.parametrize(
    ("name", "value", "label", "arrow", "written"),
    [
        ("psnr_db", 27.853, "PSNR, dB", "↑", "27.9"),
        ("psnr_db", math.inf, "PSNR, dB", "↑", "∞"),
        ("lpips_alex", 0.0712, "LPIPS (alex)", "↓", "0.071"),
        ("fid", 12.345, "FID", "↓", "12.35"),
        ("fd_inception_random", 0.01234, "Fréchet distance (inception random)", "↓", "0.0123"),
        ("psnr_db_worst_group", 20.0, "PSNR: worst group, dB", "↑", "20.0"),
        ("lpips_alex_group_gap", 0.2, "LPIPS (alex): gap between groups", "↓", "0.200"),
        ("psnr_db_group_p_value", 0.0002, "PSNR: p-value that all groups lose alike", "", "< 0.001"),
        ("clip_score_left_out", 3.0, "CLIP score: pictures without a figure", "↓", "3"),
        ("stored_bytes", 7.5e6, "Stored for the denoiser", "↓", "7.50 MB"),
        ("seconds_per_image", 0.0123, "Time an image", "↓", "12.3 ms"),
        ("seconds_per_image", 412.0, "Time an image", "↓", "412 s"),
        ("latent_relative_error", 0.0815, "Relative error of the last latents", "↓", "8.15 %"),
        ("something_new", 1234.5, "something new", "", "1234"),
        ("scratch_bytes", 2e9, "scratch bytes", "", "2.00 GB"),
    ],
)
def test_a_name_says_what_it_is_which_way_is_better_and_how_it_is_written(name, value, label, arrow, written):
    measure = measure_of(name)
    assert (measure.label, measure.arrow, measure.write(value)) == (label, arrow, written)


def test_families():
    assert measure_of("psnr_db_group_gap").family == GROUPS
    assert measure_of("ssim_left_out").family == FAILURES
    assert measure_of("something").family == OTHER


def test_the_page_begins_with_likeness_and_ends_with_what_is_not_known():
    names = ["something", "pictures_nan", "seconds_per_image", "fid", "ssim", "psnr_db", "psnr_db_group_gap"]
    assert sorted(names, key=order_of) == [
        *("psnr_db", "ssim", "fid", "psnr_db_group_gap", "seconds_per_image", "pictures_nan", "something"),
    ]
