import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff.numerics.ranges import histogram_percentile_bound, minmax_bound, mse_bound, percentile_bound

samples = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60).map(torch.tensor)


@given(samples)
def test_minmax_covers_everything_and_is_reached(x):
    assert float(minmax_bound(x)) == max(abs(value) for value in x.tolist())


@given(samples, st.integers(1, 1000).map(lambda i: i / 10))
def test_percentile_is_the_smallest_magnitude_that_covers_the_share(x, percent):
    bound = percentile_bound(x, percent)
    magnitudes = x.abs().double()
    assert bound in magnitudes
    needed = percent * 10  # in thousandths, exact integers
    assert int((magnitudes <= bound).sum()) * 1000 >= round(needed) * len(x)
    assert int((magnitudes < bound).sum()) * 1000 < round(needed) * len(x)


def test_an_exact_share_is_not_rounded_up():
    assert percentile_bound(torch.arange(1, 1001.0), 99.9) == 999


def test_histogram_agrees_with_samples_to_one_bin():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).abs()
    edges = torch.linspace(0, 6, 601)
    counts = torch.histogram(x, edges).hist
    for percent in (50.0, 99.0, 99.9, 100.0):
        from_samples, from_counts = percentile_bound(x, percent), histogram_percentile_bound(counts, edges, percent)
        assert 0 <= from_counts - from_samples <= 0.01 + 1e-6  # a bin's width


def test_histogram_counts_beyond_float32():
    counts = torch.tensor([2**25, 1], dtype=torch.int64)
    edges = torch.tensor([0.0, 1.0, 2.0])
    assert histogram_percentile_bound(counts, edges, 100.0) == 2
    assert histogram_percentile_bound(counts, edges, 99.0) == 1


def test_histogram_rows_without_counts_give_zero():
    counts, edges = torch.tensor([[0, 0], [0, 4]]), torch.tensor([0.0, 1.0, 2.0])
    assert histogram_percentile_bound(counts, edges, 99.0).tolist() == [0, 2]


def test_mse_bound_beats_minmax_with_an_outlier_and_is_near_the_best_of_a_finer_search():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    x[0] = 30.0

    def error(bound):
        step = float(bound) / 127
        return float(((x / step).round().clamp(-127, 127) * step - x).square().mean())

    finest = min(error(30 * share / 1000) for share in range(40, 1001))
    assert error(mse_bound(x)) <= 1.03 * finest  # a hundredth of the range is the search's spacing
    y = x.clamp(-4, 4) + torch.where(x > 29, 20.0, 0.0)
    assert float(mse_bound(y.repeat(50))) <= float(minmax_bound(y))


def test_mse_bound_clips_when_clipping_pays():
    x = torch.cat([torch.randn(200_000, generator=torch.Generator().manual_seed(0)), torch.tensor([8.0])])
    assert 3.5 < float(mse_bound(x)) < 7.9


@pytest.mark.parametrize("bound", [minmax_bound, mse_bound, lambda x: percentile_bound(x, 99)])
def test_zeros_constants_and_no_values(bound):
    assert bound(torch.zeros(5)) == 0
    assert bound(torch.zeros(0)) == 0
    assert float(bound(torch.full((5,), -2.0))) == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("percent", [0, -1, 100.1, float("nan")])
def test_percent_must_be_a_percentage(percent):
    with pytest.raises(ValueError, match="percent"):
        percentile_bound(torch.ones(3), percent)
    with pytest.raises(ValueError, match="percent"):
        histogram_percentile_bound(torch.ones(3), torch.arange(4), percent)


def test_histogram_needs_its_edges():
    with pytest.raises(ValueError, match="edges"):
        histogram_percentile_bound(torch.ones(3), torch.arange(3), 50)
