import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff.numerics.two_level import (
    TwoLevelWeight,
    dequantize_two_level,
    fit_channel,
    fit_tensor,
    fit_two_level,
    round_two_level,
)

GROUP = 64


def gaussian(rows=48, k=2304):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(0))


def laplace(rows=48, k=2304):
    u = torch.rand(rows, k, generator=torch.Generator().manual_seed(0), dtype=torch.double) - 0.5
    return (-u.sign() * (1 - 2 * u.abs()).log()).float()


def squared_error(w, scale, multipliers, group_size, importance=None):
    """In float64, from the definition and not through `dequantize_two_level`."""
    step = (scale.double()[:, None] * multipliers.double()).repeat_interleave(group_size, 1)
    q = (w.double() / step).round().clamp(-8, 7)
    weight = 1.0 if importance is None else importance.double()
    return float(((q * step - w.double()).square() * weight).sum())


def free_scale_error(w, group_size, importance=None):
    """The least error with a free float64 scale for every group, over 131 clip ratios: finer than the code's own."""
    groups = w.double().unflatten(1, (-1, group_size))
    weight = torch.ones_like(groups[:1]) if importance is None else importance.double().view(1, -1, group_size)
    least = torch.full(groups.shape[:2], torch.inf, dtype=torch.double)
    for share in torch.linspace(0.4, 1.05, 131, dtype=torch.double):
        step = groups.abs().amax(-1, keepdim=True) / 7 * share
        error = ((groups / step).round().clamp(-8, 7) * step - groups).square() * weight
        least = torch.minimum(least, error.sum(-1))
    return float(least.sum())


@pytest.mark.parametrize("make", [gaussian, laplace], ids=["gaussian", "laplace"])
def test_within_three_percent_of_free_group_scales(make):
    """In root mean square; 1.5 % is measured."""
    w = make()
    ratio = squared_error(w, *fit_two_level(w, GROUP), GROUP) / free_scale_error(w, GROUP)
    assert ratio**0.5 <= 1.03


def test_within_three_percent_when_inputs_differ_in_importance():
    w, importance = gaussian(), torch.rand(2304, generator=torch.Generator().manual_seed(1)) ** 4
    scale, multipliers = fit_two_level(w, GROUP, importance)
    ratio = squared_error(w, scale, multipliers, GROUP, importance) / free_scale_error(w, GROUP, importance)
    assert ratio**0.5 <= 1.03
    unweighted = squared_error(w, *fit_two_level(w, GROUP), GROUP, importance)
    assert squared_error(w, scale, multipliers, GROUP, importance) < 0.97 * unweighted


@pytest.mark.parametrize("make", [gaussian, laplace], ids=["gaussian", "laplace"])
def test_a_quick_fit_is_near_the_full_one(make):
    """0.6 % of the squared error is measured."""
    w = make()
    quick = squared_error(w, *fit_two_level(w, GROUP, quick=True), GROUP)
    assert quick <= 1.015 * squared_error(w, *fit_two_level(w, GROUP), GROUP)


def test_search_beats_min_max_and_one_scale_a_channel():
    w = laplace()
    searched = squared_error(w, *fit_two_level(w, GROUP), GROUP)
    assert searched < 0.8 * squared_error(w, *fit_two_level(w, GROUP, search=False), GROUP)
    channel = dequantize_two_level(fit_channel(w, 4))
    assert searched < 0.8 * float((channel.double() - w.double()).square().sum())


def test_min_max_clips_nothing():
    w = laplace()
    scale, multipliers = fit_two_level(w, GROUP, search=False)
    step = (scale[:, None] * multipliers).repeat_interleave(GROUP, 1)
    assert (w.abs() <= step * 7 * (1 + 1e-6)).all()  # 1e-6: float32 rounding of the two factors


def test_an_outlier_group_does_not_silence_the_others():
    """One group 1e4 times the rest: multipliers end at 15, so the row must choose, and chooses that group."""
    w = gaussian(4, 256)
    w[:, :64] *= 1e4
    error = squared_error(w, *fit_two_level(w, GROUP), GROUP)
    assert error < 0.02 * float(w.double().square().sum())


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e4, 1e18])
def test_the_fit_scales_with_the_weights(magnitude):
    w = gaussian(3, 128) * magnitude
    scale, multipliers = fit_two_level(w, GROUP)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    relative = squared_error(w, scale, multipliers, GROUP) / float(w.double().square().sum())
    assert relative < 0.012  # (0.095)^2 is measured for Gaussian groups of 64


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([2, 6, 32]), st.booleans(), st.integers(0, 99))
def test_codes_and_multipliers_stay_in_bounds(rows, groups, group_size, search, seed):
    w = torch.randn(rows, groups * group_size, generator=torch.Generator().manual_seed(seed))
    w[0] = 0
    if seed % 2:
        w[-1, :group_size] *= 1e4
    scale, multipliers = fit_two_level(w, group_size, search=search)
    q = round_two_level(w, scale, multipliers, group_size)
    assert multipliers.dtype == torch.uint8
    assert multipliers.shape == (rows, groups)
    assert q.dtype == torch.int8
    assert 1 <= int(multipliers.min()) <= int(multipliers.max()) <= 15
    assert -8 <= int(q.min()) <= int(q.max()) <= 7
    assert (q[0] == 0).all()
    assert torch.isfinite(dequantize_two_level(TwoLevelWeight(q, multipliers, scale))).all()


