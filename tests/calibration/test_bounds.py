from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from qdiff.calibration.bounds import CLIP_RATIOS, ESTIMATORS, KL_BINS, Estimator
from qdiff.calibration.histogram import LogScale, rows_histogram
from qdiff.calibration.statistics import ChannelHistograms, LayerStatistics

LEVELS = (127, 31, 15, 7)  # of 8, 6, 5 and 4 bits


def statistics_of(x):
    """x: [timesteps, rows, channels]"""
    scale = LogScale.around(float(x.abs().max()))
    counts = torch.stack([scale.count(rows) for rows in x])
    return LayerStatistics(torch.arange(len(x)).float(), x.abs().amax(1), ChannelHistograms(scale, counts))


def from_channels(x, per_timestep=True):
    return statistics_of(x).histogram(per_timestep=per_timestep)


def from_rows(x, per_timestep=True):
    steps, rows, channels = x.shape
    of_row = torch.arange(steps).repeat_interleave(rows) * per_timestep
    return rows_histogram(x.flatten(0, 1), of_row, steps if per_timestep else 1, torch.ones(channels))


@pytest.fixture(params=[from_channels, from_rows])
def histogram_of(request):
    return request.param


@pytest.fixture
def heavy_tails():
    torch.manual_seed(0)
    growth = torch.tensor([1.0, 2.0, 5.0])[:, None, None]
    return torch.distributions.Laplace(0.0, 1.0).sample((3, 4000, 4)) * growth


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("per_timestep", [True, False])
def test_bounds_lie_within_what_was_seen(heavy_tails, histogram_of, estimator, per_timestep):
    bounds = Estimator(estimator).bound(histogram_of(heavy_tails, per_timestep), 127)
    exact = heavy_tails.abs().amax((1, 2))
    exact = exact if per_timestep else exact.amax(0, keepdim=True)
    assert bounds.shape == exact.shape
    assert (bounds <= exact * (1 + 1e-6)).all()
    assert (bounds > 0.1 * exact).all()
    if estimator == "minmax":
        assert torch.equal(bounds, exact)


@pytest.mark.parametrize("levels", LEVELS)
def test_mse_bound_comes_close_to_the_best_on_the_data(heavy_tails, histogram_of, levels):
    def error(x, bound):
        step = bound / levels
        return ((x / step).round().clamp(-levels, levels) * step - x).square().mean()

    for x, bound in zip(heavy_tails, Estimator("mse").bound(histogram_of(heavy_tails), levels)):
        best = min(error(x, x.abs().max() * ratio) for ratio in torch.linspace(0.1, 1, 91))
        assert error(x, bound) < 1.02 * best  # the log histogram's resolution


def test_mse_bound_gives_up_a_lone_outlier():
    torch.manual_seed(0)
    x = torch.randn(1, 4000, 4)
    x[0, 0, 0] = 30.0  # 16,000 values rounded on a grid up to 30 err by 74 squared, on one up to 27 by 60 and once by 9
    assert 6 < Estimator("mse").bound(from_channels(x), 127).item() < 29


def test_ksigma_is_so_many_standard_deviations(heavy_tails, histogram_of):
    for k in (1.0, 3.0):
        bounds = Estimator("ksigma", k=k).bound(histogram_of(heavy_tails), 127)
        torch.testing.assert_close(bounds, k * heavy_tails.std((1, 2)), rtol=0.01, atol=0)
    capped = Estimator("ksigma", k=1e6).bound(histogram_of(heavy_tails), 127)
    assert torch.equal(capped, heavy_tails.abs().amax((1, 2)))


def tensorrt_divergence(histogram, kept, values):
    """The published procedure, step by step, in float64; scipy takes the divergence."""
    p = histogram[:kept].copy()
    p[-1] += histogram[kept:].sum()
    q = np.zeros(kept)
    for value in range(values):
        bins = [i for i in range(kept) if i * values // kept == value]
        filled = [i for i in bins if histogram[i] > 0]
        q[filled] = histogram[bins].sum() / max(1, len(filled))
    return entropy(p, np.maximum(q, 1e-30 * (p > 0)))


@pytest.mark.parametrize("levels", [127, 7])
def test_kl_bound_has_the_least_divergence(levels):
    torch.manual_seed(0)
    x = torch.distributions.Laplace(0.0, 1.0).sample((1, 4000, 4))
    histogram = from_channels(x)
    p = histogram.density(KL_BINS)[0].double().numpy()
    divergences = [tensorrt_divergence(p, max(levels + 1, round(r * KL_BINS)), levels + 1) for r in CLIP_RATIOS[::3]]
    bound = Estimator("kl").bound(histogram, levels).item() / histogram.absmax.item()
    at_bound = tensorrt_divergence(p, max(levels + 1, round(bound * KL_BINS)), levels + 1)
    assert at_bound <= min(divergences) + 1e-6  # float32 sums
    assert levels == 127 or 0.3 < bound < 0.9  # few levels are worth clipping for


def test_the_density_is_that_of_numpys_histogram(heavy_tails, histogram_of):
    x = heavy_tails[0]
    ours = histogram_of(heavy_tails).density(32)[0].numpy()
    exact = np.histogram(x.abs().numpy(), 32, (0, float(x.abs().max())))[0]
    assert ours.sum() == pytest.approx(exact.sum(), rel=1e-5)
    assert np.abs(ours - exact).sum() < 0.1 * exact.sum()  # quarter octaves at the steep end of a Laplace


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_smoothing_is_applied_to_the_bounds(heavy_tails, estimator):
    x = heavy_tails * torch.tensor([1.0, 1.0, 6.0, 6.0])
    smooth = torch.tensor([6.0, 6.0, 1.0, 1.0])
    later = Estimator(estimator).bound(statistics_of(x).histogram(smooth=smooth), 7)
    first = Estimator(estimator).bound(from_channels(x * smooth), 7)
    torch.testing.assert_close(later, first, rtol=0.13, atol=0)  # within a bin


def test_a_timestep_without_samples_takes_its_neighbours_range():
    x = torch.tensor([[1.0, -2.0], [8.0, 3.0]])
    histogram = rows_histogram(x, torch.tensor([0, 3]), 5, torch.ones(2))
    assert histogram.absmax.tolist() == [2, 2, 8, 8, 8]
    assert histogram.weights.sum(1).tolist() == [2] * 5


def test_histograms_that_were_not_asked_for():
    with pytest.raises(ValueError, match="must name 'histograms'"):
        LayerStatistics(torch.zeros(3), torch.ones(3, 4)).histogram()


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (Estimator("entropy"), "static.estimator must be one of minmax, percentile, mse, ksigma, kl: got 'entropy'"),
        (Estimator("percentile", 99.9), r"static.percentile must be a fraction in \(0, 1\]: got 99.9"),
        (Estimator("ksigma", k=0.0), "static.k must be a positive number of standard deviations: got 0.0"),
    ],
)
def test_options_are_checked(estimator, message):
    with pytest.raises(ValueError, match=message):
        estimator.check("static")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_silence_has_a_bound_of_zero(histogram_of, estimator):
    assert Estimator(estimator).bound(histogram_of(torch.zeros(2, 5, 4)), 127).tolist() == [0.0, 0.0]
