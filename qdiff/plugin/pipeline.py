"""`quantize_pipeline`: resolve the recipe, calibrate on the pipeline itself, quantize each layer, swap all at once."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from qdiff.calibration import Calibration, LayerStatistics, Statistics, collect, run_pipeline
from qdiff.denoising import StepTracker
from qdiff.layers import QuantConv2d, QuantEmbedding, QuantLinear
from qdiff.methods import needs_of, quantize_layer
from qdiff.methods.sufficiency import shortages
from qdiff.plugin.attention import check_probabilities, quantize_probabilities
from qdiff.plugin.sequential import CallRecorder, quantize_in_order
from qdiff.plugin.structure import (
    Kept,
    QuantizationRecord,
    check_quantizable,
    find_denoiser,
    install,
    resolve,
)
from qdiff.plugin.time_layers import over_all_timesteps, time_layers
from qdiff.recipe import LayerPlan, Recipe

# A recipe that samples the steps of a calibration takes one in so many.
SAMPLED_OF = 4

QuantLayer = QuantLinear | QuantConv2d | QuantEmbedding
LAYER_CLASSES: dict[str, type[QuantLayer]] = {"linear": QuantLinear, "conv2d": QuantConv2d, "embedding": QuantEmbedding}


def quantize_pipeline(
    pipe_or_class: DiffusionPipeline | type[DiffusionPipeline],
    path: str | os.PathLike[str] | None = None,
    *,
    recipe: str | Recipe = "w4a8",
    calibration: Calibration | Sequence[str | int] | None = None,
    seed: int | None = None,
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
        progress: show progress bars.

    Raises:
        ValueError: not a pipeline, no denoiser, quantized already, unknown recipe or method, a group size that does
            not divide, nothing to quantize, weights or activations that are not finite, no prompts.
    """
    recipe = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe must be a preset's name or a Recipe: got {type(recipe).__name__}")
    calibration = _calibration(calibration, seed, recipe)
    pipe = _pipeline(pipe_or_class, path, from_pretrained)
    _, denoiser = find_denoiser(pipe)
    check_quantizable(denoiser)
    check_probabilities(denoiser, recipe.probabilities)
    resolved = resolve(recipe, denoiser)
    plans = {name: plan for name, plan in resolved.items() if isinstance(plan, LayerPlan)}

    # Ordinary tensors even where the caller is in inference mode: they outlive it.
    with torch.inference_mode(False), torch.no_grad():
        sequential = any("carried" in needs_of(plan) for plan in plans.values())
        timed = time_layers(recipe, plans)
        with CallRecorder(denoiser) if sequential or timed else nullcontext() as recorder:
            statistics = _calibrate(pipe, denoiser, plans, calibration, progress)
        # Of the calibration that the caller chose, before some of it is replaced.
        for shortage in shortages(plans, statistics):
            warnings.warn(shortage, stacklevel=2)
        if recorder and timed:
            statistics = _with_all_timesteps(
                pipe, denoiser, {name: plans[name] for name in timed}, statistics, recorder
            )
        for name in [
            name for name, plan in plans.items() if plan.kind != "embedding" and name not in statistics.layers
        ]:
            resolved[name] = Kept("it did not run during calibration")
            del plans[name]
        if recorder and sequential:
            with undisturbed(pipe):
                replacements = quantize_in_order(
                    denoiser, plans, statistics, recorder.calls, _quantized, calibration.seed, progress
                )
        else:
            replacements = {
                name: _quantized(plan, denoiser.get_submodule(name), statistics.layers.get(name))
                for name, plan in tqdm(plans.items(), desc="Quantizing", unit="layer", disable=not progress)
            }
    kept = {name: plan.reason for name, plan in resolved.items() if isinstance(plan, Kept)}
    install(denoiser, replacements, QuantizationRecord(recipe, plans, kept, StepTracker(statistics.timesteps)))
    quantize_probabilities(denoiser, recipe.probabilities)
    return pipe


def _calibration(
    calibration: Calibration | Sequence[str | int] | None, seed: int | None, recipe: Recipe
) -> Calibration:
    calibration = Calibration.of(calibration)
    if recipe.sampling != "all" and calibration.sampling == "all":
        sampled = max(1, calibration.steps // SAMPLED_OF)
        calibration = dataclasses.replace(calibration, sampling=recipe.sampling, sampled_steps=sampled)
    return calibration if seed is None else dataclasses.replace(calibration, seed=seed)


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


def _calibrate(
    pipe: DiffusionPipeline,
    denoiser: nn.Module,
    plans: dict[str, LayerPlan],
    calibration: Calibration,
    progress: bool,
) -> Statistics:
    layers = {name: denoiser.get_submodule(name) for name, plan in plans.items() if plan.kind != "embedding"}
    needs = {name: needs_of(plans[name]) for name in layers}
    with undisturbed(pipe):
        run, steps = lambda: run_pipeline(pipe, calibration), calibration.observed_steps
        return collect(run, denoiser, layers, needs, progress, calibration.seed, steps)


def _with_all_timesteps(
    pipe: DiffusionPipeline,
    denoiser: nn.Module,
    plans: dict[str, LayerPlan],
    statistics: Statistics,
    recorder: CallRecorder,
) -> Statistics:
    """The same, with these layers' statistics taken over the whole schedule that the denoiser was trained on."""
    # Schedulers of flow matching may hand the denoiser times in [0, 1].
    last = float(pipe.scheduler.config.num_train_timesteps - 1) if statistics.timesteps[-1] > 1 else 1.0
    needs = {name: needs_of(plan) for name, plan in plans.items() if name in statistics.layers}
    with undisturbed(pipe):
        covered = over_all_timesteps(denoiser, recorder.calls[0], last, needs, seed=0)
    return dataclasses.replace(statistics, layers={**statistics.layers, **covered.layers})


def _quantized(plan: LayerPlan, layer: nn.Module, statistics: LayerStatistics | None) -> nn.Module:
    weights = quantize_layer(plan, layer, statistics)
    return LAYER_CLASSES[plan.kind].from_float(layer, plan, weights)  # type: ignore[arg-type]  # kind says which


@contextmanager
def undisturbed(pipe: DiffusionPipeline) -> Iterator[None]:
    """Runs the pipeline in evaluation mode, and puts back everything that a run of it changes.

    That is: training flags, the scheduler's timesteps and history, the attributes that `__call__` leaves on the
    pipeline, the progress bar's settings, and torch's global random state.
    """
    modules = [module for part in pipe.components.values() if isinstance(part, nn.Module) for module in part.modules()]
    training = [(module, module.training) for module in modules]
    schedulers = [part for part in pipe.components.values() if hasattr(part, "set_timesteps")]
    states = [(scheduler, copy.deepcopy(vars(scheduler))) for scheduler in schedulers]
    attributes = dict(vars(pipe))
    random_state = torch.get_rng_state()
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for owner, state in [*states, (pipe, attributes)]:
            vars(owner).clear()
            vars(owner).update(state)
        torch.set_rng_state(random_state)