def test_a_group_of_zeros_beside_others():
    w = gaussian(2, 192)
    w[:, 64:128] = 0
    scale, multipliers = fit_two_level(w, GROUP)
    back = dequantize_two_level(TwoLevelWeight(round_two_level(w, scale, multipliers, GROUP), multipliers, scale))
    assert (back[:, 64:128] == 0).all()
    assert float((back - w).norm() / w.norm()) < 0.12


def test_codes_are_the_nearest_ones():
    w = gaussian(5, 128)
    scale, multipliers = fit_two_level(w, GROUP)
    q = round_two_level(w, scale, multipliers, GROUP)
    step = (scale.double()[:, None] * multipliers.double()).repeat_interleave(GROUP, 1)
    every = torch.arange(-8, 8, dtype=torch.double) * step[..., None]
    least = (every - w.double()[..., None]).abs().amin(-1)
    torch.testing.assert_close((q * step - w.double()).abs(), least, rtol=0, atol=1e-6)  # ties within float32


def test_dequantized_is_the_definition():
    q = torch.randint(-8, 8, (3, 8), dtype=torch.int8)
    multipliers, scale = torch.tensor([[1, 2], [3, 4], [15, 15]], dtype=torch.uint8), torch.tensor([0.5, 1.0, 2.0])
    expected = scale[:, None] * multipliers.repeat_interleave(4, 1) * q.float()
    assert torch.equal(dequantize_two_level(TwoLevelWeight(q, multipliers, scale)), expected)


def test_many_chunks_equal_rows_one_by_one():
    w = gaussian(200, 1024)  # more than one chunk
    scale, multipliers = fit_two_level(w, GROUP)
    for row in (0, 63, 64, 199):
        alone = fit_two_level(w[row : row + 1], GROUP)
        assert torch.equal(alone[0], scale[row : row + 1])
        assert torch.equal(alone[1], multipliers[row : row + 1])


@pytest.mark.parametrize("fit", [fit_channel, fit_tensor])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_one_scale(fit, bits):
    w = laplace(16, 300)
    w[3] = 0
    fitted = {search: fit(w, bits, search) for search in (True, False)}
    errors = {search: float((dequantize_two_level(f) - w).square().sum()) for search, f in fitted.items()}
    assert errors[True] <= errors[False]
    searched = fitted[True]
    low, high = (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert low <= int(searched.codes_q.min()) <= int(searched.codes_q.max()) <= high
    assert (searched.multipliers == 1).all()
    assert searched.multipliers.shape == (16, 1)
    assert (searched.codes_q[3] == 0).all()
    if fit is fit_tensor:
        assert len(searched.scale.unique()) == 1
    else:
        assert float(searched.scale[3]) == 1


@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_bits_in_groups(bits):
    """Codes keep to their range, and the fit is near the best free step of every group (multipliers: 1 to 15)."""
    w = laplace(8, 128)
    scale, multipliers = fit_two_level(w, 32, bits=bits)
    q = round_two_level(w, scale, multipliers, 32, bits)
    assert (int(q.min()), int(q.max())) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    got = (dequantize_two_level(TwoLevelWeight(q, multipliers, scale)).double() - w.double()).square().sum()
    groups = w.double().view(8, 4, 32)
    errors = [
        ((groups / (s * widest)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * s * widest - groups)
        .square()
        .sum(-1)
        for widest in [groups.abs().amax(-1, keepdim=True)]
        for s in torch.linspace(0.1, 1, 200, dtype=torch.double)
    ]
    assert got <= 1.06 * torch.stack(errors).amin(0).sum()


@pytest.mark.parametrize("fit", [fit_channel, fit_tensor])
def test_zeros_and_no_rows(fit):
    assert (fit(torch.zeros(3, 8), 4).scale == 1).all()
    assert fit(torch.zeros(0, 8), 4).codes_q.shape == (0, 8)
    assert fit_two_level(torch.zeros(0, 8), 4)[1].shape == (0, 2)


def test_one_scale_is_near_the_best_of_a_finer_search():
    w = laplace(4, 1000)
    got = float((dequantize_two_level(fit_channel(w, 4)).double() - w.double()).square().sum())
    widest = w.double().abs().amax(1, keepdim=True) / 7
    errors = []
    for share in torch.linspace(0.05, 1, 500, dtype=torch.double):
        step = widest * share
        errors.append(((w.double() / step).round().clamp(-8, 7) * step - w.double()).square().sum(1))
    assert got <= 1.01 * float(torch.stack(errors).amin(0).sum())


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fit_two_level(torch.randn(2, 10), 4), "group_size"),
        (lambda: fit_two_level(torch.randn(2, 8), 0), "group_size"),
        (lambda: fit_two_level(torch.randn(8), 4), "group_size"),
        (lambda: fit_two_level(torch.randn(2, 8), 4, torch.ones(7)), "importance"),
        (lambda: fit_channel(torch.randn(2, 8), 9), "bits: got 9"),
        (lambda: fit_two_level(torch.randn(2, 8), 4, bits=5), r"bits: got 5, expected one of \[2, 3, 4\]"),
    ],
)
def test_wrong_arguments(call, named):
    with pytest.raises(ValueError, match=named):
        call()
