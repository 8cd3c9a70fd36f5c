import pytest
import torch

from qdiff.ops import w8a8_linear


def inputs(shape=(6, 33), n=5, rows=None, bias=True, rank=0, residual=False, out_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    m, k = torch.Size(shape[:-1]).numel(), shape[-1]
    return {
        "x_codes": torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator),
        "x_scale": torch.rand(m if rows is None else rows, generator=generator) + 0.01,
        "codes": torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator),
        "scale": torch.rand(n, generator=generator) + 0.01,
        "bias": torch.randn(n, generator=generator) if bias else None,
        "x_low": torch.randn(*shape[:-1], rank, generator=generator) if rank else None,
        "up": torch.randn(n, rank, generator=generator).half() if rank else None,
        "residual": (torch.randn(*shape[:-1], n, generator=generator) * 1000).to(out_dtype) if residual else None,
        "out_dtype": out_dtype,
    }


def reference(x_codes, x_scale, codes, scale, bias, x_low, up, residual, out_dtype):
    """Integers in int64, the rest in float64."""
    acc = x_codes.long() @ codes.long().t()
    m = x_codes.shape[:-1].numel()
    x_scale = x_scale.double().repeat_interleave(m // max(1, len(x_scale))).view(*x_codes.shape[:-1], 1)
    y = acc.double() * x_scale * scale.double()
    y = y if bias is None else y + bias.double()
    y = y if x_low is None else y + x_low.double() @ up.to(x_low.dtype).double().t()
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("shape", [(33,), (1, 2), (6, 33), (2, 3, 64), (2, 3, 4, 10), (3000, 70), (0, 8)], ids=str)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (True, True)])
def test_equals_the_float64_definition(shape, rank, bias, residual):
    arguments = inputs(shape, rank=rank, bias=bias, residual=residual)
    result, expected = w8a8_linear(**arguments), reference(**arguments)
    assert result.shape == expected.shape
    # Five float32 roundings of terms no larger than the largest value here.
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_a_scale_holds_for_its_share_of_the_rows(rows):
    arguments = inputs((2, 3, 33), rows=rows)
    torch.testing.assert_close(w8a8_linear(**arguments).double(), reference(**arguments), rtol=1e-6, atol=1e-3)


def test_the_integer_part_is_exact_and_in_the_documented_order():
    """With powers of two as scales there is one rounding, int32 to float32, and it is of the exact sum."""
    k = 5000
    arguments = inputs((2, k), n=3, bias=False)
    arguments["x_codes"].fill_(127)
    arguments["codes"].fill_(127)
    arguments["codes"][1] = -127
    arguments["codes"][2, 0] = 126
    arguments["x_scale"], arguments["scale"] = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 4.0, 0.25])
    sums = torch.tensor([127 * 127 * k, -127 * 127 * k, 127 * 127 * k - 127])
    expected = sums.float() * torch.tensor([[0.5], [2.0]]) * arguments["scale"]
    assert torch.equal(w8a8_linear(**arguments), expected)


