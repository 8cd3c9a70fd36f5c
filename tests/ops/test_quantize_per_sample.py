import pytest
import torch

from qdiff.ops import quantize_per_sample


def reference(x, scale, smooth, segments, channel_dim):
    """float64, one sample and one segment at a time: what the code is before rounding, without saturation."""
    repeat = x.shape[0] // scale.shape[0]
    result = torch.empty(x.shape, dtype=torch.double)
    for b in range(x.shape[0]):
        start = 0
        for s, width in enumerate(segments):
            part = x[b].double().narrow(channel_dim - 1, start, width)
            factor = 1 / scale[b // repeat, s].double()
            if smooth is not None:
                shape = [1] * part.dim()
                shape[channel_dim - 1] = -1
                factor = factor * smooth[start : start + width].double().view(shape)
            result[b].narrow(channel_dim - 1, start, width).copy_(part * factor)
            start += width
    return result


CASES = {
    "image": ((4, 6, 5, 3), (6,), 1, 4),
    "one scale for all": ((4, 6, 5, 3), (6,), 1, 1),
    "two scales for four": ((4, 6, 5, 3), (6,), 1, 2),
    "segments": ((4, 7, 5, 3), (3, 4), 1, 4),
    "three segments": ((2, 7, 5, 3), (1, 2, 4), 1, 1),
    "tokens": ((4, 9, 12), (12,), 2, 4),
    "vectors": ((4, 12), (5, 7), 1, 2),
    "large": ((3, 40, 100, 110), (40,), 1, 3),
}


@pytest.mark.parametrize(("shape", "segments", "channel_dim", "rows"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothed", [False, True])
def test_codes_are_the_nearest_and_saturate(shape, segments, channel_dim, rows, dtype, smoothed):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    scale = (torch.rand(rows, len(segments), generator=generator) + 0.5) * 4 / 127  # some values are beyond the range
    smooth = torch.rand(shape[channel_dim], generator=generator) + 0.5 if smoothed else None
    codes = quantize_per_sample(x, scale, smooth, segments, channel_dim)
    exact = reference(x, scale, smooth, segments, channel_dim)
    assert codes.dtype == torch.int8
    assert (codes[exact >= 127] == 127).all()
    assert (codes[exact <= -127] == -127).all()
    inside = exact.abs() <= 127
    assert 0 < int(inside.sum()) < inside.numel()
    # float32 loses at most 2^-22 of up to 127 steps.
    assert ((codes.double() - exact)[inside].abs() <= 0.5 + 127 * 2**-22).all()


@pytest.mark.parametrize("bits", [4, 6])
def test_fewer_bits_saturate_sooner(bits):
    levels = 2 ** (bits - 1) - 1
    x = torch.randn(2, 6, 5, 3, generator=torch.Generator().manual_seed(0)) * 3
    scale = torch.full((1, 1), 4 / levels)
    exact = reference(x, scale, None, [6], 1)
    codes = quantize_per_sample(x, scale, None, [6], 1, levels)
    assert (int(codes.min()), int(codes.max())) == (-levels, levels)
    assert torch.equal(codes.double(), exact.round().clamp(-levels, levels))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_images_come_out_channels_last_from_any_order(order):
    x = torch.randn(2, 8, 6, 5)
    scale = torch.full((2, 1), 0.02)
    codes = quantize_per_sample(x.contiguous(memory_format=order), scale, None, [8], 1)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(codes, quantize_per_sample(x, scale, None, [8], 1))
    assert torch.equal(codes, quantize_per_sample(x.flip(3).flip(3)[:, :, ::1], scale, None, [8], 1))


def test_negative_channel_dim_counts_from_the_end():
    x, scale = torch.randn(2, 5, 8), torch.full((1, 1), 0.02)
    assert torch.equal(quantize_per_sample(x, scale, None, [8], -1), quantize_per_sample(x, scale, None, [8], 2))


def test_strided_input_and_unchanged_input():
    x = torch.randn(8, 10, 4).transpose(0, 2)
    before, scale = x.clone(), torch.full((4, 1), 0.02)
    assert torch.equal(
        quantize_per_sample(x, scale, None, [8], 2), quantize_per_sample(x.contiguous(), scale, None, [8], 2)
    )
    assert torch.equal(x, before)


def test_outliers_saturate_and_change_nothing_else():
    x = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    scale = torch.full((1, 1), 4 / 127)
    calm = quantize_per_sample(x, scale, None, [8], 1)
    x[0, 0, 0, 0], x[0, 1, 0, 0], x[0, 2, 0, 0] = 1e4, -3e38, float("inf")
    codes = quantize_per_sample(x, scale, None, [8], 1)
    assert codes[0, :3, 0, 0].tolist() == [127, -127, 127]
    assert torch.equal(codes[:, 3:], calm[:, 3:])


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-30, 1e30])
def test_zeros_have_code_zero_at_every_scale(scale):
    assert (quantize_per_sample(torch.zeros(1, 4), torch.full((1, 1), scale), None, [4], 1) == 0).all()


def test_no_samples():
    assert quantize_per_sample(torch.zeros(0, 4), torch.ones(0, 1), None, [4], 1).shape == (0, 4)
    assert quantize_per_sample(torch.zeros(0, 4), torch.ones(1, 1), None, [4], 1).shape == (0, 4)


def test_opcheck():
    for smooth in (None, torch.rand(8) + 0.5):
        torch.library.opcheck(
            torch.ops.qdiff.quantize_per_sample.default,
            (torch.randn(2, 8, 4, 4), torch.rand(2, 2) + 0.1, smooth, [3, 5], 1),
        )
        torch.library.opcheck(
            torch.ops.qdiff.quantize_per_sample.default, (torch.randn(2, 4, 8), torch.rand(1, 1) + 0.1, smooth, [8], -1)
        )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int8)}, "x"),
        ({"x": torch.zeros(8)}, "x"),
        ({"scale": torch.ones(2)}, "scale"),
        ({"scale": torch.ones(3, 1)}, "scale"),
        ({"scale": torch.ones(0, 1)}, "scale"),
        ({"scale": torch.ones(2, 1, dtype=torch.double)}, "scale"),
        ({"smooth": torch.ones(3)}, "smooth"),
        ({"segments": [4, 5]}, "segments"),
        ({"segments": []}, "segments"),
        ({"segments": [9, -1]}, "segments"),
        ({"channel_dim": 0}, "channel_dim"),
        ({"channel_dim": -2}, "channel_dim"),
        ({"channel_dim": 2}, "channel_dim"),
    ],
    ids=str,
)
def test_wrong_arguments(change, named):
    good = {"x": torch.zeros(2, 8), "scale": torch.ones(2, 1), "smooth": None, "segments": [8], "channel_dim": 1}
    quantize_per_sample(**good)
    with pytest.raises(ValueError, match=f"^{named}: got"):
        quantize_per_sample(**good | change)
