"""Weights of learned levels, from a pipeline to a checkpoint and back."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import qdiff
from qdiff.plugin.structure import find_denoiser
from qdiff.recipe import MethodSpec, Recipe, WeightSpec


@pytest.mark.parametrize(
    ("kind", "name", "preset"), [("sd", "lloyd_max", "w4a8"), ("dit", "lloyd_max", "w4a16"), ("dit", "lq_nets", "w4a8")]
)
def test_pipeline_with_codebooks_comes_back_the_same(
    tiny_sd, tiny_dit, quantize, generate, tmp_path, kind, name, preset
):
    # Sensitive layers keep their 8 bits, which have no codebook, and so are rounded to the nearest.
    base = Recipe.preset(preset)
    overrides = tuple(
        override if override.weight is None else dataclasses.replace(override, rounding=MethodSpec.of("nearest"))
        for override in base.overrides
    )
    recipe = base.replace(
        weight=WeightSpec(4, 4),
        rounding=MethodSpec.of(name),
        overrides=overrides,
        transforms=(),
        quantize_embeddings=True,
    )
    pipe = quantize({"sd": tiny_sd, "dit": tiny_dit}[kind](), recipe=recipe)
    layers = [layer for layer in find_denoiser(pipe)[1].modules() if hasattr(layer, "codebook")]
    four_bit = [layer for layer in layers if layer.plan.weight_bits == 4]
    assert four_bit
    assert all(layer.codebook.dtype == torch.int8 and layer.multipliers is None for layer in four_bit)
    assert all(layer.codebook is None for layer in layers if layer.plan.weight_bits == 8)
    qdiff.save(pipe, tmp_path / "saved")
    loaded = qdiff.load(tmp_path / "saved")
    assert torch.equal(generate(loaded), generate(pipe))
    row = next(row for row in qdiff.summary(loaded).rows if not row.reason and row.format.startswith("4-bit"))
    layer = find_denoiser(loaded)[1].get_submodule(row.name)
    stored = {key: tensor.numel() * tensor.element_size() for key, tensor in layer.named_buffers() if key != "bias"}
    assert stored["codebook"] == 16 * len(layer.scale)
    bias = 0 if layer.bias is None else 2 * layer.bias.numel()
    assert row.bytes_after == sum(stored.values()) + bias
