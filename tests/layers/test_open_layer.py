from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff.calibration import collect
from qdiff.denoising import StepTracker
from qdiff.layers import OpenLayer, QuantConv2d, QuantLinear
from qdiff.methods.quantize import draft_layer
from qdiff.recipe import MethodSpec, Recipe, WeightSpec

TIMESTEPS = (100.0, 900.0)


def layer_and_plan(kind, **changes):
    torch.manual_seed(0)
    conv = kind == "conv2d"
    layer = nn.Conv2d(32, 24, 3, padding=1, stride=2) if conv else nn.Linear(64, 24)
    fields = {"rounding": MethodSpec.of("nearest"), "weight": WeightSpec(4, 16), "overrides": (), **changes}
    modes = {"dynamic": "dynamic", "static": "static"}
    recipe = Recipe.preset("w4a8").replace(**fields)
    return layer, recipe.plan("layer", kind, (16, 16) if conv else (64,), lambda spec: modes.get(spec.name, "temporal"))


def statistics_of(layer, x):
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, sample, timestep):
            return self.layer(sample)

    denoiser = Denoiser()

    def run():
        for timestep in TIMESTEPS:
            denoiser(x * timestep / 500, torch.tensor(timestep))

    with torch.no_grad():
        return collect(run, denoiser, {"layer": layer}, {"samples", "histograms"}, progress=False).layers["layer"]


TRANSFORMS = {
    "plain": (),
    "smoothed": (MethodSpec.of("smoothing"),),
    "shifted": (MethodSpec.of("shift"),),
    "low rank": (MethodSpec.of("low_rank", rank=4, min_gain=0.0),),
    "rotated": (MethodSpec.of("hadamard"),),
    "corrected": (MethodSpec.of("bias_correction"),),
}


@pytest.mark.parametrize("range_", ["dynamic", "static", "temporal", "none"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_linear_layer_is_the_quantized_one(range_, transform):
    changes = {"activation_bits": 16} if range_ == "none" else {"linear_range": MethodSpec.of(range_)}
    layer, plan = layer_and_plan("linear", transforms=TRANSFORMS[transform], **changes)
    _assert_same(layer, plan, QuantLinear, torch.randn(2, 20, 64) + 0.3)


@pytest.mark.parametrize("range_", ["static", "temporal"])
@pytest.mark.parametrize("bits", [4, 8])
def test_convolution_of_two_segments_is_the_quantized_one(range_, bits):
    weight = WeightSpec(4, 16) if bits == 4 else WeightSpec(8, -1, "channel")
    layer, plan = layer_and_plan("conv2d", conv_range=MethodSpec.of(range_), weight=weight)
    _assert_same(layer, plan, QuantConv2d, torch.randn(2, 32, 9, 9) + 0.3)


def _assert_same(layer, plan, kind, x):
    draft = draft_layer(plan, layer, statistics_of(layer, x))
    tracker = StepTracker(TIMESTEPS)
    tracker.set(torch.tensor([300.0, 800.0]), 2)
    quantized = kind.from_float(layer, plan, draft.finished())
    quantized.tracker = tracker
    opened = OpenLayer(layer, plan, draft.finished(), tracker)
    opened.matrix = draft.rounded.dequantize()
    with torch.no_grad():
        wanted = quantized(x)
        # The branch is stored in half precision.
        torch.testing.assert_close(opened(x), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        assert not torch.allclose(wanted, layer(x), rtol=1e-3, atol=1e-3)


def test_gradient_passes_rounding_and_ends_where_activations_are_clipped():
    layer, plan = layer_and_plan("linear", linear_range=MethodSpec.of("static"))
    x = torch.randn(2, 20, 64)
    draft = draft_layer(plan, layer, statistics_of(layer, x * 0.2))
    opened = OpenLayer(layer, plan, draft.finished(), StepTracker(TIMESTEPS))
    opened.matrix = draft.rounded.dequantize().requires_grad_()
    x.requires_grad_()
    with torch.enable_grad():
        total = opened(x).sum()
    slope_x, slope_matrix = torch.autograd.grad(total, [x, opened.matrix])
    step = draft.act_scales[0, 0]
    codes = (x.detach() / step).clamp(-127, 127)
    inside = (x.detach() / step).abs() < 127
    assert 0.3 < inside.float().mean() < 0.95
    torch.testing.assert_close(slope_x, inside * opened.matrix.detach().sum(0))
    torch.testing.assert_close(slope_matrix, (codes.round() * step).sum((0, 1)).expand(24, -1), rtol=1e-4, atol=1e-4)
