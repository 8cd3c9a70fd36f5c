from __future__ import annotations

import torch

from qdiff.calibration.histogram import BINS, LogScale, tensor_histogram


def one_row(x, factor=None, weight=None):
    scale = LogScale.around(float(x.abs().max()))
    ones = torch.ones(x.shape[1])
    absmax = x.abs().amax(0)[None]
    return tensor_histogram(
        scale.count(x)[None], scale, absmax, ones if factor is None else factor, ones if weight is None else weight
    )


def test_counts_lose_nothing_and_survive_zeros_and_outliers():
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    x[0] = torch.tensor([0.0, 1e9, 1e-30])
    counts = LogScale.around(4.0).count(x)
    assert counts.shape == (3, BINS)
    assert counts.sum(1).tolist() == [500, 500, 500]


def test_percentiles_match_torch_within_a_bin():
    x = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0))
    histogram = one_row(x)
    for q in (0.5, 0.9, 0.99, 0.999):
        exact = x.abs().flatten()[:: len(x.flatten()) // 80000].quantile(q)
        # The middle of a quarter octave is at most an eighth away: 2^(1/8) = 1.09; with half a fine bin, 1.12.
        assert 1 / 1.12 < histogram.percentile(q).item() / exact.item() < 1.12


def test_rescaling_channels_later_is_rescaling_the_data():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 30.0, 0.1])
    factor = torch.tensor([3.0, 0.05, 11.0])
    later, first = one_row(x, factor), one_row(x * factor)
    assert torch.equal(later.absmax, first.absmax)
    for q in (0.5, 0.99):
        assert 1 / 1.2 < later.percentile(q).item() / first.percentile(q).item() < 1.2  # two bins' middles


def test_percentile_is_at_most_the_exact_absmax():
    x = torch.tensor([[1.0], [1.05]])
    assert one_row(x).percentile(1.0).item() <= 1.05 + 1e-6


def test_squared_error_matches_quantized_data():
    x = torch.distributions.Laplace(0.0, 1.0)
    torch.manual_seed(0)
    x = x.sample((50000, 2))
    histogram = one_row(x)
    bounds = torch.tensor([[2.0, 4.0, 8.0, float(x.abs().max())]])
    expected = histogram.squared_error(bounds, 127)[0]
    for bound, error in zip(bounds[0], expected):
        step = bound / 127
        exact = ((x / step).round().clamp(-127, 127) * step - x).square().sum()
        # Clipping errors (x - bound)^2 of values known to +-9 % are the coarse part.
        assert 0.7 < error / exact < 1.4


def test_channel_weights_count_a_channel_more_often():
    x = torch.cat([torch.full((100, 1), 1.0), torch.full((100, 1), 8.0)], 1)
    assert one_row(x, weight=torch.tensor([1.0, 0.0])).percentile(0.99).item() < 1.2
    assert one_row(x, weight=torch.tensor([1.0, 1.0])).percentile(0.99).item() > 6.5


def test_all_zero_input_has_no_range():
    histogram = one_row(torch.zeros(10, 2))
    assert histogram.absmax.tolist() == [0.0]
    assert histogram.percentile(0.99).tolist() == [0.0]
    assert torch.isfinite(histogram.squared_error(torch.zeros(1, 3), 127)).all()
