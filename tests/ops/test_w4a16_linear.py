import pytest
import torch

from qdiff.numerics.packing import pack_int4, pack_multipliers, unpack_int4
from qdiff.ops import w4a16_linear


def inputs(bits=4, shape=(3, 24), n=5, rank=0, smoothed=False, bias=True, dtype=torch.float32):
    """The arguments, and in float64 the weight that they stand for."""
    generator = torch.Generator().manual_seed(0)
    k, group_size = shape[-1], 8
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    multipliers = torch.randint(1, 16, (n, k // group_size), generator=generator).to(torch.uint8)
    integers = (q.int() * multipliers.int().repeat_interleave(group_size, 1)).to(torch.int8)
    arguments = {
        "x": torch.randn(shape, generator=generator).to(dtype),
        "smooth": torch.rand(k, generator=generator) + 0.5 if smoothed else None,
        "codes": pack_int4(q, group_size) if bits == 4 else integers,
        "multipliers": pack_multipliers(multipliers) if bits == 4 else None,
        "codebook": None,
        "scale": torch.rand(n, generator=generator) / 50,
        "group_size": group_size if bits == 4 else -1,
        "bias": torch.randn(n, generator=generator).to(dtype) if bias else None,
        "down": torch.randn(rank, k, generator=generator).half() if rank else None,
        "up": torch.randn(n, rank, generator=generator).half() if rank else None,
    }
    weight = integers.double() * arguments["scale"].double()[:, None]
    if rank:
        weight = weight + arguments["up"].double() @ arguments["down"].double()
    return arguments, weight * arguments["smooth"].double() if smoothed else weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (0, 24)], ids=str)
@pytest.mark.parametrize(
    ("rank", "smoothed", "bias"), [(0, False, False), (0, True, True), (2, True, True), (2, False, True)]
)
def test_equals_the_float64_definition(bits, shape, rank, smoothed, bias):
    arguments, weight = inputs(bits, shape, rank=rank, smoothed=smoothed, bias=bias)
    expected = arguments["x"].double() @ weight.t() + (arguments["bias"].double() if bias else 0.0)
    # float32 sums of 24 terms of size about 10.
    torch.testing.assert_close(w4a16_linear(**arguments).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_give_half_outputs(dtype):
    arguments, weight = inputs(dtype=dtype, rank=2, smoothed=True)
    result = w4a16_linear(**arguments)
    expected = arguments["x"].double() @ weight.t() + arguments["bias"].double()
    assert result.dtype == dtype
    # The weight is rounded to the dtype once, the output once.
    torch.testing.assert_close(
        result.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * float(expected.abs().max())
    )


def test_a_codebook_stands_for_the_8_bit_weights_that_it_gives():
    arguments, _ = inputs(rank=2, smoothed=True)
    codebook = torch.randint(-128, 128, (5, 16), dtype=torch.int8)
    eight = codebook.gather(1, unpack_int4(arguments["codes"], 8).long() + 8)
    expected = w4a16_linear(**arguments | {"multipliers": None, "codes": eight})
    assert torch.equal(w4a16_linear(**arguments | {"multipliers": None, "codebook": codebook}), expected)


def test_opcheck():
    for bits in (4, 8):
        for rank in (0, 2):
            torch.library.opcheck(
                torch.ops.qdiff.w4a16_linear.default, tuple(inputs(bits, rank=rank, smoothed=bool(rank))[0].values())
            )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(3, 24, dtype=torch.int8)}, "x"),
        ({"smooth": torch.ones(23)}, "smooth"),
        ({"codes": torch.zeros(5, 24, dtype=torch.uint8)}, "codes"),
        ({"multipliers": None}, "codes"),
        ({"codebook": torch.zeros(5, 16, dtype=torch.int8)}, "multipliers, codebook"),
        ({"multipliers": None, "codebook": torch.zeros(5, 17, dtype=torch.int8)}, "codebook"),
        ({"group_size": 5}, "group_size"),
        ({"up": None}, "down, up"),
        ({"down": torch.zeros(2, 23)}, "down"),
        ({"up": torch.zeros(5, 3)}, "up"),
        ({"bias": torch.zeros(4)}, "bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(change, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        w4a16_linear(**inputs(rank=2)[0] | change)
