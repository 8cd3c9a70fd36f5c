import pytest

from qdiff.evaluation.metrics import METRICS, metric, metrics_of
from qdiff.evaluation.metrics.registry import register


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown metric 'pnsr': use one of psnr"):
        metric("pnsr")


def test_metrics_come_in_order_and_once():
    assert [found.name for found in metrics_of(["ssim", "psnr"])] == ["ssim", "psnr"]
    with pytest.raises(ValueError, match="psnr more than once"):
        metrics_of(["psnr", "ssim", "psnr"])


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'psnr' is taken"):
        register("psnr")(lambda weights, device: None)


@pytest.mark.parametrize("name", ["psnr", "ssim", "ms_ssim", "fd-efficientnet-lite0", "kd-efficientnet-lite0"])
def test_a_metric_is_called_what_it_was_asked_for_by(name):
    assert name in METRICS
    assert metric(name).name == name
