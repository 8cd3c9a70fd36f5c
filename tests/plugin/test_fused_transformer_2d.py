"""Transformers of images: channels-last order is kept to the end, with diffusers' values."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from qdiff.layers import QuantConv2d, QuantizedWeights, QuantLinear
from qdiff.numerics.gemm_layout import to_gemm
from qdiff.numerics.ranges import LEVELS
from qdiff.numerics.two_level import fit_two_level, round_two_level
from qdiff.ops import backend
from qdiff.plugin.fuse import fuse_blocks
from qdiff.plugin.fused_transformer_2d import FusedTransformer2D
from qdiff.recipe import LayerPlan, MethodSpec

pytestmark = pytest.mark.usefixtures("inference")

CHANNELS, TEXT = 64, 32


@pytest.fixture
def added(monkeypatch) -> list[QuantLinear]:
    """The layers that added a residual themselves."""
    layers, forward = [], QuantLinear.forward_activated

    def and_tell(layer, x, activation, residual=None):
        if activation == "none" and residual is not None:
            layers.append(layer)
        return forward(layer, x, activation, residual)

    monkeypatch.setattr(QuantLinear, "forward_activated", and_tell)
    return layers


def quantized(layer: nn.Linear | nn.Conv2d) -> QuantLinear | QuantConv2d:
    linear = isinstance(layer, nn.Linear)
    plan = LayerPlan(
        name="layer",
        kind="linear" if linear else "conv2d",
        weight_bits=4,
        group_size=32,
        granularity="group",
        activation_bits=8,
        range_mode="dynamic" if linear else "static",
        range=MethodSpec("dynamic" if linear else "static"),
        transforms=(),
        rounding=MethodSpec("nearest"),
        segments=(layer.weight.shape[1],),
    )
    matrix = layer.weight.float() if linear else to_gemm(layer.weight.float(), plan.segments)
    scale, multipliers = fit_two_level(matrix, 32)
    table = None if linear else torch.full((1, 1), 4.0) / LEVELS
    weights = QuantizedWeights(round_two_level(matrix, scale, multipliers, 32), multipliers, scale, act_scales=table)
    return (QuantLinear if linear else QuantConv2d).from_float(layer, plan, weights)


def model_of(linear: bool = True, dtype: torch.dtype = torch.float32, quantize: bool = True) -> FusedTransformer2D:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": CHANNELS, "cross_attention_dim": TEXT}
    model = Transformer2DModel(**sizes, norm_num_groups=8, use_linear_projection=linear).to(dtype).eval()
    if quantize:
        model.proj_out = quantized(model.proj_out)
    fuse_blocks(model)
    assert type(model) is FusedTransformer2D
    return model


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    x = 2 * torch.randn(2, CHANNELS, 7, 5) + 1
    context = torch.randn(2, 9, TEXT)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return {"hidden_states": x, "encoder_hidden_states": context.to(dtype)}


def run(model: Transformer2DModel, given: dict[str, Tensor]) -> Tensor:
    return model(**given, return_dict=False)[0]


def plain(model: FusedTransformer2D) -> Transformer2DModel:
    """The same, of diffusers' own class."""
    other = copy.deepcopy(model)
    other.__class__ = Transformer2DModel
    return other


@pytest.mark.parametrize("quantize", [True, False], ids=["quantized", "float"])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "convolution"])
def test_is_diffusers_model(linear, quantize, added):
    model, given = model_of(linear, quantize=quantize), inputs()
    expected, result = run(plain(model), given), run(model, given)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert added == ([model.proj_out] if linear and quantize else [])
    if linear or quantize:
        # In float32 the epilogue rounds as the modules do.
        assert torch.equal(result, expected)
    else:
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_is_no_farther_from_float32_than_diffusers_model(dtype, added):
    model, given = model_of(dtype=dtype), inputs(dtype)
    tokens = torch.randn(2, 35, CHANNELS).to(dtype)
    x = given["hidden_states"]
    exact = x.double() + model.proj_out(tokens.float()).double().view(2, 7, 5, -1).permute(0, 3, 1, 2)
    end = {"hidden_states": tokens, "residual": x, "batch_size": 2, "height": 7, "width": 5, "inner_dim": CHANNELS}
    own, result = (each._get_output_for_continuous_inputs(**end) for each in (plain(model), model))
    assert len(added) == 1
    assert result.dtype == dtype
    assert (result - exact).norm() <= (own - exact).norm() * 1.001


def test_another_order_is_diffusers_own(added):
    model, given = model_of(), inputs()
    given["hidden_states"] = given["hidden_states"].contiguous()
    result = run(model, given)
    assert result.is_contiguous()
    assert torch.equal(result, run(plain(model), given))
    assert not added


def test_layers_that_somebody_listens_to_run_by_themselves(added):
    model, given, seen = model_of(), inputs(), []
    expected = run(plain(model), given)
    handle = model.proj_out.register_forward_hook(lambda *call: seen.append(call))
    assert torch.equal(run(model, given), expected)
    assert len(seen) == 1
    handle.remove()
    model.proj_out.forward = model.proj_out.forward  # as offloaders do
    assert torch.equal(run(model, given), expected)
    model.proj_out = nn.Sequential(copy.deepcopy(model.proj_out))
    assert torch.equal(run(model, given), expected)
    assert not added


def test_a_gradient_reaches_what_is_before(added):
    model, given = model_of(quantize=False), inputs()
    x = given["hidden_states"].requires_grad_()
    with torch.enable_grad():
        run(model, given).sum().backward()
    assert x.grad is not None
    assert not added


def test_compiles_whole():
    model, given = model_of(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(run(compiled, given), run(model, given))


def test_survives_copies(added):
    model, given = model_of(), inputs()
    expected = run(model, given)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again.load_state_dict(model.state_dict())
        assert torch.equal(run(again, given), expected)
    assert len(added) == 3


def test_only_diffusers_class_is_fused():
    class Own(Transformer2DModel):
        pass

    sizes = {"num_attention_heads": 1, "attention_head_dim": 32, "in_channels": 32}
    models = nn.ModuleList([Own(**sizes), Transformer2DModel(**sizes)])
    fuse_blocks(models)
    assert [type(model) for model in models] == [Own, FusedTransformer2D]


def test_pipelines(quantized_sd, generate):
    pipe = quantized_sd()
    models = [module for module in pipe.unet.modules() if isinstance(module, Transformer2DModel)]
    assert models
    assert {type(model) for model in models} == {FusedTransformer2D}
    images = generate(pipe)
    for model in models:
        model.__class__ = Transformer2DModel
    assert (generate(pipe) - images).abs().max() < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "convolution"])
def test_on_a_gpu(linear, dtype):
    model, given = model_of(linear, dtype), inputs(dtype)
    expected = run(model, given).cuda()
    model, given = model.cuda(), {name: tensor.cuda() for name, tensor in given.items()}
    with backend.use_backend("cuda"):
        result, own = run(model, given), run(plain(model), given)
    assert result.is_contiguous(memory_format=torch.channels_last)
    for other in (expected, own):
        assert float((result - other).norm() / other.norm()) < 0.02
