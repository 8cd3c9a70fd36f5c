import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff.ops import low_rank_down, quantize_per_token

# Rounding to codes is done in float32: x * smooth, 127 / absmax and their product each lose at most 2^-24 of up to 127
# steps.
SLACK = 1 + 2**-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 33), (2, 7, 64), (2, 3, 4, 17), (1000, 300), (0, 8)], ids=str)
@pytest.mark.parametrize("smoothed", [False, True])
def test_every_value_is_within_half_a_step(dtype, shape, smoothed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    smooth = torch.rand(shape[-1], generator=generator) + 0.1 if smoothed else None
    codes, scale, _ = quantize_per_token(x, smooth, None)
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    assert scale.dtype == torch.float32
    assert scale.shape == x.shape[:-1]
    v = x.double() if smooth is None else x.double() * smooth.double()
    step = v.abs().amax(-1) / 127
    torch.testing.assert_close(scale.double(), step, rtol=1e-6, atol=0)
    assert ((v - codes.double() * scale.double()[..., None]).abs() <= step[..., None] / 2 * SLACK).all()
    assert (codes.int().abs().amax(-1) == 127).all()


@given(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=40))
def test_any_row(values):
    x = torch.tensor([values])
    codes, scale, _ = quantize_per_token(x, None, None)
    assert int(codes.int().abs().max()) <= 127
    assert torch.isfinite(scale).all()
    assert (codes[x == 0] == 0).all()
    # Rows below 1e-30 have the step of 1e-30 / 127: their magnitudes are far below any activation's rounding.
    step = max(float(x.abs().max()), 1e-30) / 127
    assert ((x.double() - codes.double() * scale.double()[:, None]).abs() <= step / 2 * SLACK).all()


@pytest.mark.parametrize("bits", [4, 5, 7])
def test_fewer_bits(bits):
    levels = 2 ** (bits - 1) - 1
    x = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    codes, scale, _ = quantize_per_token(x, None, None, levels)
    step = x.double().abs().amax(-1) / levels
    torch.testing.assert_close(scale.double(), step, rtol=1e-6, atol=0)
    assert ((x.double() - codes.double() * step[:, None]).abs() <= step[:, None] / 2 * SLACK).all()
    assert (codes.int().abs().amax(-1) == levels).all()


def test_rows_of_zeros_have_scale_one_and_codes_zero():
    x = torch.zeros(3, 8)
    x[1] = 2.0
    codes, scale, _ = quantize_per_token(x, None, None)
    assert scale.tolist() == [1.0, pytest.approx(2 / 127), 1.0]
    assert codes.tolist() == [[0] * 8, [127] * 8, [0] * 8]


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-20, 1e4, 3e38])
def test_extreme_magnitudes(magnitude):
    codes, scale, _ = quantize_per_token(torch.tensor([[magnitude, -magnitude, 0.0]]), None, None)
    assert torch.isfinite(scale).all()
    assert codes[0].tolist() == ([127, -127, 0] if magnitude > 1e-30 else [0, 0, 0])


def test_an_outlier_leaves_its_row_coarse_and_the_others_alone():
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    x[0, 3] = 1e4
    codes, scale, _ = quantize_per_token(x, None, None)
    assert codes[0].tolist() == [0, 0, 0, 127] + [0] * 12
    assert torch.equal(codes[1], quantize_per_token(x[1], None, None)[0])
    assert scale[0] == pytest.approx(1e4 / 127)


def test_ties_go_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_per_token(x, None, None)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


def test_what_is_not_finite_stays_visible():
    rows = torch.tensor([[1.0, float("nan")], [1.0, float("inf")], [1.0, 2.0]])
    _, scale, _ = quantize_per_token(rows, None, None)
    assert torch.isfinite(scale).tolist() == [False, False, True]


