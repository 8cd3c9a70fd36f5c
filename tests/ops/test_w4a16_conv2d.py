import pytest
import torch
import torch.nn.functional as F

from qdiff.numerics.gemm_layout import to_gemm
from qdiff.numerics.packing import pack_int4, pack_multipliers, unpack_int4
from qdiff.ops import w4a16_conv2d


def inputs(bits=4, segments=(4, 8), kernel=(3, 3), stride=(1, 1), padding=(1, 1), smoothed=True, dtype=torch.float32):
    """The arguments, and in float64 the weight that they stand for: multipliers are constant over each segment."""
    generator = torch.Generator().manual_seed(0)
    channels, n, group_size = sum(segments), 5, 4
    q = torch.randint(-8, 8, (n, channels, *kernel), dtype=torch.int8, generator=generator)
    multiplier = torch.cat([torch.full((n, width, *kernel), 3 + 5 * s) for s, width in enumerate(segments)], 1)
    groups = to_gemm(multiplier, segments)[:, ::group_size].to(torch.uint8)
    arguments = {
        "x": torch.randn(2, channels, 6, 5, generator=generator).to(dtype),
        "smooth": torch.rand(channels, generator=generator) + 0.5 if smoothed else None,
        "codes": pack_int4(to_gemm(q, segments), group_size) if bits == 4 else to_gemm(q, segments),
        "multipliers": pack_multipliers(groups) if bits == 4 else None,
        "codebook": None,
        "scale": torch.rand(n, generator=generator) / 50,
        "group_size": group_size if bits == 4 else -1,
        "bias": torch.randn(n, generator=generator).to(dtype),
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "segments": segments,
    }
    weight = q.double() * (multiplier if bits == 4 else 1) * arguments["scale"].double()[:, None, None, None]
    return arguments, weight * arguments["smooth"].double()[:, None, None] if smoothed else weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(
    "case",
    [{}, {"segments": (12,)}, {"kernel": (1, 1), "padding": (0, 0)}, {"kernel": (2, 3), "stride": (2, 1)}],
    ids=str,
)
def test_equals_the_float64_convolution(bits, smoothed, case):
    arguments, weight = inputs(bits, smoothed=smoothed, **case)
    geometry = (arguments["stride"], arguments["padding"])
    expected = F.conv2d(arguments["x"].double(), weight, arguments["bias"].double(), *geometry)
    result = w4a16_conv2d(**arguments)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-4)  # float32 sums of 108 terms below 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_give_half_outputs(dtype):
    arguments, weight = inputs(dtype=dtype)
    expected = F.conv2d(arguments["x"].double(), weight, arguments["bias"].double(), padding=1)
    result = w4a16_conv2d(**arguments)
    assert result.dtype == dtype
    largest = float(expected.abs().max())
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * largest)


def test_a_codebook_stands_for_the_8_bit_weights_that_it_gives():
    arguments, _ = inputs()
    codebook = torch.randint(-128, 128, (5, 16), dtype=torch.int8)
    eight = codebook.gather(1, unpack_int4(arguments["codes"], 4).long() + 8)
    expected = w4a16_conv2d(**arguments | {"multipliers": None, "codes": eight})
    assert torch.equal(w4a16_conv2d(**arguments | {"multipliers": None, "codebook": codebook}), expected)


def test_opcheck():
    for bits in (4, 8):
        torch.library.opcheck(torch.ops.qdiff.w4a16_conv2d.default, tuple(inputs(bits)[0].values()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 12, 6)}, "x"),
        ({"smooth": torch.ones(11)}, "smooth"),
        ({"segments": (4, 9)}, "segments"),
        ({"codes": torch.zeros(5, 53, dtype=torch.uint8)}, "codes"),
        ({"group_size": 8}, "group_size"),
        ({"group_size": 6}, "group_size"),
        ({"bias": torch.zeros(4)}, "bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(change, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        w4a16_conv2d(**inputs()[0] | change)