def test_scales_in_the_shape_of_the_rows_are_the_same_in_a_row():
    arguments = inputs((2, 3, 40))
    rows = {"x_scale": arguments["x_scale"].view(2, 3)}
    assert torch.equal(w8a8_linear(**arguments | rows), w8a8_linear(**arguments))
    arguments = inputs((40,))
    assert torch.equal(w8a8_linear(**arguments | {"x_scale": arguments["x_scale"][0]}), w8a8_linear(**arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_result_is_the_float32_result_cast_once(dtype):
    arguments = inputs((3000, 70), rank=3, residual=True, out_dtype=dtype)
    half = w8a8_linear(**arguments)
    full = w8a8_linear(**arguments | {"residual": arguments["residual"].float(), "out_dtype": torch.float32})
    assert half.dtype == dtype
    assert torch.equal(half, full.to(dtype))


def test_the_branch_is_rounded_to_the_dtype_of_what_it_reads():
    arguments = inputs(rank=3, bias=False)
    arguments["scale"].zero_()
    arguments["x_low"] = arguments["x_low"].bfloat16()
    arguments["up"] = torch.full((5, 3), 1 + 2**-10, dtype=torch.float16)  # 1 in bfloat16
    expected = arguments["x_low"].float().sum(-1, keepdim=True).expand(6, 5)
    torch.testing.assert_close(w8a8_linear(**arguments), expected, rtol=1e-6, atol=1e-6)


def test_a_residual_larger_than_float16_sums_is_added_before_the_cast():
    arguments = inputs((1, 32), n=1, bias=False, residual=True, out_dtype=torch.float16)
    for name, value in (("x_codes", 127), ("codes", 127), ("x_scale", 1.0), ("scale", 0.2)):
        arguments[name].fill_(value)
    arguments["residual"].fill_(-60000.0)
    assert float(w8a8_linear(**arguments)) == pytest.approx(127 * 127 * 32 * 0.2 - 60000, abs=32)


@pytest.mark.parametrize("shape", [(33,), (2, 3, 33), (3000, 70), (0, 8)], ids=str)
def test_int32_gives_the_accumulators_and_nothing_else(shape):
    arguments = inputs(shape, rank=3, out_dtype=torch.int32)
    arguments["bias"].fill_(float("nan"))
    result = w8a8_linear(**arguments)
    assert result.dtype == torch.int32
    assert torch.equal(result.long(), arguments["x_codes"].long() @ arguments["codes"].long().t())


def test_sums_beyond_the_range_of_float16_survive_until_they_are_scaled():
    arguments = inputs((4, 4096), bias=False, out_dtype=torch.float16)
    arguments["x_codes"].fill_(127)
    arguments["codes"].fill_(127)  # sums of 6.6e7
    arguments["x_scale"].fill_(1e-4)
    arguments["scale"].fill_(1e-4)
    assert float(w8a8_linear(**arguments).max()) == pytest.approx(127 * 127 * 4096 * 1e-8, rel=1e-3)


def test_strides_do_not_matter():
    arguments = inputs((6, 33), rank=3, residual=True)
    strided = {
        name: value.repeat_interleave(2, 0)[::2] if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    strided["x_codes"] = arguments["x_codes"].t().contiguous().t()
    assert torch.equal(w8a8_linear(**strided), w8a8_linear(**arguments))


def test_opcheck():
    for changes in (
        {},
        {"bias": False},
        {"rank": 2, "residual": True},
        {"out_dtype": torch.int32},
        {"shape": (2, 3, 8), "rows": 2},
    ):
        torch.library.opcheck(torch.ops.qdiff.w8a8_linear.default, tuple(inputs(**changes).values()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x_codes": torch.zeros(6, 33)}, "x_codes"),
        ({"x_scale": torch.ones(4)}, "x_scale"),
        ({"x_scale": torch.ones(6, 1)}, "x_scale"),
        ({"x_scale": torch.ones(0)}, "x_scale"),
        ({"codes": torch.zeros(5, 32, dtype=torch.int8)}, "codes"),
        ({"codes": torch.zeros(5, 33)}, "codes"),
        ({"scale": torch.ones(6)}, "scale"),
        ({"scale": torch.ones(5).half()}, "scale"),
        ({"bias": torch.ones(6)}, "bias"),
        ({"up": None}, "x_low, up"),
        ({"x_low": torch.zeros(6, 4)}, "x_low"),
        ({"x_low": torch.zeros(5, 3)}, "x_low"),
        ({"up": torch.zeros(4, 3)}, "up"),
        ({"out_dtype": torch.int8}, "out_dtype"),
        ({"residual": torch.zeros(6, 4)}, "residual"),
        ({"residual": torch.zeros(6, 5).half()}, "residual"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(change, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        w8a8_linear(**inputs(rank=3) | change)
