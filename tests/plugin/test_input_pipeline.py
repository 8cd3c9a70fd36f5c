"""Pipelines whose layers shift, split and rotate their inputs: quantized, saved and loaded as any other."""

from __future__ import annotations

import pytest
import torch

from qdiff import summary
from qdiff.plugin.checkpoint import load, save
from qdiff.plugin.structure import find_denoiser, quantization_of
from qdiff.recipe import MethodSpec, Recipe, WeightSpec

STEPS = ("shift", "channel_splitting", "smoothing", "hadamard", "low_rank", "clipping", "bias_correction")


@pytest.mark.parametrize("mode", ["static", "none"])
def test_every_transform_at_once(tiny, quantize, shortened, generate, tmp_path, mode):
    recipe = Recipe.preset("w4a8").replace(
        name="everything",
        rounding=MethodSpec("nearest"),
        weight=WeightSpec(4, 16),
        transforms=tuple(map(MethodSpec, STEPS)),
        linear_range=MethodSpec.of("static", estimator="minmax") if mode == "static" else MethodSpec("dynamic"),
        conv_range=MethodSpec.of("static", estimator="minmax"),
        activation_bits=16 if mode == "none" else 8,
        overrides=(),
    )
    float_pipe = tiny()
    wanted = generate(float_pipe)
    pipe = quantize(tiny(), recipe=shortened(recipe, float_pipe))
    denoiser = find_denoiser(pipe)[1]
    layers = [denoiser.get_submodule(name) for name in quantization_of(denoiser).plans]
    for buffer in ("index", "rotation"):
        assert sum(getattr(layer, buffer) is not None for layer in layers) > len(layers) / 2
    pictures = generate(pipe)
    # Pictures of random weights: what the default recipe does to them is of the same size.
    assert float((pictures - wanted).abs().mean()) < 0.03
    save(pipe, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(generate(again), pictures)
    assert str(summary(again)) == str(summary(pipe))


def test_a_wrong_order_is_refused_before_anything_runs(tiny, quantize, snapshot):
    pipe = tiny()
    before = snapshot(pipe)
    recipe = Recipe.preset("w4a8").replace(transforms=(MethodSpec("hadamard"), MethodSpec("smoothing")), overrides=())
    with pytest.raises(ValueError, match="'smoothing' cannot come after 'hadamard'"):
        quantize(pipe, recipe=recipe)
    before.assert_unchanged()
