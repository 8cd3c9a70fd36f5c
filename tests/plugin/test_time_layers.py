"""Layers of the timestep see all timesteps, and the recipe says at which steps a calibration looks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qdiff import Calibration, Recipe, quantize_pipeline
from qdiff.plugin.structure import find_denoiser, named_layers
from qdiff.recipe import DEFAULT_KEEP, LayerOverride, MethodSpec, WeightSpec

TIME = ("time_embedding*", "*time_emb_proj")
GPTQ = Recipe(
    "time layers",
    weight=WeightSpec(3, 32),
    activation_bits=16,
    rounding=MethodSpec.of("gptq"),
    keep=(*DEFAULT_KEEP, "*attentions*", "*conv*"),
)


def error_at_other_timesteps(pipe, recipe):
    """Of the projection of every resnet, at timesteps that a schedule of two steps does not have."""
    exact, embedding = pipe.unet, pipe.unet.time_embedding
    at = torch.arange(13, 990, 61)
    with torch.no_grad():
        emb = torch.nn.functional.silu(embedding(exact.time_proj(at).float()))
        names = [name for name, _ in named_layers(exact) if name.endswith("time_emb_proj")]
        before = [exact.get_submodule(name)(emb) for name in names]
    calibration = Calibration(["red apple", "green cat"], steps=2)
    quantize_pipeline(pipe, recipe=recipe, calibration=calibration, progress=False)
    with torch.no_grad():
        after = [pipe.unet.get_submodule(name)(emb) for name in names]
    return sum(float((a - b).square().sum()) for a, b in zip(after, before)) ** 0.5


def test_rounding_on_all_timesteps_helps_at_those_that_calibration_did_not_see(tiny_sd):
    seen = error_at_other_timesteps(tiny_sd(), GPTQ)
    covered = error_at_other_timesteps(tiny_sd(), GPTQ.replace(all_timesteps=TIME))
    assert covered < 0.8 * seen


def test_the_other_layers_are_not_touched(tiny_dit):
    plain = Recipe("all", rounding=MethodSpec.of("gptq"), keep=DEFAULT_KEEP)
    states = []
    for recipe in (plain, plain.replace(all_timesteps=("*timestep_embedder*",))):
        pipe = quantize_pipeline(tiny_dit(), recipe=recipe, calibration=Calibration([1, 7], steps=3), progress=False)
        states.append(find_denoiser(pipe)[1].state_dict())
    differ = {key.rpartition(".")[0] for key, value in states[0].items() if not torch.equal(value, states[1][key])}
    assert differ
    assert all("timestep_embedder" in name for name in differ)


def test_a_temporal_range_is_refused(tiny_sd):
    recipe = GPTQ.replace(activation_bits=8, linear_range=MethodSpec.of("temporal"), all_timesteps=TIME)
    with pytest.raises(ValueError, match=r"time_embedding.linear_1: recipe\.all_timesteps does not go with a temporal"):
        quantize_pipeline(tiny_sd(), recipe=recipe, calibration=Calibration(["cat"], steps=2), progress=False)


def test_the_recipe_chooses_the_steps_and_the_caller_has_the_last_word(tiny_dit):
    recipe = Recipe(
        "sampled", keep=DEFAULT_KEEP, linear_range=MethodSpec.of("temporal"), sampling="uniform",
        overrides=(LayerOverride("*emb*", activation_bits=16),),
    )  # fmt: skip
    calibration = Calibration([1, 7], steps=8)
    rows = {}
    for label, settings in {
        "recipe": calibration,
        "caller": dataclasses.replace(calibration, sampling="normal", sampled_steps=3),
    }.items():
        pipe = quantize_pipeline(tiny_dit(), recipe=recipe, calibration=settings, progress=False)
        rows[label] = len(pipe.transformer.qdiff.tracker.timesteps)
    assert rows == {"recipe": 4, "caller": 3}
