import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff.numerics.grids import asymmetric_grid, dequantize, quantize, symmetric_grid

KINDS = {"symmetric": symmetric_grid, "asymmetric": asymmetric_grid}
GRANULARITIES = [("tensor", None), ("channel", None), ("token", None), ("group", 4)]

# Magnitudes whose steps are normal float32 numbers.
values = st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 2.0**-100)
tensors = st.lists(values, min_size=24, max_size=24).map(lambda xs: torch.tensor(xs).view(3, 8))
bits = st.integers(2, 8)
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
every_granularity = pytest.mark.parametrize(("granularity", "group"), GRANULARITIES, ids=lambda g: str(g))


def step_of_each(x, grid):
    shape = x.shape if grid.group_size is None else x.unflatten(-1, (-1, grid.group_size)).shape
    return grid.scale.double().expand(shape).reshape(x.shape)


@every_kind
@every_granularity
@given(tensors, bits)
def test_the_error_is_at_most_half_a_step(make, granularity, group, x, bits):
    grid = make(x, bits, granularity, group)
    error = (x.double() - dequantize(quantize(x, grid), grid).double()).abs()
    # Asymmetric: a rounded zero point can push an end of the range out by half a step. 1e-5: float32 rounding of x /
    # scale at most 255 steps from zero, 255 * 2^-23 of a step.
    allowed = 0.5 if make is symmetric_grid else 1.0
    assert (error <= step_of_each(x, grid) * (allowed + 1e-4)).all()


@every_kind
@every_granularity
@given(tensors, bits)
def test_quantizing_twice_changes_nothing(make, granularity, group, x, bits):
    grid = make(x, bits, granularity, group)
    codes = quantize(x, grid)
    assert torch.equal(quantize(dequantize(codes, grid), grid), codes)


@every_kind
@given(tensors, bits)
def test_codes_are_in_bounds_and_zero_is_exact(make, x, bits):
    grid = make(x, bits)
    codes = quantize(torch.cat([x.flatten(), x.new_zeros(1)]) * 10, grid)  # also far outside the range
    assert grid.low <= int(codes.min()) <= int(codes.max()) <= grid.high
    assert dequantize(codes, grid)[-1] == 0


@every_kind
@given(tensors, bits)
def test_a_larger_value_never_gets_a_smaller_code(make, x, bits):
    ordered = x.flatten().sort().values
    codes = quantize(ordered, make(x, bits)).int()
    assert (codes[1:] >= codes[:-1]).all()


@every_kind
@every_granularity
@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 3e38, -3e38, 1e-45, 1e-38])
def test_constant_inputs_come_back(make, granularity, group, value):
    x = torch.full((2, 8), value)
    grid = make(x, 8, granularity, group)
    back = dequantize(quantize(x, grid), grid)
    # One code is the value itself; 1e-38 is where float32 loses digits, and smaller values may be rounded to zero.
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-38)


@every_kind
def test_codes_agree_with_torch(make):
    """torch multiplies by a reciprocal, so values within an ulp of a tie may differ: there are none here."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    grid = make(x, 8)
    expected = torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point.int(), grid.low, grid.high)
    torch.testing.assert_close(dequantize(quantize(x, grid), grid), expected, rtol=1e-6, atol=1e-7)


def test_ties_go_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 127.0])
    assert quantize(x, symmetric_grid(x, 8)).tolist() == [0, 2, 2, 0, -2, 127]


@pytest.mark.parametrize(
    ("granularity", "group", "shape"),
    [("tensor", None, ()), ("channel", None, (3, 1)), ("token", None, (3, 1)), ("group", 4, (3, 2, 1))],
)
@every_kind
def test_every_part_has_its_own_scale(make, granularity, group, shape):
    assert make(torch.randn(3, 8), 8, granularity, group).scale.shape == shape


@pytest.mark.parametrize(
    "call",
    [
        lambda x: symmetric_grid(x, 1),
        lambda x: symmetric_grid(x, 9),
        lambda x: symmetric_grid(x, 8, "rows"),
        lambda x: symmetric_grid(x, 8, "group"),
        lambda x: symmetric_grid(x, 8, "token", 4),
        lambda x: symmetric_grid(x, 8, "group", 5),
    ],
)
def test_wrong_arguments(call):
    with pytest.raises(ValueError, match="got"):
        call(torch.randn(3, 8))
