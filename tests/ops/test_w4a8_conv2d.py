import pytest
import torch

from qdiff.numerics.packing import pack_int4, pack_multipliers
from qdiff.ops import w4a8_conv2d, w8a8_conv2d


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
        "scale": torch.rand(n, generator=generator) + 0.1,
        "group_size": group_size,
        "bias": torch.randn(n, generator=generator),
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
    eight = {name: value for name, value in arguments.items() if name not in ("multipliers", "group_size")}
    assert torch.equal(w4a8_conv2d(**arguments), w8a8_conv2d(**eight | {"codes": integers}))


def test_opcheck():
    for case in CASES.values():
        torch.library.opcheck(w4a8_conv2d, tuple(inputs(**case)[0].values()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"group_size": 5}, "group_size"),
        ({"group_size": 16}, "group_size"),
        ({"group_size": 2}, "multipliers"),
        ({"codes": torch.zeros(4, 72, dtype=torch.uint8)}, "codes"),
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
