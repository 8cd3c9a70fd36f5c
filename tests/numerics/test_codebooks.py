from __future__ import annotations

import pytest
import torch

from qdiff.numerics.codebooks import SortedRows, compensated_entries, nearest_entries, to_codebook


def rows_and_importance(n=6, k=200):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, k, generator=generator), torch.rand(k, generator=generator)


@pytest.mark.parametrize("weighted", [False, True])
def test_cells_are_the_sums_over_each_levels_nearest_values(weighted):
    w, importance = rows_and_importance()
    rows = SortedRows.of(w, importance if weighted else None)
    weights = (importance if weighted else torch.ones(w.shape[1])).double()
    levels = torch.tensor([[-0.9, -0.2, 0.1, 0.5]]).expand(len(w), -1)
    scaled = (w / rows.peaks[:, None]).double()
    nearest = (scaled[..., None] - levels[:, None]).abs().argmin(-1)
    member = torch.nn.functional.one_hot(nearest, 4) * weights[:, None] / weights.sum()
    expected = torch.stack([(member * scaled[..., None] ** power).sum(1) for power in range(3)])
    torch.testing.assert_close(rows.cells(levels), expected, rtol=1e-6, atol=1e-9)
    distance = (scaled - levels.gather(1, nearest)).square() @ (weights / weights.sum())
    torch.testing.assert_close(rows.error(levels), distance, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(rows.rms(), (scaled.square() @ weights / weights.sum()).sqrt())


def test_companded_levels_are_dense_where_the_cube_root_of_the_density_is():
    """Of Gaussian values: quantiles of the Gaussian whose variance is three times theirs."""
    w = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0))
    rows = SortedRows.of(w)
    shares = (torch.arange(8) + 0.5) / 8
    expected = torch.distributions.Normal(0.0, 3**0.5).icdf(shares).expand(4, -1)
    torch.testing.assert_close(rows.companded(8) * rows.peaks[:, None], expected, rtol=0, atol=0.2)


@pytest.mark.parametrize("count", [4, 8, 16])
def test_codebook_holds_the_levels_to_half_a_127th_of_the_largest(count):
    generator = torch.Generator().manual_seed(0)
    levels = torch.randn(5, count, generator=generator).sort(1).values
    peaks = torch.tensor([1e-30, 1e-3, 1.0, 7.0, 1e30])
    codebook, scale = to_codebook(levels, peaks)
    assert codebook.dtype == torch.int8
    assert codebook.shape == (5, 16)
    assert (codebook.abs().amax(1) == 127).all()
    assert torch.equal(codebook[:, count:], codebook[:, count - 1 : count].expand(-1, 16 - count))
    error = (codebook[:, :count] * scale[:, None] / peaks[:, None] - levels).abs()
    assert (error <= levels.abs().amax(1, keepdim=True) * (0.5 / 127 + 1e-6)).all()


def test_entries_are_the_nearest_and_unused_ones_are_not_named():
    w, _ = rows_and_importance()
    codebook, scale = to_codebook(torch.tensor([[-1.0, -0.3, 0.2, 1.0]]).expand(len(w), -1), torch.ones(len(w)))
    codes = nearest_entries(w, codebook[:, :4], scale)
    assert codes.dtype == torch.int8
    assert int(codes.max()) == 3
    values = codebook * scale[:, None]
    best = (w[..., None] - values[:, None]).abs().amin(-1)
    torch.testing.assert_close((w - values.gather(1, codes.long())).abs(), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("w", [torch.zeros(2, 8), torch.full((2, 8), 3e38), torch.full((2, 8), -1e-30)])
def test_rows_of_one_value_are_kept(w):
    rows = SortedRows.of(w, torch.zeros(8))  # inputs that were never seen count evenly
    codebook, scale = to_codebook(rows.companded(16), rows.peaks)
    codes = nearest_entries(w, codebook, scale)
    torch.testing.assert_close(codebook.gather(1, codes.long()) * scale[:, None], w, rtol=1e-6, atol=1e-36)


def test_compensation_is_the_nearest_point_step_by_step():
    """Against GPTQ as its paper writes it: float64, the inverse Hessian, the weights to come updated."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 12, generator=generator)
    root = torch.randn(12, 12, generator=generator)
    hessian = root @ root.T
    codebook, scale = to_codebook(torch.randn(3, 8, generator=generator).sort(1).values, torch.ones(3))
    codes = compensated_entries(w, codebook[:, :8], scale, hessian, "layer")
    values = (codebook[:, :8] * scale[:, None]).double()
    hessian = 0.8 * hessian + 0.2 * hessian.diagonal().diag()
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(12)
    left, rest = hessian.diagonal().argsort(descending=True).tolist(), w.double().clone()
    expected = torch.empty_like(codes)
    while left:
        j, inverse = left[0], torch.linalg.inv(damped[left][:, left])
        expected[:, j] = (rest[:, j, None] - values).abs().argmin(1)
        error = rest[:, j] - values.gather(1, expected[:, j, None].long())[:, 0]
        rest[:, left] -= torch.outer(error, inverse[0]) / inverse[0, 0]
        left = left[1:]
    assert torch.equal(codes, expected)


def test_compensation_with_independent_inputs_is_the_nearest():
    w, importance = rows_and_importance()
    codebook, scale = to_codebook(torch.linspace(-1, 1, 16).expand(len(w), -1), w.abs().amax(1))
    codes = compensated_entries(w, codebook, scale, importance.diag(), "layer")
    assert torch.equal(codes, nearest_entries(w, codebook, scale))


def test_singular_second_moment_is_damped_and_reported():
    w, _ = rows_and_importance(k=16)
    codebook, scale = to_codebook(torch.linspace(-1, 1, 16).expand(len(w), -1), w.abs().amax(1))
    hessian = torch.eye(16)
    hessian[0, 1] = hessian[1, 0] = 2.0  # no second moment at all
    with pytest.warns(UserWarning, match="layer: the inputs' second moment is singular; damped by 1 of"):
        compensated_entries(w, codebook, scale, hessian, "layer")
