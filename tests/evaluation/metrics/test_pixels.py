import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure

from qdiff.evaluation.metrics import metric


def as_arrays(pictures):
    return pictures.permute(0, 2, 3, 1).numpy()


def test_psnr_is_that_of_scikit_image(pictures, disturbed):
    rows = metric("psnr").rows(disturbed, pictures)
    expected = [peak_signal_noise_ratio(a, b) for a, b in zip(as_arrays(pictures), as_arrays(disturbed))]
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[pytest.approx(value, rel=1e-6)] for value in expected]


def test_ssim_is_that_of_scikit_image(pictures, disturbed):
    rows = metric("ssim").rows(disturbed, pictures)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    pairs = zip(as_arrays(pictures), as_arrays(disturbed))
    expected = [structural_similarity(a, b, data_range=255, **settings) for a, b in pairs]
    assert rows[:, 0].tolist() == pytest.approx(expected, rel=1e-6)  # rows are float32


def test_ms_ssim_is_that_of_torchmetrics(large):
    reference, candidate = large
    rows = metric("ms_ssim").rows(candidate, reference)
    oracle = MultiScaleStructuralSimilarityIndexMeasure(data_range=255.0)
    for row, a, b in zip(rows, candidate.float(), reference.float()):
        assert row.item() == pytest.approx(oracle(a[None], b[None]).item(), rel=1e-4)
        oracle.reset()


@pytest.fixture(scope="module")
def large():
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randint(0, 256, (2, 3, 21, 21), dtype=torch.uint8, generator=generator)
    reference = torch.nn.functional.interpolate(pictures.float(), size=(176, 184), mode="bilinear").to(torch.uint8)
    noise = torch.randint(0, 40, reference.shape, generator=generator)
    return reference, (reference + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_a_row_does_not_depend_on_the_batch(name, pictures, disturbed):
    together = metric(name).rows(disturbed, pictures)
    alone = metric(name).rows(disturbed[3:4], pictures[3:4])
    torch.testing.assert_close(together[3:4], alone)


def test_the_record_is_the_mean_with_its_provenance():
    rows = np.array([[20.0], [24.0], [28.0]], dtype=np.float32)
    [record] = metric("psnr").reduce(rows, tags={"candidate": "a"})
    assert (record.name, record.value, record.n, record.tags) == ("psnr_db", 24.0, 3, {"candidate": "a"})
    assert record.low < 24 < record.high
    assert record.provenance["package"].startswith("torchmetrics ")


def test_identical_pictures_are_counted_and_not_averaged(pictures):
    rows = metric("psnr").rows(pictures[:3], pictures[:3]).numpy()
    rows[0] = 30
    mean, identical = metric("psnr").reduce(rows)
    assert (mean.value, mean.n) == (30, 1)
    assert (identical.name, identical.value, identical.n) == ("psnr_db_identical", 2, 3)
    [mean, identical] = metric("psnr").reduce(rows[1:])
    assert mean.value == math.inf


def test_rows_that_are_no_numbers_are_left_out_aloud():
    rows = np.array([[0.5], [math.nan], [0.7]], dtype=np.float32)
    with pytest.warns(UserWarning, match=r"1 of 3 candidate pictures .* \(rows 1\)"):
        mean, left_out = metric("ssim").reduce(rows)
    assert mean.value == pytest.approx(0.6)
    assert (left_out.name, left_out.value, left_out.n) == ("ssim_left_out", 1, 3)
    with pytest.raises(ValueError, match="no finite figure among 1"):
        metric("ssim").reduce(rows[1:2])


@pytest.mark.parametrize(
    ("name", "candidate", "reference", "message"),
    [
        pytest.param("psnr", torch.zeros(1, 3, 8, 8), None, "candidate must be uint8", id="floats"),
        pytest.param("psnr", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, "reference must be given", id="alone"),
        pytest.param(
            "psnr",
            torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
            torch.zeros(1, 3, 8, 9, dtype=torch.uint8),
            r"\(1, 3, 8, 8\): got \(1, 3, 8, 9\)",
            id="sizes-differ",
        ),
        pytest.param("ssim", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, "11 pixels a side", id="small-ssim"),
        pytest.param(
            "ms_ssim", torch.zeros(1, 3, 175, 175, dtype=torch.uint8), None, "176 pixels a side", id="small-ms-ssim"
        ),
    ],
)
def test_bad_pictures_are_refused(name, candidate, reference, message):
    with pytest.raises(ValueError, match=message):
        metric(name).rows(candidate, reference)
