"""`calibrate`: one run of a pipeline on prompts, for all the recipes that are to be compared on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import nn

from qdiff.calibration import Calibration, LayerStatistics, Statistics, collect, run_pipeline
from qdiff.methods import needs_of
from qdiff.plugin.calls import Call, CallRecorder
from qdiff.plugin.structure import check_quantizable, find_denoiser, resolve
from qdiff.plugin.time_layers import over_all_timesteps, time_layers
from qdiff.plugin.undisturbed import undisturbed
from qdiff.recipe import LayerPlan, Recipe

# A recipe that samples the steps of a calibration takes one in so many.
SAMPLED_OF = 2

Plans = Mapping[str, LayerPlan]


@dataclass(frozen=True)
class PipelineStatistics:
    """What one calibration of a pipeline found: plain tensors, where the pipeline was.

    calibration:    as it was run.
    needs:          what was collected, of every layer that was looked at.
    observed:       the layers' inputs over the calibration's timesteps.
    all_timesteps:  those of layers of the timestep alone over all timesteps, where a recipe asks for it.
    calls:          some of the denoiser's calls, where a recipe quantizes layers in order.
    """

    calibration: Calibration
    needs: Mapping[str, frozenset[str]]
    observed: Statistics
    all_timesteps: Mapping[str, LayerStatistics]
    calls: tuple[Call, ...]

    def of(self, plans: Plans) -> Statistics:
        """What one recipe's calibration alone would have found, bit for bit; layers that did not run are missing.

        Raises:
            ValueError: a layer that was not looked at, or not in the way its methods need, or of another width.
        """
        found = {}
        for name, plan in plans.items():
            if plan.kind == "embedding":
                continue
            needs = needs_of(plan)
            had = self.needs.get(name, frozenset())
            if name not in self.needs or needs - had or ("first_token" in had - needs):
                raise ValueError(
                    f"statistics must be of a calibration for this recipe: {name!r} needs {_listed(needs)}, and "
                    f"{_listed(had) if name in self.needs else 'nothing'} was collected; pass the recipe to calibrate"
                )
            if name in self.observed.layers:
                found[name] = _reduced(self.observed.layers[name], plan, needs)
        return Statistics(self.observed.timesteps, found)

    def over_all_timesteps(self, statistics: Statistics, plans: Plans) -> Statistics:
        """The same, with the layers of these plans seen over the whole schedule that the denoiser was trained on.

        Raises:
            ValueError: a layer was not shown all timesteps.
        """
        ran = {name: plan for name, plan in plans.items() if name in statistics.layers}
        if unseen := [name for name in ran if name not in self.all_timesteps]:
            raise ValueError(
                f"statistics must be of a calibration for this recipe: {unseen[0]!r} was not shown all timesteps; "
                "pass the recipe to calibrate"
            )
        covered = {name: _reduced(self.all_timesteps[name], plan, needs_of(plan)) for name, plan in ran.items()}
        return dataclasses.replace(statistics, layers={**statistics.layers, **covered})


def calibrate(
    pipe: DiffusionPipeline,
    recipes: str | Recipe | Sequence[str | Recipe],
    calibration: Calibration | Sequence[str | int] | None = None,
    *,
    seed: int | None = None,
    progress: bool = True,
) -> PipelineStatistics:
    """Runs a pipeline once and collects what all of these recipes need, to quantize copies of it by each of them.

        statistics = calibrate(pipe, ["gptq", "awq"])
        gptq = quantize_pipeline(copy.deepcopy(pipe), recipe="gptq", statistics=statistics)

    The pipeline is left as it was. It should be the case that a recipe gives the same bytes with these statistics as
    with a calibration of its own, whichever other recipes they were collected for.

    Args:
        pipe, calibration, seed, progress: as in `quantize_pipeline`.
        recipes: names of presets, or recipes.

    Raises:
        ValueError: no recipe, recipes that calibrate at different steps or differ in leaving out the first token of
            a layer's input, and whatever `quantize_pipeline` raises before it quantizes.
    """
    listed = [recipes] if isinstance(recipes, str | Recipe) else list(recipes)
    if not listed:
        raise ValueError("recipes must name at least one recipe: got none; pass those that are to be compared")
    known = [recipe_of(recipe) for recipe in listed]
    settings = [settings_of(calibration, seed, recipe) for recipe in known]
    for recipe, setting in zip(known, settings):
        if setting != settings[0]:
            raise ValueError(
                f"recipes must calibrate at the same steps: {recipe.name!r} samples {setting.sampling!r} and "
                f"{known[0].name!r} {settings[0].sampling!r}; calibrate for each of them apart"
            )
    _, denoiser = find_denoiser(pipe)
    check_quantizable(denoiser)
    return measure(pipe, [(recipe, plans_of(recipe, denoiser)) for recipe in known], settings[0], progress)


def recipe_of(recipe: str | Recipe) -> Recipe:
    """A preset by its name, or the recipe itself; raises `ValueError` for anything else."""
    found = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    if not isinstance(found, Recipe):
        raise ValueError(f"recipe must be a preset's name or a Recipe: got {type(recipe).__name__}")
    return found


def settings_of(calibration: Calibration | Sequence[str | int] | None, seed: int | None, recipe: Recipe) -> Calibration:
    """The calibration that a caller asked for, at the steps that the recipe wants where the caller does not say."""
    found = Calibration.of(calibration)
    if recipe.sampling != "all" and found.sampling == "all":
        sampled = max(1, found.steps // SAMPLED_OF)
        found = dataclasses.replace(found, sampling=recipe.sampling, sampled_steps=sampled)
    return found if seed is None else dataclasses.replace(found, seed=seed)


def plans_of(recipe: Recipe, denoiser: nn.Module) -> dict[str, LayerPlan]:
    """The layers that the recipe quantizes."""
    return {name: plan for name, plan in resolve(recipe, denoiser).items() if isinstance(plan, LayerPlan)}


def measure(
    pipe: DiffusionPipeline, recipes: Sequence[tuple[Recipe, Plans]], calibration: Calibration, progress: bool
) -> PipelineStatistics:
    """One run for recipes whose plans are known to fit; raises `ValueError` where they cannot share it."""
    _, denoiser = find_denoiser(pipe)
    needs = _union(recipes)
    timed = {name for recipe, plans in recipes for name in time_layers(recipe, plans)}
    recorded = timed or any("carried" in needed for needed in needs.values())
    layers = {name: denoiser.get_submodule(name) for name in needs}
    # Ordinary tensors even where the caller is in inference mode: they outlive it.
    with torch.inference_mode(False), torch.no_grad(), undisturbed(pipe):
        with CallRecorder(denoiser) if recorded else nullcontext() as recorder:
            run, steps = lambda: run_pipeline(pipe, calibration), calibration.observed_steps
            observed = collect(run, denoiser, layers, needs, progress, calibration.seed, steps)
        calls = tuple(recorder.calls) if recorder else ()
        shown: Mapping[str, LayerStatistics] = {}
        if ran := {name: needs[name] for name in sorted(timed) if name in observed.layers}:
            # Schedulers of flow matching may hand the denoiser times in [0, 1].
            last = float(pipe.scheduler.config.num_train_timesteps - 1) if observed.timesteps[-1] > 1 else 1.0
            shown = over_all_timesteps(denoiser, calls[0], last, ran, seed=0).layers
    return PipelineStatistics(calibration, needs, observed, shown, calls)


def _union(recipes: Sequence[tuple[Recipe, Plans]]) -> dict[str, frozenset[str]]:
    """What any of the recipes needs of each layer."""
    found: dict[str, frozenset[str]] = {}
    for recipe, plans in recipes:
        for name, plan in plans.items():
            if plan.kind == "embedding":
                continue
            needs = needs_of(plan)
            if "first_token" in found.get(name, needs) ^ needs:
                raise ValueError(
                    f"recipes must agree on the first token of {name!r}: {recipe.name!r} and one before it do not, and "
                    "statistics are either with it or without; calibrate for each of them apart"
                )
            found[name] = found.get(name, frozenset()) | needs
    return found


def _reduced(layer: LayerStatistics, plan: LayerPlan, needs: frozenset[str]) -> LayerStatistics:
    """Only what the plan's methods asked for: some do more where there is more."""
    if layer.channel_absmax.shape[1] != sum(plan.segments):
        raise ValueError(
            f"statistics must be of this pipeline: {plan.name!r} has {sum(plan.segments)} input channels, and "
            f"{layer.channel_absmax.shape[1]} were seen; calibrate this pipeline"
        )
    return dataclasses.replace(
        layer,
        histograms=layer.histograms if "histograms" in needs else None,
        samples=layer.samples if "samples" in needs else None,
        moments=layer.moments if "hessian" in needs else None,
    )


def _listed(needs: frozenset[str]) -> str:
    return ", ".join(sorted(needs | {"absmax"}))
