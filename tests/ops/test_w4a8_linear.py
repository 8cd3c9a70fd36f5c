import pytest
import torch

from qdiff.numerics.packing import pack_int4, pack_multipliers, unpack_int4
from qdiff.ops import w4a8_linear, w8a8_linear

FOUR_BIT_ONLY = ("multipliers", "codebook", "group_size")


def inputs(shape=(6, 40), n=5, group_size=8, rank=0, bias=True, out_dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    m, k = torch.Size(shape[:-1]).numel(), shape[-1]
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    multipliers = torch.randint(1, 16, (n, k // group_size), generator=generator).to(torch.uint8)
    arguments = {
        "x_codes": torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator),
        "x_scale": torch.rand(m, generator=generator) + 0.01,
        "codes": pack_int4(q, group_size),
        "multipliers": pack_multipliers(multipliers),
        "codebook": None,
        "scale": torch.rand(n, generator=generator) + 0.01,
        "group_size": group_size,
        "bias": torch.randn(n, generator=generator) if bias else None,
        "x_low": torch.randn(*shape[:-1], rank, generator=generator) if rank else None,
        "up": torch.randn(n, rank, generator=generator).half() if rank else None,
        "residual": None,
        "out_dtype": out_dtype,
    }
    return arguments, q.long() * multipliers.long().repeat_interleave(group_size, 1)


@pytest.mark.parametrize(
    ("shape", "group_size"), [((40,), 8), ((6, 40), 8), ((2, 3, 24), 24), ((1500, 96), 32), ((0, 8), 2)], ids=str
)
@pytest.mark.parametrize("rank", [0, 3])
def test_equals_the_float64_definition(shape, group_size, rank):
    arguments, integers = inputs(shape, group_size=group_size, rank=rank)
    acc = (arguments["x_codes"].long() @ integers.t()).double()
    expected = acc * arguments["x_scale"].double().view(*shape[:-1], 1) * arguments["scale"].double()
    expected = expected + arguments["bias"].double()
    if rank:
        expected = expected + arguments["x_low"].double() @ arguments["up"].double().t()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    result = w4a8_linear(**arguments)
    # Five float32 roundings of terms no larger than the largest value here.
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6 * largest)


def test_is_the_8_bit_product_of_the_expanded_weights_bit_for_bit():
    arguments, integers = inputs(rank=2)
    eight = {name: value for name, value in arguments.items() if name not in FOUR_BIT_ONLY}
    assert torch.equal(w4a8_linear(**arguments), w8a8_linear(**eight | {"codes": integers.to(torch.int8)}))


def test_a_codebook_gives_the_8_bit_product_of_its_entries_bit_for_bit():
    arguments, _ = inputs((7, 64), n=9, group_size=32, rank=2)
    codebook = torch.randint(-128, 128, (9, 16), dtype=torch.int8)
    u = unpack_int4(arguments["codes"], 32).long() + 8
    eight = {name: value for name, value in arguments.items() if name not in FOUR_BIT_ONLY}
    expected = w8a8_linear(**eight | {"codes": codebook.gather(1, u)})
    assert torch.equal(w4a8_linear(**arguments | {"multipliers": None, "codebook": codebook}), expected)


@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (0, 40)], ids=str)
def test_int32_gives_the_accumulators(shape):
    arguments, integers = inputs(shape, rank=3, out_dtype=torch.int32)
    arguments["scale"].fill_(float("nan"))
    result = w4a8_linear(**arguments)
    assert result.dtype == torch.int32
    assert torch.equal(result.long(), arguments["x_codes"].long() @ integers.t())


def test_extreme_codes_are_exact():
    k = 4096
    arguments, _ = inputs((1, k), n=2, group_size=64, bias=False)
    q = torch.full((2, k), -8, dtype=torch.int8)
    q[1] = 7
    arguments["codes"] = pack_int4(q, 64)
    arguments["multipliers"] = pack_multipliers(torch.full((2, k // 64), 15, dtype=torch.uint8))
    arguments["x_codes"].fill_(-127)
    arguments["x_scale"], arguments["scale"] = torch.ones(1), torch.ones(2)
    assert w4a8_linear(**arguments).tolist() == [[127 * 120 * k, -127 * 105 * k]]  # both are float32 numbers


def test_opcheck():
    codebook = {"multipliers": None, "codebook": torch.zeros(5, 16, dtype=torch.int8)}
    for changes in ({}, {"bias": False}, {"rank": 2}, {"out_dtype": torch.bfloat16}, {"shape": (2, 3, 16)}):
        torch.library.opcheck(torch.ops.qdiff.w4a8_linear.default, tuple(inputs(**changes)[0].values()))
    torch.library.opcheck(torch.ops.qdiff.w4a8_linear.default, tuple((inputs()[0] | codebook).values()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"group_size": 7}, "group_size"),
        ({"group_size": 16}, "group_size"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 4}, "multipliers"),
        ({"codes": torch.zeros(5, 40, dtype=torch.uint8)}, "codes"),
        ({"codes": torch.zeros(5, 20, dtype=torch.int8)}, "codes"),
        ({"multipliers": torch.zeros(5, 5, dtype=torch.uint8)}, "multipliers"),
        ({"multipliers": None}, "multipliers, codebook"),
        ({"codebook": torch.zeros(5, 16, dtype=torch.int8)}, "multipliers, codebook"),
        ({"multipliers": None, "codebook": torch.zeros(4, 16, dtype=torch.int8)}, "codebook"),
        ({"multipliers": None, "codebook": torch.zeros(5, 16)}, "codebook"),
        ({"residual": torch.zeros(5, 5)}, "residual"),
        ({"scale": torch.ones(4)}, "scale"),
        ({"x_scale": torch.ones(4)}, "x_scale"),
        ({"bias": torch.ones(4)}, "bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(change, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        w4a8_linear(**inputs()[0] | change)
