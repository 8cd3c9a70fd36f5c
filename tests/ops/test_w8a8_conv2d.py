import sys

import pytest
import torch
import torch.nn.functional as F

from qdiff.numerics.gemm_layout import to_gemm
from qdiff.ops import w8a8_conv2d

CASES = {
    "3x3": {},
    "1x1": {"kernel": (1, 1), "padding": (0, 0)},
    "stride 2": {"stride": (2, 2)},
    "everything differs": {"kernel": (2, 3), "stride": (3, 2), "padding": (2, 1), "size": (7, 10)},
    "no padding": {"padding": (0, 0)},
    "two segments": {"segments": (2, 4)},
    "three segments": {"segments": (1, 2, 3)},
    "two scales for four": {"batch": 4, "rows": 2},
    "one scale for all": {"batch": 3, "rows": 1},
    "one pixel": {"size": (1, 1)},
    "one channel": {"segments": (1,)},
    "no samples": {"batch": 0, "rows": 0},
    "many blocks": {"batch": 5, "segments": (30, 34), "size": (40, 41)},
}


def inputs(
    batch=2, segments=(6,), size=(6, 5), n=4, kernel=(3, 3), stride=(1, 1), padding=(1, 1), rows=None, added=True
):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (n, sum(segments), *kernel), dtype=torch.int8, generator=generator)
    x = torch.randint(-127, 128, (batch, sum(segments), *size), dtype=torch.int8, generator=generator)
    arguments = {
        "x_codes": x.contiguous(memory_format=torch.channels_last),
        "x_scale": torch.rand(batch if rows is None else rows, len(segments), generator=generator) + 0.1,
        "codes": to_gemm(weight, segments),
        "scale": torch.rand(n, generator=generator) + 0.1,
        "bias": torch.randn(n, generator=generator) if added else None,
        "shift": torch.randn(batch, n, generator=generator) * 1000 if added else None,
        "residual": None,
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "segments": segments,
        "out_dtype": torch.float32,
    }
    if added:
        shape = [batch, n, *((size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2))]
        residual = torch.randn(shape, generator=generator) * 1000
        arguments["residual"] = residual.contiguous(memory_format=torch.channels_last)
    return arguments, weight


def reference(arguments, weight):
    """conv2d of integer-valued float64 tensors is exact; a segment at a time."""
    x, segments = arguments["x_codes"].double(), arguments["segments"]
    scales = arguments["x_scale"].double()
    scales = scales.repeat_interleave(x.shape[0] // max(1, scales.shape[0]), 0)
    y, start = 0.0, 0
    for s, width in enumerate(segments):
        part = slice(start, start + width)
        acc = F.conv2d(x[:, part], weight[:, part].double(), None, arguments["stride"], arguments["padding"])
        y, start = y + acc * scales[:, s, None, None, None], start + width
    y = y * arguments["scale"].double()[:, None, None]
    if arguments["bias"] is None:
        return y
    y = y + arguments["bias"].double()[:, None, None] + arguments["shift"].double()[:, :, None, None]
    return y + arguments["residual"].double()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "bias, shift and residual"])
def test_equals_the_float64_convolution(case, added):
    arguments, weight = inputs(**case, added=added)
    result, expected = w8a8_conv2d(**arguments), reference(arguments, weight)
    assert result.shape == expected.shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    # Five float32 roundings of terms no larger than the largest value here.
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6 * largest)


def test_the_integer_part_is_exact():
    """Unit scales: what is left is the exact sum, rounded once to float32 (here it does not need to be)."""
    arguments, weight = inputs(segments=(64,), added=False)
    arguments["x_scale"].fill_(1)
    arguments["scale"].fill_(1)
    assert torch.equal(w8a8_conv2d(**arguments).double(), reference(arguments, weight))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_int32_gives_the_accumulators_of_all_segments(case):
    arguments, weight = inputs(**case)
    result = w8a8_conv2d(**arguments | {"out_dtype": torch.int32})
    assert result.dtype == torch.int32
    assert result.is_contiguous(memory_format=torch.channels_last)
    geometry = (arguments["stride"], arguments["padding"])
    assert torch.equal(result.double(), F.conv2d(arguments["x_codes"].double(), weight.double(), None, *geometry))


