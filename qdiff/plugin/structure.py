"""What a pipeline is made of: its denoiser, the layers that can be quantized, and what a recipe makes of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from diffusers import DiffusionPipeline
from torch import nn

from qdiff.denoising import StepTracker
from qdiff.methods import range_mode
from qdiff.plugin.rehearse import rehearse_first_calls
from qdiff.recipe import LayerPlan, Recipe

DENOISER_NAMES = ("unet", "transformer")

# Exact types: a subclass may use its weight in a way that a quantized layer does not (LoRA wrappers, the output
# projection inside nn.MultiheadAttention), so it is kept.
_KINDS: dict[type[nn.Module], str] = {nn.Linear: "linear", nn.Conv2d: "conv2d", nn.Embedding: "embedding"}
_WEIGHTED = (nn.Linear, nn.Bilinear, nn.Embedding, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Kept:
    """A layer that stays in floating point, and why."""

    reason: str


@dataclass
class QuantizationRecord:
    """What was done to a denoiser: `denoiser.qdiff`. Plain data, copied with the denoiser by `copy.deepcopy`."""

    recipe: Recipe
    plans: dict[str, LayerPlan]
    kept: dict[str, str]
    tracker: StepTracker


def install(denoiser: nn.Module, replacements: Mapping[str, nn.Module], record: QuantizationRecord) -> None:
    """Puts each replacement in its place, wherever the module of that name is referred to, and starts the tracker.

    All of it happens or none: on any error the denoiser is as it was.
    """
    replaced = {id(denoiser.get_submodule(name)): module for name, module in replacements.items()}
    places = [
        (parent, child_name, child)
        for parent in denoiser.modules()
        for child_name, child in parent._modules.items()
        if id(child) in replaced
    ]
    for module in replacements.values():
        module.tracker = record.tracker  # type: ignore[assignment]  # a plain object, not a module
    temporal = [module for name, module in replacements.items() if record.plans[name].range_mode == "temporal"]
    hook = record.tracker.attach(denoiser, temporal)
    try:
        for parent, child_name, child in places:
            parent._modules[child_name] = replaced[id(child)]
        vars(denoiser).update(_REFUSED)
        denoiser.qdiff = record  # type: ignore[assignment]
    except BaseException:
        hook.remove()
        for name in _REFUSED:
            vars(denoiser).pop(name, None)
        for parent, child_name, child in places:
            parent._modules[child_name] = child
        raise
    rehearse_first_calls(denoiser)


def _refuse_plain_save(*args: object, **kwargs: object) -> NoReturn:
    """Stands for `denoiser.save_pretrained`: from_pretrained would skip our tensors and load random weights."""
    raise ValueError("a quantized denoiser cannot be saved by save_pretrained; use qdiff.save(pipe, directory)")


def _refuse_fusing(*args: object, **kwargs: object) -> NoReturn:
    """Stands for `denoiser.fuse_lora`: peft would add to a weight made anew on each access, and lose the sum."""
    raise ValueError(
        "LoRA adapters cannot be fused into a quantized denoiser; leave them beside it, or fuse before quantizing"
    )


# What diffusers would do wrong, and not say so, on a quantized denoiser.
_REFUSED = {"save_pretrained": _refuse_plain_save, "fuse_lora": _refuse_fusing}


def find_denoiser(pipe: object) -> tuple[str, nn.Module]:
    """The component that is run at every step, with its name in the pipeline.

    Raises:
        ValueError: `pipe` is not a diffusers pipeline, or has neither a `unet` nor a `transformer`.
    """
    if not isinstance(pipe, DiffusionPipeline):
        advice = "pass the pipeline that holds it" if isinstance(pipe, nn.Module) else "load one with from_pretrained"
        raise ValueError(f"pipe must be a diffusers pipeline: got {type(pipe).__name__}; {advice}")
    for name in DENOISER_NAMES:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return name, module
    parts = ", ".join(sorted(pipe.components)) or "no component"
    raise ValueError(
        f"pipe must have a denoiser called {' or '.join(DENOISER_NAMES)}: {type(pipe).__name__} has {parts}; "
        "use a pipeline built around a UNet or a diffusion transformer"
    )


def quantization_of(denoiser: nn.Module) -> QuantizationRecord | None:
    """The record `quantize_pipeline` or `load` left on a denoiser, or None."""
    record = getattr(denoiser, "qdiff", None)
    return record if isinstance(record, QuantizationRecord) else None


def check_quantizable(denoiser: nn.Module) -> None:
    """Refuses a denoiser whose weights are not there, or not fit, to be quantized.

    Raises:
        ValueError: it is quantized already, compiled, offloaded to the meta device, carries LoRA layers, or has a
            NaN or an infinity among its weights (the layer is named).
    """
    if quantization_of(denoiser) is not None:
        raise ValueError("the pipeline is quantized already; load the full-precision pipeline to quantize it anew")
    if hasattr(denoiser, "_orig_mod"):
        raise ValueError("the denoiser is compiled; quantize the pipeline first, then call torch.compile")
    if adapters := getattr(denoiser, "peft_config", None):
        raise ValueError(
            f"the denoiser carries LoRA adapters ({', '.join(adapters)}); call pipe.fuse_lora() and "
            "pipe.unload_lora_weights(), or unload them and load them again after quantizing"
        )
    for name, parameter in denoiser.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"the weights of {name!r} are not in memory (meta device); quantize before enabling offloading"
            )
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            layer, _, tensor = name.rpartition(".")
            raise ValueError(
                f"every weight must be finite: layer {layer!r} has NaN or infinite values in its {tensor}; "
                "load the checkpoint again, or in torch.float32 or torch.bfloat16 if it overflowed in float16"
            )


def named_layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear, convolution and embedding layer (subclasses too), in the order of definition."""
    for name, module in denoiser.named_modules():
        if isinstance(module, _WEIGHTED):
            yield name, module


