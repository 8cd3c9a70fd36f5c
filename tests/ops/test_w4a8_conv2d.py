import pytest
import torch

from qdiff.numerics.packing import pack_int4, pack_multipliers, unpack_int4
from qdiff.ops import w4a8_conv2d, w8a8_conv2d

FOUR_BIT_ONLY = ("multipliers", "codebook", "group_size")


def inputs(batch=2, segments=(8,), size=(6, 5), n=4, kernel=(3, 3), stride=(1, 1), padding=(1, 1), group_size=4):
    generator = torch.Generator().manual_seed(0)
    k = sum(segments) * kernel[0] * kernel[1]
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    multipliers = torch.randint(1, 16, (n, k // group_size), generator=generator).to(torch.uint8)
    x = torch.randint(-127, 128, (batch, sum(segments), *size), dtype=torch.int8, generator=generator)
    arguments = {
        "x_codes": x.contiguous(memory_format=torch.channels_last),
        "x_scale": torch.rand(batch, len(segments), generator=generator) + 0.1,
        "codes": pack_int4(q, group_size),
        "multipliers": pack_multipliers(multipliers),
        "codebook": None,
        "scale": torch.rand(n, generator=generator) + 0.1,
        "group_size": group_size,
        "bias": torch.randn(n, generator=generator),
        "shift": None,
        "residual": None,
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "segments": segments,
        "out_dtype": torch.float32,
    }
    return arguments, (q.int() * multipliers.int().repeat_interleave(group_size, 1)).to(torch.int8)


CASES = {
    "3x3": {},
    "two segments": {"segments": (4, 12)},
    "1x1": {"kernel": (1, 1), "padding": (0, 0)},
    "stride": {"stride": (2, 2), "group_size": 8},
    "odd number of groups": {"segments": (12,), "group_size": 4},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_8_bit_convolution_of_the_expanded_weights_bit_for_bit(case):
    """`w8a8_conv2d` is compared with float64; the expansion, here by the definition, is all that is new."""
    arguments, integers = inputs(**case)
    eight = {name: value for name, value in arguments.items() if name not in FOUR_BIT_ONLY}
    assert torch.equal(w4a8_conv2d(**arguments), w8a8_conv2d(**eight | {"codes": integers}))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_codebook_gives_the_8_bit_convolution_of_its_entries_bit_for_bit(case):
    arguments, _ = inputs(**case)
    codebook = torch.randint(-128, 128, (4, 16), dtype=torch.int8)
    u = unpack_int4(arguments["codes"], arguments["group_size"]).long() + 8
    eight = {name: value for name, value in arguments.items() if name not in FOUR_BIT_ONLY}
    expected = w8a8_conv2d(**eight | {"codes": codebook.gather(1, u)})
    assert torch.equal(w4a8_conv2d(**arguments | {"multipliers": None, "codebook": codebook}), expected)


def test_int32_gives_the_accumulators_of_all_segments():
    arguments, integers = inputs(segments=(4, 12))
    eight = {name: value for name, value in arguments.items() if name not in FOUR_BIT_ONLY}
    changes = {"out_dtype": torch.int32}
    assert torch.equal(w4a8_conv2d(**arguments | changes), w8a8_conv2d(**eight | changes | {"codes": integers}))


def test_opcheck():
    for case in CASES.values():
        torch.library.opcheck(torch.ops.qdiff.w4a8_conv2d.default, tuple(inputs(**case)[0].values()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"group_size": 5}, "group_size"),
        ({"group_size": 16}, "group_size"),
        ({"group_size": 2}, "multipliers"),
        ({"codes": torch.zeros(4, 72, dtype=torch.uint8)}, "codes"),
        ({"multipliers": None}, "multipliers, codebook"),
        ({"codebook": torch.zeros(4, 16, dtype=torch.int8)}, "multipliers, codebook"),
        ({"multipliers": None, "codebook": torch.zeros(4, 15, dtype=torch.int8)}, "codebook"),
        ({"shift": torch.zeros(2, 5)}, "shift"),
        ({"scale": torch.ones(5)}, "scale"),
        ({"segments": (7,)}, "segments"),
        ({"x_scale": torch.ones(2, 2)}, "x_scale"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(change, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        w4a8_conv2d(**inputs()[0] | change)


def test_a_group_may_not_cross_a_segment():
    with pytest.raises(ValueError, match="group_size"):
        w4a8_conv2d(**inputs(segments=(6, 10), group_size=4)[0])
