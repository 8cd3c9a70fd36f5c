from __future__ import annotations

import pytest
import torch

from qdiff.calibration.bounds import ESTIMATORS, activation_bounds
from qdiff.calibration.histogram import LogScale
from qdiff.calibration.statistics import ChannelHistograms, LayerStatistics


def statistics_of(x):
    """x: [timesteps, rows, channels]"""
    scale = LogScale.around(float(x.abs().max()))
    counts = torch.stack([scale.count(rows) for rows in x])
    return LayerStatistics(torch.arange(len(x)).float(), x.abs().amax(1), ChannelHistograms(scale, counts))


@pytest.fixture
def heavy_tails():
    torch.manual_seed(0)
    growth = torch.tensor([1.0, 2.0, 5.0])[:, None, None]
    return torch.distributions.Laplace(0.0, 1.0).sample((3, 4000, 4)) * growth * torch.tensor([1.0, 1.0, 6.0, 6.0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("per_timestep", [True, False])
def test_bounds_lie_within_what_was_seen(heavy_tails, estimator, per_timestep):
    bounds = activation_bounds(statistics_of(heavy_tails), (2, 2), estimator, per_timestep)
    exact = torch.stack([heavy_tails[..., :2].abs().amax((1, 2)), heavy_tails[..., 2:].abs().amax((1, 2))], 1)
    exact = exact if per_timestep else exact.amax(0, keepdim=True)
    assert bounds.shape == exact.shape
    assert (bounds <= exact * (1 + 1e-6)).all()
    assert (bounds > 0.1 * exact).all()
    if estimator == "minmax":
        assert torch.equal(bounds, exact)


def test_mse_bound_comes_close_to_the_best_on_the_data(heavy_tails):
    bounds = activation_bounds(statistics_of(heavy_tails), (4,), "mse", True)[:, 0]

    def error(x, bound):
        step = bound / 127
        return ((x / step).round().clamp(-127, 127) * step - x).square().mean()

    for x, bound in zip(heavy_tails, bounds):
        best = min(error(x, x.abs().max() * ratio) for ratio in torch.linspace(0.1, 1, 91))
        assert error(x, bound) < 1.03 * best  # the log histogram's resolution


def test_mse_bound_gives_up_a_lone_outlier():
    torch.manual_seed(0)
    x = torch.randn(1, 4000, 4)
    x[0, 0, 0] = 30.0  # 16,000 values rounded on a grid up to 30 err by 74 squared, on one up to 27 by 60 and once by 9
    assert 6 < activation_bounds(statistics_of(x), (4,), "mse", True).item() < 29


def test_smoothing_is_applied_to_the_bounds(heavy_tails):
    smooth = torch.tensor([6.0, 6.0, 1.0, 1.0])
    for estimator in ESTIMATORS:
        later = activation_bounds(statistics_of(heavy_tails), (4,), estimator, True, smooth)
        first = activation_bounds(statistics_of(heavy_tails * smooth), (4,), estimator, True)
        torch.testing.assert_close(later, first, rtol=0.13, atol=0)  # within a bin


def test_minmax_needs_no_histograms_and_others_say_so(heavy_tails):
    bare = LayerStatistics(torch.zeros(3), heavy_tails.abs().amax(1))
    assert activation_bounds(bare, (4,), "minmax", True).shape == (3, 1)
    with pytest.raises(ValueError, match="must name 'histograms'"):
        activation_bounds(bare, (4,), "mse", True)
    with pytest.raises(ValueError, match="estimator must be one of minmax, percentile, mse: got 'entropy'"):
        activation_bounds(bare, (4,), "entropy", True)


def test_silence_has_a_bound_of_zero():
    for estimator in ESTIMATORS:
        bounds = activation_bounds(statistics_of(torch.zeros(2, 5, 4)), (2, 2), estimator, True)
        assert bounds.tolist() == [[0.0, 0.0], [0.0, 0.0]]
