"""Every method, on layers of both trained pipelines: finite pictures, the same bytes from the same seed, a round trip.

Two layers of each model are quantized, one with two channel segments among them: what a method does to a layer does not
depend on the others. The second of two runs has the statistics of a calibration that was for all of the methods.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import qdiff
from qdiff import Calibration, Recipe, calibrate, quantize_pipeline
from qdiff.methods import REGISTRY
from qdiff.plugin.calibrate import PipelineStatistics
from qdiff.plugin.structure import find_denoiser, named_layers
from qdiff.recipe import MethodSpec, WeightSpec

ASSETS = Path(__file__).parents[2] / "assets"
LAYERS = {
    "emoji-sd": ("up_blocks.1.resnets.0.conv1", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"),
    "emoji-dit": ("transformer_blocks.1.attn1.to_q", "transformer_blocks.1.ff.net.2"),
}
CHANNEL = WeightSpec(4, 32, "channel")
BYTE = WeightSpec(8, -1, "channel")


def of(name: str, **options: Any) -> MethodSpec:
    return MethodSpec.of(name, **options)


def transform(*specs: MethodSpec) -> dict[str, Any]:
    return {"transforms": specs}


def ranges(spec: MethodSpec, bits: int = 8) -> dict[str, Any]:
    return {"linear_range": spec, "conv_range": spec, "activation_bits": bits, "weight": BYTE}


CASES: dict[str, dict[str, Any]] = {
    "nearest": {},
    "nearest, 8 bits": {"weight": BYTE},
    "gptq": {"rounding": of("gptq")},
    "gptq, a scale a channel": {"rounding": of("gptq"), "weight": CHANNEL},
    "gptq, 8 bits": {"rounding": of("gptq"), "weight": BYTE},
    "gptq, low rank": {"rounding": of("gptq"), **transform(of("smoothing"), of("low_rank", rank=8, min_gain=0.0))},
    "adaround": {"rounding": of("adaround", iterations=20)},
    "adaround, blocks": {"rounding": of("adaround", iterations=20, block_iterations=3)},
    "adaquant": {"rounding": of("adaquant", iterations=20)},
    "lq_nets": {"rounding": of("lq_nets")},
    "lloyd_max": {"rounding": of("lloyd_max")},
    "smoothing": transform(of("smoothing")),
    "smoothquant": transform(of("smoothquant")),
    "awq": transform(of("awq")),
    "low_rank": transform(of("low_rank", rank=8, min_gain=0.0)),
    "hadamard": transform(of("hadamard")),
    "hadamard, gptq": {"rounding": of("gptq"), **transform(of("hadamard"))},
    "channel_splitting": transform(of("channel_splitting")),
    "shift": transform(of("shift")),
    "clipping": transform(of("clipping")),
    "bias_correction": transform(of("bias_correction")),
    "dynamic, temporal": {"linear_range": of("dynamic"), "conv_range": of("temporal")},
    "static": ranges(of("static")),
    "temporal, A6": ranges(of("temporal"), 6),
    "grouped": ranges(of("grouped"), 6),
    "tdq": ranges(of("tdq"), 6),
    **{f"static, {e}": ranges(of("static", estimator=e)) for e in ("minmax", "percentile", "ksigma", "kl")},
    **{
        f"W{bits}": {"weight": WeightSpec(bits) if bits <= 4 else WeightSpec(bits, -1, "channel")}
        for bits in range(2, 8)
    },
    **{f"A{bits}": ranges(of("temporal"), bits) for bits in (4, 5, 7)},
    "A16": {"activation_bits": 16},
    "first_token": transform(of("first_token")),
    "log2 probabilities": {"probabilities": of("log2")},
}
# Recipes that set the first token of a layer's inputs apart share no calibration with those that do not.
ALONE = ("first_token",)


@pytest.fixture(scope="module")
def trained() -> dict[str, DiffusionPipeline]:
    pipes = {name: DiffusionPipeline.from_pretrained(str(ASSETS / name), local_files_only=True) for name in LAYERS}
    for pipe in pipes.values():
        pipe.to(torch.float32).set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(params=sorted(LAYERS))
def model(request: pytest.FixtureRequest) -> str:
    return request.param


def recipe_of(case: str, pipe: DiffusionPipeline, model: str) -> Recipe:
    """The two layers quantized as the case says, and nothing else."""
    keep = [name for name, _ in named_layers(find_denoiser(pipe)[1]) if name not in LAYERS[model]]
    return Recipe(name="case", keep=tuple(name.replace("[", "[[]") for name in keep)).replace(**CASES[case])


def calibration_of(model: str) -> Calibration:
    return Calibration(["red apple, noto style"] if model == "emoji-sd" else [3], steps=3)


@pytest.fixture(scope="module")
def shared(trained: dict[str, DiffusionPipeline]) -> Callable[[str, str], PipelineStatistics]:
    """`shared(case, model)`: statistics of one calibration for the case and all that can share it."""

    @functools.cache
    def measured(model: str, alone: str | None) -> PipelineStatistics:
        cases = [alone] if alone else [case for case in CASES if case not in ALONE]
        recipes = [recipe_of(case, trained[model], model) for case in cases]
        return calibrate(copy.deepcopy(trained[model]), recipes, calibration_of(model), progress=False)

    return lambda case, model: measured(model, case if case in ALONE else None)


def pictures(pipe: DiffusionPipeline) -> Tensor:
    subject = {"prompt": ["blue fish"]} if hasattr(pipe, "unet") else {"class_labels": [5]}
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**subject, num_inference_steps=2, generator=generator, output_type="pt").images


@pytest.mark.parametrize("case", CASES)
def test_method(
    case: str,
    model: str,
    trained: dict[str, DiffusionPipeline],
    shared: Callable[[str, str], PipelineStatistics],
    tmp_path: Path,
) -> None:
    pipe, again = copy.deepcopy(trained[model]), copy.deepcopy(trained[model])
    recipe = recipe_of(case, pipe, model)
    quantize_pipeline(pipe, recipe=recipe, calibration=calibration_of(model), progress=False)
    quantize_pipeline(again, recipe=recipe, statistics=shared(case, model), progress=False)
    state, same = (find_denoiser(p)[1].state_dict() for p in (pipe, again))
    assert state.keys() == same.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor, same[key]), f"{key} differs between two runs of the same seed"
    images = pictures(pipe)
    assert torch.isfinite(images).all()
    qdiff.save(pipe, tmp_path / "saved")
    assert torch.equal(pictures(qdiff.load(tmp_path / "saved")), images)
    rows = {row.name: row for row in qdiff.summary(pipe).rows}
    for name in LAYERS[model]:
        layer = find_denoiser(pipe)[1].get_submodule(name)
        assert not rows[name].reason
        assert f"{layer.plan.weight_bits}-bit weight" in rows[name].format
        held = [tensor for key, tensor in layer.named_buffers() if key != "bias"]
        bias = 0 if layer.bias is None else 2 * layer.bias.numel()
        assert rows[name].bytes_after == sum(t.numel() * t.element_size() for t in held) + bias


def test_every_method_has_a_case() -> None:
    named = {
        spec.name
        for changes in CASES.values()
        for value in changes.values()
        for spec in (value if isinstance(value, tuple) else (value,))
        if isinstance(spec, MethodSpec)
    }
    assert set(REGISTRY) <= named | {"nearest"}
