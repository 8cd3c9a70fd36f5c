"""Layers found, plans made, denoisers refused; the skip split is checked against what a UNet really concatenates."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from qdiff.denoising import StepTracker
from qdiff.plugin.structure import Kept, check_quantizable, find_denoiser, resolve, skip_segments
from qdiff.recipe import LayerPlan, MethodSpec, Recipe, WeightSpec

W4A8 = Recipe.preset("w4a8")


def test_find_denoiser_of_unet_and_transformer(tiny_sd, tiny_dit):
    sd, dit = tiny_sd(), tiny_dit()
    assert find_denoiser(sd) == ("unet", sd.unet)
    assert find_denoiser(dit) == ("transformer", dit.transformer)


@pytest.mark.parametrize("thing", [None, "a/path", nn.Linear(2, 2), {"unet": nn.Linear(2, 2)}], ids=repr)
def test_find_denoiser_refuses_what_is_no_pipeline(thing):
    with pytest.raises(ValueError, match=f"pipe must be a diffusers pipeline: got {type(thing).__name__}"):
        find_denoiser(thing)


def test_find_denoiser_refuses_a_pipeline_without_one(tiny_sd):
    pipe = tiny_sd()
    pipe.unet = None
    with pytest.raises(ValueError, match="denoiser called unet or transformer"):
        find_denoiser(pipe)


def test_resolve_leaves_no_layer_out(tiny_sd):
    unet = tiny_sd().unet
    expected = {n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)}
    resolved = resolve(W4A8, unet)
    assert resolved.keys() == expected
    assert resolved["conv_in"] == Kept("the recipe keeps conv_in")
    plan = resolved["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert isinstance(plan, LayerPlan)
    assert (plan.kind, plan.weight_bits, plan.segments) == ("linear", 4, (64,))


def _concatenations(monkeypatch, unet, *inputs):
    """Channel counts of every pair of 4-d tensors that the UNet concatenates while it runs."""
    seen = []
    original = torch.cat

    def recording(tensors, *args, **kwargs):
        tensors = list(tensors)
        if len(tensors) == 2 and tensors[0].ndim == 4:
            seen.append((tensors[0].shape[1], tensors[1].shape[1]))
        return original(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "cat", recording)
    with torch.no_grad():
        unet(*inputs)
    monkeypatch.undo()
    return seen


def _unets():
    yield pytest.param(
        lambda: UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64, 96), layers_per_block=2, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=8, norm_num_groups=8,
        ),
        (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 32)),
        id="condition",
    )  # fmt: skip
    yield pytest.param(
        lambda: UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), mid_block_type=None,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8, norm_num_groups=8,
        ),
        (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 32)),
        id="no mid block",
    )  # fmt: skip
    yield pytest.param(
        lambda: UNet2DModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=2, norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        (torch.randn(1, 3, 16, 16), 3),
        id="unconditional",
    )  # fmt: skip


@pytest.mark.parametrize(("build", "inputs"), list(_unets()))
def test_skip_segments_are_what_the_unet_concatenates(monkeypatch, build, inputs):
    unet = build().eval()
    segments = skip_segments(unet)
    conv1 = [pair for name, pair in segments.items() if name.endswith("conv1")]
    assert conv1 == _concatenations(monkeypatch, unet, *inputs)
    assert len(conv1) > 2
    for name, pair in segments.items():
        assert unet.get_submodule(name).in_channels == sum(pair)


SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FAMILIES = {
    # name: (model, configuration, layers kept, convolutions with a split input: two for each resnet of the up blocks)
    "sd15": (UNet2DConditionModel, {"cross_attention_dim": 768}, {"conv_in", "conv_out"}, 24),
    "sdxl": (UNet2DConditionModel, SDXL, {"conv_in", "conv_out"}, 18),
    "dit": (DiTTransformer2DModel, {"num_layers": 2}, {"pos_embed.proj", "proj_out_2"}, 0),
    "pixart": (
        PixArtTransformer2DModel,
        {"num_layers": 2, "caption_channels": 4096, "sample_size": 128},
        {"pos_embed.proj", "proj_out"},
        0,
    ),
    "sd3": (SD3Transformer2DModel, {"num_layers": 2}, {"pos_embed.proj", "proj_out"}, 0),
    "flux": (FluxTransformer2DModel, {"num_layers": 1, "num_single_layers": 1}, {"x_embedder", "proj_out"}, 0),
}


@pytest.mark.parametrize(("model", "config", "kept", "split"), FAMILIES.values(), ids=FAMILIES)
def test_default_recipe_fits_the_families_in_use(model, config, kept, split):
    """At their real widths, on the meta device: no group size that does not divide, first and last layers kept."""
    with init_empty_weights(include_buffers=False):
        denoiser = model(**config)
    resolved = resolve(W4A8, denoiser)
    assert {name for name, plan in resolved.items() if isinstance(plan, Kept)} == kept
    assert sum(len(plan.segments) > 1 for plan in resolved.values() if isinstance(plan, LayerPlan)) == split


def test_no_skip_segments_in_a_transformer(tiny_dit):
    assert skip_segments(tiny_dit().transformer) == {}


def test_split_skips_can_be_turned_off(tiny_sd):
    unet = tiny_sd().unet
    split = resolve(W4A8, unet)["up_blocks.0.resnets.0.conv1"]
    whole = resolve(W4A8.replace(split_skips=False), unet)["up_blocks.0.resnets.0.conv1"]
    assert len(split.segments) == 2
    assert whole.segments == (sum(split.segments),)


def test_group_size_that_does_not_divide_names_layers_and_what_works(tiny_sd):
    unet = tiny_sd().unet
    recipe = W4A8.replace(weight=WeightSpec(bits=4, group_size=96))
    with pytest.raises(
        ValueError, match=r"group_size must .*divide.*got group_size=96.*use group_size=\d+.*more layers"
    ) as caught:
        resolve(recipe, unet)
    advised = int(str(caught.value).split("use group_size=")[1].split(" ")[0])
    assert resolve(recipe.replace(weight=WeightSpec(bits=4, group_size=advised)), unet)


def test_nothing_left_to_quantize(tiny_dit):
    with pytest.raises(ValueError, match=r"nothing to quantize.*the recipe keeps \*"):
        resolve(W4A8.replace(keep=("*",)), tiny_dit().transformer)


def test_unknown_method_suggests_the_nearest(tiny_dit):
    with pytest.raises(ValueError, match="temporal"):
        resolve(W4A8.replace(linear_range=MethodSpec("temporall")), tiny_dit().transformer)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "groups=8"),
        (nn.Conv2d(8, 8, 3, dilation=2), "dilation=(2, 2)"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "padding_mode=reflect"),
        (nn.Conv2d(8, 8, 3, padding="same"), "padded by name"),
        (nn.Conv1d(8, 8, 3), "Conv1d"),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8), "NonDynamicallyQuantizableLinear"),
        (nn.Embedding(8, 8, max_norm=1.0), "max_norm"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_layers_without_a_quantized_form_are_kept_with_the_reason(layer, reason):
    model = nn.ModuleDict({"odd": layer, "plain": nn.Linear(64, 64)})
    kept = resolve(W4A8, model)["odd"]
    assert isinstance(kept, Kept)
    assert reason in kept.reason


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(tiny_sd, poison):
    unet = tiny_sd().unet
    with torch.no_grad():
        unet.up_blocks[0].resnets[1].conv2.weight[3, 1, 0, 0] = poison
    with pytest.raises(ValueError, match=r"'up_blocks\.0\.resnets\.1\.conv2' has NaN or infinite values in its weight"):
        check_quantizable(unet)


def test_offloaded_weights_are_refused(tiny_sd):
    unet = tiny_sd().unet
    unet.conv_out.to("meta")
    with pytest.raises(ValueError, match="quantize before enabling offloading"):
        check_quantizable(unet)


def test_lora_adapters_are_refused(tiny_sd):
    peft = pytest.importorskip("peft")
    unet = tiny_sd().unet
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), adapter_name="sketch")
    with pytest.raises(ValueError, match=r"LoRA adapters \(sketch\)"):
        check_quantizable(unet)


def test_a_compiled_denoiser_is_refused(tiny_sd):
    with pytest.raises(ValueError, match="quantize the pipeline first"):
        check_quantizable(torch.compile(tiny_sd().unet))


def test_temporal_scales_are_resampled_together(quantized_sd, generate, monkeypatch):
    pipe = quantized_sd()
    images, tracker = generate(pipe), pipe.unet.qdiff.tracker
    temporal = [m for m in pipe.unet.modules() if getattr(getattr(m, "plan", None), "range_mode", None) == "temporal"]
    assert temporal
    assert all(tracker._shared_rows(layer.act_scales) is not None for layer in temporal)
    monkeypatch.setattr(StepTracker, "share", lambda tracker, tables: None)
    assert torch.equal(generate(pipe), images)
    assert tracker._shared_rows(temporal[0].act_scales) is None