def resolve(recipe: Recipe, denoiser: nn.Module) -> dict[str, LayerPlan | Kept]:
    """What the recipe makes of each layer of the denoiser. It should be the case that no layer is left out.

    Raises:
        ValueError: a layer cannot be given what the recipe asks (a group size that does not divide its input
            channels, a method that does not exist or does not fit), or nothing is left to quantize.
    """
    split = skip_segments(denoiser) if recipe.split_skips else {}
    resolved: dict[str, LayerPlan | Kept] = {}
    refused: list[tuple[int, str, ValueError]] = []
    for name, layer in named_layers(denoiser):
        reason = _why_kept(recipe, name, layer)
        segments = split.get(name) or (_input_channels(layer),)
        try:
            resolved[name] = Kept(reason) if reason else recipe.plan(name, _KINDS[type(layer)], segments, range_mode)
        except ValueError as error:
            refused.append((math.gcd(*segments), name, error))
    if refused:
        _refuse(refused)
    if not any(isinstance(plan, LayerPlan) and plan.kind != "embedding" for plan in resolved.values()):
        reasons = sorted({kept.reason for kept in resolved.values() if isinstance(kept, Kept)})
        raise ValueError(
            f"nothing to quantize: recipe {recipe.name!r} leaves no linear or convolution layer of the "
            f"{type(denoiser).__name__} ({'; '.join(reasons) or 'it has none'}); keep fewer layers"
        )
    return resolved


def _refuse(refused: list[tuple[int, str, ValueError]]) -> NoReturn:
    """One error for all layers: that of the layer with the smallest common divisor, whose advice helps most others."""
    first = min(refused, key=lambda item: item[0])
    others = [name for _, name, _ in refused if name != first[1]]
    listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    more = f" ({len(others)} more layers are refused: {listed})" if others else ""
    raise ValueError(f"{first[2]}{more}") from first[2]


def _why_kept(recipe: Recipe, name: str, layer: nn.Module) -> str | None:
    """The reason why a layer is not quantized, or None."""
    pattern = recipe.kept_by(name)
    if pattern is not None:
        return f"the recipe keeps {pattern}"
    if type(layer) not in _KINDS:
        return f"no quantized form of {type(layer).__name__}"
    if isinstance(layer, nn.Embedding):
        if not recipe.quantize_embeddings:
            return "the recipe keeps embeddings"
        return "an embedding with max_norm is renormalized in use" if layer.max_norm is not None else None
    if isinstance(layer, nn.Conv2d):
        for trait, plain in (("groups", 1), ("dilation", (1, 1)), ("padding_mode", "zeros")):
            if getattr(layer, trait) != plain:
                return f"no quantized form of a convolution with {trait}={getattr(layer, trait)}"
        return "no quantized form of a convolution padded by name" if isinstance(layer.padding, str) else None
    return None


def _input_channels(layer: nn.Module) -> int:
    """Linear: in_features; convolution: in_channels; embedding: the width of a row."""
    for attribute in ("in_features", "in_channels", "embedding_dim"):
        if hasattr(layer, attribute):
            return int(getattr(layer, attribute))
    return 1


def skip_segments(denoiser: nn.Module) -> dict[str, tuple[int, int]]:
    """Channel ranges (hidden, skip) of the convolutions that read a concatenated skip connection.

    Every resnet of an up block of a UNet2DConditionModel (and its kin) reads `cat([hidden, skip], dim=1)`: its
    `conv1` and its `conv_shortcut` see two distributions. Q-Diffusion (arXiv 2302.04304), section 3.3.2.
    """
    hidden = _channels_before_up_blocks(denoiser)
    found: dict[str, tuple[int, int]] = {}
    for i, block in enumerate(getattr(denoiser, "up_blocks", None) or ()):
        for j, resnet in enumerate(getattr(block, "resnets", ())):
            if hidden is not None:
                for conv in ("conv1", "conv_shortcut"):
                    total = getattr(getattr(resnet, conv, None), "in_channels", 0)
                    if 0 < hidden < total:
                        found[f"up_blocks.{i}.resnets.{j}.{conv}"] = (hidden, total - hidden)
            hidden = getattr(resnet, "out_channels", None)
    return found


def _channels_before_up_blocks(denoiser: nn.Module) -> int | None:
    sources = [getattr(denoiser, "mid_block", None), *reversed(getattr(denoiser, "down_blocks", None) or [])]
    for block in sources:
        resnets = getattr(block, "resnets", None)
        if resnets:
            return getattr(resnets[-1], "out_channels", None)
    return None