def test_strides_do_not_matter_and_the_input_is_not_changed():
    x = torch.randn(6, 4, 10).transpose(0, 2)[::2]
    before = x.clone()
    codes, scale, _ = quantize_per_token(x, None, None)
    expected = quantize_per_token(x.contiguous(), None, None)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])
    assert torch.equal(x, before)


def test_a_tensor_of_many_blocks_equals_its_rows():
    x = torch.randn(5000, 256)
    codes, scale, _ = quantize_per_token(x, None, None)
    for row in (0, 1023, 1024, 4999):
        alone = quantize_per_token(x[row], None, None)
        assert torch.equal(alone[0], codes[row])
        assert torch.equal(alone[1], scale[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (0, 8), (3000, 200)], ids=str)
@pytest.mark.parametrize("smoothed", [False, True])
def test_the_branch_is_that_of_low_rank_down_and_changes_no_code(dtype, shape, smoothed):
    x, down = torch.randn(shape).to(dtype), torch.randn(3, shape[-1]).half()
    smooth = torch.rand(shape[-1]) + 0.5 if smoothed else None
    codes, scale, low = quantize_per_token(x, smooth, down)
    alone = quantize_per_token(x, smooth, None)
    assert torch.equal(codes, alone[0])
    assert torch.equal(scale, alone[1])
    assert alone[2].shape == (*shape[:-1], 0)
    assert low.dtype == dtype
    assert torch.equal(low, low_rank_down(x, smooth, down))


def test_opcheck():
    for shape in [(3, 8), (2, 3, 8)]:
        for smooth in (None, torch.rand(8)):
            for down in (None, torch.randn(3, 8)):
                torch.library.opcheck(torch.ops.qdiff.quantize_per_token.default, (torch.randn(shape), smooth, down))
    torch.library.opcheck(torch.ops.qdiff.quantize_per_token.default, (torch.randn(3, 8), None, None, 7))


@pytest.mark.parametrize(
    ("x", "smooth", "down", "named"),
    [
        (torch.zeros(2, 8, dtype=torch.int32), None, None, "x"),
        (torch.zeros(2, 0), None, None, "x"),
        (torch.zeros(2, 8), torch.ones(7), None, "smooth"),
        (torch.zeros(2, 8), torch.ones(8, dtype=torch.float16), None, "smooth"),
        (torch.zeros(2, 8), None, torch.zeros(3, 7), "down"),
        (torch.zeros(2, 8), None, torch.zeros(8), "down"),
        (torch.zeros(2, 8), None, torch.zeros(3, 8, dtype=torch.int8), "down"),
    ],
)
def test_wrong_arguments(x, smooth, down, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        quantize_per_token(x, smooth, down)


@pytest.mark.parametrize("levels", [0, 128])
def test_impossible_levels(levels):
    with pytest.raises(ValueError, match=r"^levels: got"):
        quantize_per_token(torch.zeros(2, 8), None, None, levels)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "geglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_activation_comes_first(activation, dtype):
    x, down = torch.randn(3, 5, 64).to(dtype), torch.randn(4, 32 if activation == "geglu" else 64)
    if activation == "geglu":
        activated = x[..., :32] * torch.nn.functional.gelu(x[..., 32:])
    else:
        activated = torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    smooth = torch.rand(activated.shape[-1]) + 0.5
    results = quantize_per_token(x, smooth, down, 127, activation)
    for result, expected in zip(results, quantize_per_token(activated, smooth, down)):
        assert torch.equal(result, expected)
    torch.library.opcheck(torch.ops.qdiff.quantize_per_token.default, (x, smooth, down, 127, activation))


@pytest.mark.parametrize(
    ("x", "activation", "message"),
    [
        (torch.ones(2, 8), "relu", "activation: got 'relu', expected one of none, gelu, gelu_tanh, geglu"),
        (torch.ones(2, 7), "geglu", r"x: got \(2, 7\), expected as many values as gates"),
    ],
)
def test_bad_activation(x, activation, message):
    with pytest.raises(ValueError, match=message):
        quantize_per_token(x, None, None, 127, activation)
