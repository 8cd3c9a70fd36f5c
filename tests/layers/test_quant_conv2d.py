import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdiff.denoising import StepTracker
from qdiff.layers import LayerSizes, QuantConv2d

GRID = (1.0, 500.0, 999.0)
GEOMETRIES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "down": {"kernel_size": 3, "padding": 1, "stride": 2},
    "uneven": {"kernel_size": (2, 3), "padding": (0, 2), "stride": (2, 1)},
}


@pytest.fixture
def build(make_plan, quantize):
    """Factory of a float layer and its quantized stand-in; the activation scales cover normal inputs."""

    def make(bits=4, mode="temporal", smoothed=False, segments=(24,), geometry="3x3", bias=True):
        layer = nn.Conv2d(sum(segments), 20, **GEOMETRIES[geometry], bias=bias)
        plan = make_plan("conv2d", segments, bits, mode)
        smooth = torch.rand(sum(segments)) + 0.5 if smoothed else None
        rows = {"static": 1, "temporal": len(GRID)}.get(mode)
        act_scales = None if rows is None else torch.full((rows, len(segments)), 6 / 127)
        quantized = QuantConv2d.from_float(layer, plan, quantize(layer.weight, plan, smooth, None, act_scales))
        quantized.tracker = StepTracker(GRID)
        quantized.tracker.set(500, 1)
        return layer, quantized

    return make


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mode", ["static", "temporal", "none"])
@pytest.mark.parametrize("segments", [(24,), (8, 16)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("smoothed", [False, True])
def test_is_the_float_convolution_with_its_own_weight_up_to_activation_rounding(
    build, bits, mode, segments, geometry, smoothed
):
    layer, quantized = build(bits, mode, smoothed, segments, geometry)
    x = torch.randn(2, 24, 7, 6).clamp(-3, 3)
    expected = F.conv2d(x, quantized.weight, layer.bias, layer.stride, layer.padding)
    result = quantized(x)
    assert result.is_contiguous(memory_format=torch.channels_last)
    # 6 / 127 * 0.3 of unit variance is lost by rounding, times a smoothing vector between 0.5 and 1.5.
    allowed = 1e-5 if mode == "none" else 0.03
    assert float((result - expected).norm() / expected.norm()) < allowed
    assert float((quantized.weight - layer.weight).norm() / layer.weight.norm()) < (0.1 if bits == 4 else 0.02)


def test_segments_have_their_own_scales(build):
    """A skip connection 1000 times the hidden states: one scale would round those to nothing."""
    layer, quantized = build(bits=8, segments=(8, 16), geometry="1x1")
    x = torch.randn(2, 24, 5, 5)
    with torch.no_grad():
        layer.weight[:, 8:] = 0
    hidden_only = layer(x)
    x[:, 8:] *= 1000
    quantized.act_scales.copy_(torch.tensor([4 / 127, 4000 / 127]).expand(3, 2))
    skip = F.conv2d(x[:, 8:], quantized.weight[:, 8:])
    error = quantized(x) - skip - hidden_only
    assert float(error.norm() / skip.norm()) < 0.02
    quantized.act_scales[:, 0] = 1e9
    silent = quantized(x) - skip - layer.bias[:, None, None]
    assert float(silent.norm() / skip.norm()) < 0.02
    x[:, 8:] = 0
    quantized.act_scales[:, 0] = 4 / 127
    assert float((quantized(x) - hidden_only).norm() / hidden_only.norm()) < 0.03


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_any_memory_order(build, memory_format):
    _, quantized = build(segments=(8, 16), smoothed=True)
    x = torch.randn(2, 24, 7, 6)
    assert torch.equal(quantized(x.contiguous(memory_format=memory_format)), quantized(x))


def test_an_image_without_a_batch_and_an_empty_batch(build):
    _, quantized = build()
    x = torch.randn(24, 7, 6)
    assert torch.equal(quantized(x), quantized(x[None])[0])
    assert quantized(x[None][:0]).shape == (0, 20, 7, 6)


@pytest.mark.parametrize("mode", ["static", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_output_has_the_inputs_dtype(build, mode, dtype):
    _, quantized = build(mode=mode)
    x = torch.randn(2, 24, 7, 6)
    full = quantized(x)
    result = quantized.to(dtype)(x.to(dtype))
    assert result.dtype == dtype
    assert float((result.float() - full).norm() / full.norm()) < 0.02


def test_every_sample_has_its_timesteps_scale(build):
    layer, quantized = build(bits=8)
    quantized.act_scales.copy_(torch.tensor([[6 / 127], [1e3], [6 / 127]]))
    quantized.tracker.set(torch.tensor([1, 500, 999]), 3)
    x = torch.randn(3, 24, 5, 5)
    result, expected = quantized(x), layer(x)
    torch.testing.assert_close(result[[0, 2]], expected[[0, 2]], rtol=0, atol=0.15)
    torch.testing.assert_close(result[1], layer.bias[:, None, None].expand(20, 5, 5))  # steps of 1000: every code is 0


@pytest.mark.parametrize(
    "changes", [{}, {"smoothed": True}, {"mode": "static", "segments": (8, 16)}, {"bits": 8}], ids=str
)
def test_an_empty_layer_takes_the_state_strictly(build, changes):
    layer, quantized = build(**changes)
    empty = QuantConv2d.empty(layer.to("meta"), quantized.plan, LayerSizes.of_layer(quantized))
    empty.load_state_dict(quantized.state_dict(), strict=True, assign=True)
    empty.tracker = quantized.tracker
    x = torch.randn(2, 24, 7, 6)
    assert torch.equal(empty(x), quantized(x))


def test_is_a_convolution_to_others(build):
    layer, quantized = build()
    assert isinstance(quantized, nn.Conv2d)
    assert (quantized.kernel_size, quantized.stride, quantized.padding) == ((3, 3), (1, 1), (1, 1))
    assert quantized.weight.shape == layer.weight.shape
    assert "int4/8" in repr(quantized)
    assert "temporal" in repr(quantized)


def test_zeros_and_outliers(build):
    layer, quantized = build(segments=(8, 16))
    assert torch.equal(quantized(torch.zeros(1, 24, 3, 3)), layer.bias[None, :, None, None].expand(1, 20, 3, 3))
    x = torch.randn(1, 24, 5, 5)
    x[0, 0, 0, 0] = 1e4
    assert torch.isfinite(quantized(x)).all()


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"dilation": 2}, {"padding": 1, "padding_mode": "circular"}, {"padding": "same"}],
    ids=str,
)
def test_convolutions_that_are_not_built(make_plan, options):
    layer = nn.Conv2d(16, 8, 3, **options)
    with pytest.raises(ValueError, match=r"block\.layer: .*keep this layer"):
        QuantConv2d.empty(layer, make_plan("conv2d", (16,), mode="static"))


def test_plans_that_do_not_fit(make_plan, quantize):
    layer = nn.Conv2d(16, 8, 3)
    with pytest.raises(ValueError, match="segments"):
        QuantConv2d.empty(layer, make_plan("conv2d", (8, 16), mode="static"))
    with pytest.raises(ValueError, match="low-rank"):
        QuantConv2d.empty(layer, make_plan("conv2d", (16,), mode="static"), LayerSizes(rank=2))
    plan = make_plan("conv2d", (16,), mode="none")
    branch = (torch.zeros(2, 144), torch.zeros(8, 2))
    with pytest.raises(ValueError, match="low-rank"):
        QuantConv2d.from_float(layer, plan, quantize(layer.weight, plan, low_rank=branch))


def test_numbers_and_not_a_layer_make_a_float_convolution():
    """What peft does with type(base_layer) for the two convolutions of a LoRA branch."""
    made = QuantConv2d(8, 4, 3, padding=1, bias=False)
    assert type(made) is nn.Conv2d
    assert made.weight.shape == (4, 8, 3, 3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("segments", [(24,), (8, 16)], ids=str)
def test_normalizes_and_adds_in_its_own_passes(build, bits, segments):
    _, quantized = build(bits, "temporal", True, segments)
    norm = nn.GroupNorm(4, 24, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 24, 7, 6) + 1
    shift, residual = torch.randn(2, 20), torch.randn(2, 20, 7, 6)
    plain = quantized(F.silu(norm(x)))
    assert quantized.takes_normalized
    assert torch.equal(quantized.forward_normalized(x, norm), plain)
    both = quantized.forward_normalized(x, norm, shift=shift, residual=residual)
    assert torch.equal(both, plain + shift[:, :, None, None] + residual)
    norm = nn.GroupNorm(4, 24, affine=False)
    assert torch.equal(quantized.forward_normalized(x, norm), quantized(F.silu(norm(x))))


def test_floats_are_not_normalized(build):
    assert not build(mode="none")[1].takes_normalized
