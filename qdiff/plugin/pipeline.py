"""`quantize_pipeline`: resolve the recipe, calibrate on the pipeline itself, quantize each layer, swap all at once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from qdiff.calibration import Calibration, LayerStatistics
from qdiff.denoising import StepTracker
from qdiff.layers import QuantConv2d, QuantEmbedding, QuantizedWeights, QuantLinear
from qdiff.methods import needs_of, quantize_layer
from qdiff.methods.sufficiency import shortages
from qdiff.plugin.attention import check_probabilities, quantize_probabilities
from qdiff.plugin.calibrate import PipelineStatistics, measure, recipe_of, settings_of
from qdiff.plugin.fuse import fuse_blocks
from qdiff.plugin.sequential import quantize_in_order
from qdiff.plugin.structure import (
    Kept,
    QuantizationRecord,
    check_quantizable,
    find_denoiser,
    install,
    resolve,
)
from qdiff.plugin.time_layers import time_layers
from qdiff.plugin.undisturbed import undisturbed
from qdiff.recipe import LayerPlan, Recipe

QuantLayer = QuantLinear | QuantConv2d | QuantEmbedding
LAYER_CLASSES: dict[str, type[QuantLayer]] = {"linear": QuantLinear, "conv2d": QuantConv2d, "embedding": QuantEmbedding}


def quantize_pipeline(
    pipe_or_class: DiffusionPipeline | type[DiffusionPipeline],
    path: str | os.PathLike[str] | None = None,
    *,
    recipe: str | Recipe = "w4a8",
    calibration: Calibration | Sequence[str | int] | None = None,
    seed: int | None = None,
    statistics: PipelineStatistics | None = None,
    progress: bool = True,
    **from_pretrained: Any,
) -> DiffusionPipeline:
    """Quantizes the denoiser of a diffusers pipeline, in place, and returns the pipeline.

        pipe = quantize_pipeline(pipe)
        pipe = quantize_pipeline(StableDiffusionPipeline, "path", recipe="w4a8", torch_dtype=torch.float16)

    The pipeline is calibrated by running it, with its own scheduler, where it is and in the dtype it has. On any error
    it is left as it was. It should be the case that the same pipeline and seed give the same bytes.

    Args:
        pipe_or_class: a loaded pipeline, or a pipeline class to load `path` with.
        path: what `from_pretrained` takes; only with a class. Further keyword arguments go to `from_pretrained`.
        recipe: a preset's name (see `qdiff.recipe.PRESETS`) or a `Recipe`.
        calibration: prompts (or class labels) to calibrate on, or a `Calibration`; None takes the built-in list.
        seed: of the calibration's noise; None takes the `Calibration`'s own, or 0.
        statistics: what `qdiff.calibrate` found with this recipe among others, in place of a calibration.
        progress: show progress bars.

    Raises:
        ValueError: not a pipeline, no denoiser, quantized already, unknown recipe or method, a group size that does
            not divide, nothing to quantize, weights or activations that are not finite, no prompts, statistics of
            another recipe or denoiser.
    """
    recipe = recipe_of(recipe)
    settings = settings_of(calibration, seed, recipe)
    if statistics is not None:
        _check_statistics(statistics, calibration, seed, recipe)
    pipe = _pipeline(pipe_or_class, path, from_pretrained)
    _, denoiser = find_denoiser(pipe)
    check_quantizable(denoiser)
    check_probabilities(denoiser, recipe.probabilities)
    resolved = resolve(recipe, denoiser)
    plans = {name: plan for name, plan in resolved.items() if isinstance(plan, LayerPlan)}

    # Ordinary tensors even where the caller is in inference mode: they outlive it.
    with torch.inference_mode(False), torch.no_grad():
        timed = time_layers(recipe, plans)
        measured = statistics or measure(pipe, [(recipe, plans)], settings, progress)
        seen = measured.of(plans)
        # Of the calibration that the caller chose, before some of it is replaced.
        for shortage in shortages(plans, seen):
            warnings.warn(shortage, stacklevel=2)
        seen = measured.over_all_timesteps(seen, {name: plans[name] for name in timed})
        for name in [name for name, plan in plans.items() if plan.kind != "embedding" and name not in seen.layers]:
            resolved[name] = Kept("it did not run during calibration")
            del plans[name]
        if any("carried" in needs_of(plan) for plan in plans.values()):
            with undisturbed(pipe):
                replacements = quantize_in_order(
                    denoiser, plans, seen, measured.calls, _finished, measured.calibration.seed, progress
                )
        else:
            replacements = {
                name: _quantized(plan, denoiser.get_submodule(name), seen.layers.get(name))
                for name, plan in tqdm(plans.items(), desc="Quantizing", unit="layer", disable=not progress)
            }
    kept = {name: plan.reason for name, plan in resolved.items() if isinstance(plan, Kept)}
    install(denoiser, replacements, QuantizationRecord(recipe, plans, kept, StepTracker(seen.timesteps)))
    quantize_probabilities(denoiser, recipe.probabilities)
    fuse_blocks(denoiser)
    return pipe


def _check_statistics(statistics: PipelineStatistics, calibration: object, seed: int | None, recipe: Recipe) -> None:
    for name, value in (("calibration", calibration), ("seed", seed)):
        if value is not None:
            raise ValueError(f"{name} does not go with statistics, which were collected with their own; leave it out")
    wanted = settings_of(statistics.calibration, None, recipe)
    if wanted != statistics.calibration:
        raise ValueError(
            f"statistics must be of the steps that recipe {recipe.name!r} samples, {wanted.sampling!r}: they are of "
            f"{statistics.calibration.sampling!r}; calibrate for this recipe apart"
        )


def _pipeline(pipe_or_class: object, path: object, from_pretrained: dict[str, Any]) -> DiffusionPipeline:
    if isinstance(pipe_or_class, type) and hasattr(pipe_or_class, "from_pretrained"):
        if path is None:
            raise ValueError(
                f"path is needed to load a {pipe_or_class.__name__}: pass a directory or a repository name"
            )
        return pipe_or_class.from_pretrained(path, **from_pretrained)
    if path is not None or from_pretrained:
        extra = "path" if path is not None else ", ".join(from_pretrained)
        raise ValueError(f"{extra}: only with a pipeline class; got a loaded {type(pipe_or_class).__name__}")
    return pipe_or_class  # type: ignore[return-value]  # find_denoiser says what is wrong with anything else


def _quantized(plan: LayerPlan, layer: nn.Module, statistics: LayerStatistics | None) -> nn.Module:
    return _finished(plan, layer, quantize_layer(plan, layer, statistics))


def _finished(plan: LayerPlan, layer: nn.Module, weights: QuantizedWeights) -> nn.Module:
    return LAYER_CLASSES[plan.kind].from_float(layer, plan, weights)  # type: ignore[arg-type]  # kind says which
