import pytest
import torch

from qdiff.evaluation.metrics import metric

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_pixel_metrics_are_the_same_on_a_gpu(name, pictures, disturbed):
    here, there = (metric(name, device=device).rows(disturbed, pictures) for device in ("cpu", "cuda"))
    torch.testing.assert_close(there, here, rtol=1e-6, atol=0)  # float64 on both


@pytest.mark.parametrize("name", ["fd-efficientnet-lite0", "fd-inception-random", "inception-score-random"])
def test_features_are_nearly_the_same_on_a_gpu(name, pictures, weights):
    here, there = (metric(name, weights, device).rows(pictures[:4]) for device in ("cpu", "cuda"))
    # Convolutions in TF32, torch's default there, keep ten bits.
    assert (there - here).norm() < 5e-3 * here.norm()
    assert there.device.type == "cpu"