def test_what_is_added_is_added_in_the_documented_order():
    """Values that float32 would sum to something else in another order."""
    arguments, _ = inputs(size=(1, 1))
    arguments["scale"].zero_()
    arguments["bias"].fill_(1.0)
    arguments["shift"].fill_(2.0**30)
    arguments["residual"].fill_(-(2.0**30))
    assert (w8a8_conv2d(**arguments) == 0).all()  # not 1: the bias was lost when the shift came


@pytest.mark.parametrize("block_bytes", [1, 1 << 12, 1 << 30])
def test_the_size_of_blocks_changes_nothing(monkeypatch, block_bytes):
    arguments, _ = inputs(batch=3, segments=(2, 4), stride=(2, 1))
    expected = w8a8_conv2d(**arguments)
    monkeypatch.setattr(sys.modules["qdiff.ops.w8a8_conv2d"], "_BLOCK_BYTES", block_bytes)
    assert torch.equal(w8a8_conv2d(**arguments), expected)


def test_any_memory_order_of_the_codes():
    arguments, _ = inputs()
    x = arguments["x_codes"]
    expected = w8a8_conv2d(**arguments)
    for order in (x.contiguous(), x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)):
        assert torch.equal(w8a8_conv2d(**arguments | {"x_codes": order}), expected)
    assert torch.equal(w8a8_conv2d(**arguments | {"residual": arguments["residual"].contiguous()}), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_result_is_the_float32_result_cast_once(dtype):
    arguments, _ = inputs(segments=(2, 4))
    residual = arguments["residual"].to(dtype)
    half = w8a8_conv2d(**arguments | {"residual": residual, "out_dtype": dtype})
    assert torch.equal(half, w8a8_conv2d(**arguments | {"residual": residual.float()}).to(dtype))


def test_opcheck():
    for case in ("3x3", "everything differs", "two segments"):
        torch.library.opcheck(torch.ops.qdiff.w8a8_conv2d.default, tuple(inputs(**CASES[case])[0].values()))
    torch.library.opcheck(
        torch.ops.qdiff.w8a8_conv2d.default, tuple((inputs()[0] | {"out_dtype": torch.int32}).values())
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x_codes": torch.zeros(2, 6, 6, 5)}, "x_codes"),
        ({"x_codes": torch.zeros(6, 6, 5, dtype=torch.int8)}, "x_codes"),
        ({"x_scale": torch.ones(2)}, "x_scale"),
        ({"x_scale": torch.ones(3, 1)}, "x_scale"),
        ({"codes": torch.zeros(4, 53, dtype=torch.int8)}, "codes"),
        ({"scale": torch.ones(3)}, "scale"),
        ({"bias": torch.ones(3)}, "bias"),
        ({"shift": torch.ones(4)}, "shift"),
        ({"shift": torch.ones(1, 4)}, "shift"),
        ({"residual": torch.ones(2, 4, 6, 4)}, "residual"),
        ({"residual": torch.ones(2, 4, 6, 5).half()}, "residual"),
        ({"kernel": (3,)}, "kernel"),
        ({"kernel": (0, 3)}, "kernel"),
        ({"stride": (0, 1)}, "stride"),
        ({"padding": (-1, 0)}, "padding"),
        ({"segments": (5,)}, "segments"),
        ({"out_dtype": torch.int8}, "out_dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(change, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        w8a8_conv2d(**inputs()[0] | change)


def test_a_kernel_larger_than_the_image():
    with pytest.raises(ValueError, match="kernel"):
        w8a8_conv2d(**inputs(size=(2, 2), padding=(0, 0))[0])
