import math

import pytest
import torch

from qdiff.evaluation import paired_quality


def pictures(count=3, side=16, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_the_textbook_formula_of_each_picture():
    reference, candidate = pictures(), pictures(seed=1)
    expected = [-10 * math.log10((a - b).double().square().mean()) for a, b in zip(reference, candidate)]
    # float32 sums of 768 squares: 1e-4 dB is a hundred times their rounding.
    assert paired_quality(reference, candidate).psnr.tolist() == pytest.approx(expected, abs=1e-4)


def test_ssim_of_constant_pictures_is_the_luminance_term():
    reference, candidate = torch.full((1, 3, 16, 16), 0.4), torch.full((1, 3, 16, 16), 0.6)
    c1 = 0.01**2
    expected = (2 * 0.4 * 0.6 + c1) / (0.4**2 + 0.6**2 + c1)
    # The variance term is a difference of float32 squares near 0.3 over c2 = 9e-4: 1e-3 covers its rounding.
    assert paired_quality(reference, candidate).ssim.item() == pytest.approx(expected, abs=1e-3)


def test_identical_pictures_are_perfect():
    quality = paired_quality(pictures(), pictures())
    assert torch.isinf(quality.psnr).all()
    torch.testing.assert_close(quality.ssim, torch.ones(3), atol=1e-5, rtol=0)


def test_each_picture_is_measured_alone():
    reference, candidate = pictures(4), pictures(4, seed=1)
    together = paired_quality(reference, candidate)
    alone = paired_quality(reference[2:3], candidate[2:3])
    torch.testing.assert_close(together.psnr[2:3], alone.psnr)
    torch.testing.assert_close(together.ssim[2:3], alone.ssim)


def test_more_noise_is_worse():
    reference = pictures() * 0.5 + 0.25
    noise = pictures(seed=2) - 0.5
    little, much = (paired_quality(reference, reference + amount * noise) for amount in (0.05, 0.4))
    assert (little.psnr > much.psnr).all()
    assert (little.ssim > much.ssim).all()


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        pytest.param(pictures(), pictures(2), "shape of reference", id="shapes-differ"),
        pytest.param(pictures()[0], pictures(), "reference must be", id="no-batch"),
        pytest.param(pictures(side=10), pictures(side=10), "11 pixels", id="too-small"),
        pytest.param(pictures(0), pictures(0), "one picture or more", id="empty"),
        pytest.param(pictures(), pictures() * 2, "candidate must be finite and in", id="out-of-range"),
        pytest.param(pictures(), pictures() * math.nan, "candidate must be finite", id="nan"),
        pytest.param(pictures(), (pictures() * 255).to(torch.uint8), "divide by 255", id="integers"),
    ],
)
def test_bad_pictures_are_refused(reference, candidate, message):
    with pytest.raises(ValueError, match=message):
        paired_quality(reference, candidate)
