"""quantize_pipeline: what it makes, that it can be used like any pipeline, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
)
from torch import nn

from qdiff import Calibration, Recipe, quantize_pipeline
from qdiff.layers import QuantConv2d, QuantEmbedding, QuantLinear
from qdiff.plugin import calibrate
from qdiff.plugin import pipeline as module_under_test
from qdiff.plugin.structure import find_denoiser, quantization_of
from qdiff.recipe import MethodSpec, WeightSpec

W4A8 = Recipe.preset("w4a8")
QUANTIZED = (QuantLinear, QuantConv2d, QuantEmbedding)


def denoiser_of(pipe) -> nn.Module:
    return find_denoiser(pipe)[1]


@pytest.fixture(scope="module", params=["sd", "dit"])
def success(request, tiny_sd, tiny_dit, quantize, snapshot):
    """A pipeline in training mode that was quantized with the default recipe, as it was and as it is; not to change."""
    pipe = {"sd": tiny_sd, "dit": tiny_dit}[request.param]()
    pipe.vae.train()
    denoiser_of(pipe).train()
    components, before = dict(pipe.components), snapshot(pipe)
    returned = quantize(pipe)
    return SimpleNamespace(
        key=request.param, pipe=pipe, returned=returned, components=components, before=before, after=snapshot(pipe)
    )


# What it makes


def test_every_planned_layer_is_quantized_in_place_and_the_rest_is_not(success):
    pipe = success.pipe
    assert success.returned is pipe
    assert pipe.components == success.components, "the very same component objects"
    record = quantization_of(denoiser_of(pipe))
    assert record.recipe == W4A8
    assert len(record.plans) >= 20
    for name, module in denoiser_of(pipe).named_modules():
        assert isinstance(module, QUANTIZED) == (name in record.plans), name
    for name in record.kept:
        assert type(denoiser_of(pipe).get_submodule(name)) in (nn.Linear, nn.Conv2d, nn.Embedding)


def test_images_stay_close_to_full_precision(tiny, quantize, generate):
    """8 bits: rounding errors of under 1 % a layer, times the default guidance of 7.5, over 3 steps."""
    pipe = tiny()
    reference = generate(pipe)
    images = generate(quantize(pipe, recipe="w8a8"))
    assert images.shape == reference.shape
    error = (images - reference).norm() / (reference - reference.mean()).norm()
    assert 0 < error < 0.1


def test_same_pipeline_and_seed_give_the_same_bytes(success, quantized_once):
    states = [denoiser_of(pipe).state_dict() for pipe in (success.pipe, quantized_once[success.key])]
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key


def test_from_class_and_path(tiny_sd, tmp_path, quantize, generate):
    tiny_sd().save_pretrained(tmp_path)
    pipe = quantize(tiny_sd(), recipe="naive")
    loaded = quantize_pipeline(
        StableDiffusionPipeline,
        tmp_path,
        recipe="naive",
        calibration=Calibration(prompts=["red apple, noto style", "green cat"], steps=3),
        progress=False,
        torch_dtype=torch.float32,
    )
    assert isinstance(loaded, StableDiffusionPipeline)
    assert torch.equal(generate(loaded), generate(pipe))


def test_a_list_of_prompts_is_a_calibration(tiny_dit):
    pipe = quantize_pipeline(tiny_dit(), calibration=[1], progress=False, recipe="w4a8-static")
    assert len(quantization_of(pipe.transformer).tracker.timesteps) == Calibration().steps


def test_a_layer_that_never_runs_is_kept_with_the_reason(tiny_sd, quantize):
    pipe = tiny_sd()
    pipe.unet.spare = nn.Linear(64, 64)
    quantize(pipe, recipe="naive")
    assert quantization_of(pipe.unet).kept["spare"] == "it did not run during calibration"
    assert type(pipe.unet.spare) is nn.Linear


def test_a_layer_used_in_two_places_is_replaced_in_both(tiny_sd, quantize):
    pipe = tiny_sd()
    blocks = pipe.unet.mid_block.resnets
    blocks[1].conv2 = blocks[0].conv2
    quantize(pipe, recipe="naive")
    assert isinstance(blocks[0].conv2, QuantConv2d)
    assert blocks[1].conv2 is blocks[0].conv2


# What stays as it was, besides the denoiser's layers


def test_success_leaves_everything_but_the_layers(success):
    pipe, before, after = success.pipe, success.before, success.after
    assert after.rest["scheduler"] == before.rest["scheduler"]
    assert after.rest["pipe"] == before.rest["pipe"]
    assert after.rest["random"] == before.rest["random"]
    assert all(module.training for module in denoiser_of(pipe).modules())
    layers = {f"{find_denoiser(pipe)[0]}.{name}" for name in quantization_of(denoiser_of(pipe)).plans}
    denoiser = find_denoiser(pipe)[0] + "."
    for name, state in after.modules.items():
        if name not in layers and name != denoiser:
            (same, kind, *rest), (module, original, *others) = state, before.modules[name]
            assert (same, rest) == (module, others), name
            assert issubclass(kind, original), name


# Refusals: one clear error, and the pipeline as it was


class InterruptionError(Exception):
    pass


def _nan_weight(pipe):
    layer = next(m for n, m in denoiser_of(pipe).named_modules() if n.endswith("attn1.to_k"))
    layer.weight.data[0, 0] = float("nan")


def _huge_activations(pipe):
    """Finite weights whose product overflows in the middle of the run, past the first timestep's first layers."""
    layer = next(m for n, m in denoiser_of(pipe).named_modules() if n.endswith("attn1.to_out.0"))
    layer.weight.data.fill_(3e38)


REFUSALS = {
    "unknown recipe": ({"recipe": "w4a9"}, None, r"unknown recipe 'w4a9'.*'w4a8'"),
    "recipe of another type": ({"recipe": 4}, None, "recipe must be a preset's name or a Recipe: got int"),
    "unknown transform": (
        {"recipe": W4A8.replace(transforms=(MethodSpec("smoothin"),))},
        None,
        "smoothin.*'smoothing'",
    ),
    "unknown rounding": ({"recipe": W4A8.replace(rounding=MethodSpec("nearst"))}, None, "nearst.*'nearest'"),
    "unknown range": ({"recipe": W4A8.replace(linear_range=MethodSpec("dynamik"))}, None, "dynamik.*'dynamic'"),
    "unknown option": (
        {"recipe": W4A8.replace(transforms=(MethodSpec.of("low_rank", rnk=4),))},
        None,
        "rnk.*rank",
    ),
    "group size": (
        {"recipe": W4A8.replace(weight=WeightSpec(bits=4, group_size=96))},
        None,
        r"group_size must .*got group_size=96.*use group_size=",
    ),
    "nothing to quantize": ({"recipe": W4A8.replace(keep=("*",))}, None, "nothing to quantize"),
    "NaN weight": ({}, _nan_weight, r"attn1\.to_k' has NaN or infinite values in its weight"),
    "NaN activation": (
        {},
        _huge_activations,
        r"NaN or infinite values in the input of layer '\w*blocks\.\d.*' at timestep \d+",
    ),
    "prompt of the wrong kind": ({"calibration": [object()]}, None, "prompt|label"),
}


@pytest.mark.parametrize(("arguments", "damage", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_change_nothing(tiny, arguments, damage, message, quantize, snapshot):
    pipe = tiny()
    if damage:
        damage(pipe)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=message):
        quantize(pipe, **arguments)
    before.assert_unchanged()
    assert quantization_of(denoiser_of(pipe)) is None


def test_nan_activation_names_layer_and_timestep(tiny_sd, quantize):
    pipe = tiny_sd()
    _huge_activations(pipe)
    with pytest.raises(ValueError, match=r"in the input of layer '(.*)' at timestep (\d+);") as caught:
        quantize(pipe)
    layer, timestep = re.search(r"layer '(.*)' at timestep (\d+);", str(caught.value)).groups()
    assert layer in dict(pipe.unet.named_modules())
    assert int(timestep) == _timesteps_of(pipe)[0], "the first step already overflows"


def _timesteps_of(pipe):
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(3)
    return [int(t) for t in scheduler.timesteps]


def test_zero_prompts(tiny, quantize, snapshot):
    pipe = tiny()
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="at least one prompt"):
        quantize(pipe, calibration=[])
    with pytest.raises(ValueError, match="must be a list"):
        quantize(pipe, calibration="red apple")
    before.assert_unchanged()


def test_already_quantized(quantized, quantize, snapshot):
    pipe = quantized()
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(pipe)
    before.assert_unchanged()


@pytest.mark.parametrize("thing", [None, 3, "a/path", nn.Linear(2, 2), nn.Linear], ids=repr)
def test_wrong_object(thing):
    with pytest.raises(ValueError, match="pipe must be a diffusers pipeline"):
        quantize_pipeline(thing, progress=False)


def test_class_without_path_and_path_without_class(tiny_dit):
    with pytest.raises(ValueError, match="path is needed to load a StableDiffusionPipeline"):
        quantize_pipeline(StableDiffusionPipeline)
    with pytest.raises(ValueError, match="path: only with a pipeline class"):
        quantize_pipeline(tiny_dit(), "somewhere")
    with pytest.raises(ValueError, match="torch_dtype: only with a pipeline class"):
        quantize_pipeline(tiny_dit(), torch_dtype=torch.float16)


@pytest.mark.parametrize("stage", ["run_pipeline", "quantize_layer", "install"])
@pytest.mark.parametrize("error", [InterruptionError, KeyboardInterrupt])
def test_an_interruption_anywhere_changes_nothing(tiny, monkeypatch, stage, error, quantize, snapshot):
    """Even in the middle of the pipeline's run, and after half of the layers are done."""
    pipe = tiny()
    before = snapshot(pipe)
    module = calibrate if stage == "run_pipeline" else module_under_test
    original = getattr(module, stage)
    calls = 0

    def interrupting(*arguments):
        nonlocal calls
        calls += 1
        if stage == "run_pipeline" or calls == 10:
            original(*arguments)
        if stage != "quantize_layer" or calls == 10:
            raise error
        return original(*arguments)

    monkeypatch.setattr(module, stage, interrupting)
    with pytest.raises(error):
        quantize(pipe, recipe="naive" if stage == "install" else "w4a8")  # which come to the last stage alike
    before.assert_unchanged()


def test_an_interruption_while_layers_are_swapped_changes_nothing(tiny_sd, monkeypatch, quantize, snapshot):
    pipe = tiny_sd()
    before = snapshot(pipe)

    def failing(*arguments):
        raise InterruptionError

    monkeypatch.setattr(type(pipe.unet), "__setattr__", failing)  # the last thing that is set is unet.qdiff
    with pytest.raises(InterruptionError):
        quantize(pipe)
    monkeypatch.undo()
    before.assert_unchanged()


# A quantized pipeline is used like any other


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler], ids=lambda c: c.__name__
)
@pytest.mark.parametrize("steps", [1, 7])
def test_other_scheduler_and_other_number_of_steps(quantized, scheduler, steps, generate):
    pipe = quantized()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    images = generate(pipe, steps=steps)
    assert torch.isfinite(images).all()


def test_deepcopy_is_its_own_pipeline(quantized, generate):
    pipe = quantized()
    twin = copy.deepcopy(pipe)
    expected = generate(pipe)
    assert torch.equal(generate(twin), expected)
    original, copied = denoiser_of(pipe), denoiser_of(twin)
    tracker = quantization_of(copied).tracker
    assert tracker is not quantization_of(original).tracker
    layers = [m for m in copied.modules() if isinstance(m, QUANTIZED)]
    assert all(layer.tracker is tracker for layer in layers)
    generate(twin, steps=5)
    assert torch.equal(generate(pipe), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtype(quantized, dtype, generate):
    """The integers stay, the floating point around them changes. Tolerance: a 16-bit random network against float32."""
    pipe = quantized()
    reference = generate(pipe)
    codes = {k: v.clone() for k, v in denoiser_of(pipe).state_dict().items() if not v.is_floating_point()}
    scales = {n: b.dtype for n, b in denoiser_of(pipe).named_buffers() if n.endswith((".scale", ".act_scales"))}
    assert codes
    assert scales
    images = generate(pipe.to(dtype))
    assert denoiser_of(pipe).dtype == dtype
    assert {n: b.dtype for n, b in denoiser_of(pipe).named_buffers() if n in scales} == scales
    for key, value in codes.items():
        assert torch.equal(denoiser_of(pipe).state_dict()[key], value)
    assert (images.float() - reference).norm() / reference.norm() < 0.1


def test_quantized_in_half_precision(tiny_dit, quantize, generate):
    pipe = tiny_dit().to(torch.bfloat16)
    images = generate(quantize(pipe))
    assert images.dtype == torch.bfloat16
    assert torch.isfinite(images).all()


def test_inference_mode(quantized, generate):
    pipe = quantized()
    expected = generate(pipe)
    with torch.inference_mode():
        assert torch.equal(generate(pipe), expected)


def test_quantized_in_inference_mode_gives_ordinary_tensors(tiny_dit, quantize):
    pipe = tiny_dit()
    with torch.inference_mode():
        quantize(pipe)
    assert not any(buffer.is_inference() for buffer in pipe.transformer.buffers())


def test_offloading_a_whole_model(quantized, generate):
    accelerate = pytest.importorskip("accelerate")
    pipe = quantized()
    expected = generate(pipe)
    _, hook = accelerate.cpu_offload_with_hook(denoiser_of(pipe), torch.device("cpu"))
    assert torch.equal(generate(pipe), expected)
    hook.remove()
    assert torch.equal(generate(pipe), expected)


def test_offloading_layer_by_layer(quantized, generate):
    """Every layer's buffers are on the meta device between its calls, so nothing may keep hold of them."""
    accelerate = pytest.importorskip("accelerate")
    pipe = quantized()
    expected = generate(pipe)
    accelerate.cpu_offload(denoiser_of(pipe), torch.device("cpu"), offload_buffers=True)
    assert all(buffer.is_meta for name, buffer in denoiser_of(pipe).named_buffers() if name.endswith(".codes"))
    assert torch.equal(generate(pipe), expected)


def test_lora_finds_the_layers(quantized_sd, generate):
    peft = pytest.importorskip("peft")
    pipe = quantized_sd()
    expected = generate(pipe)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "conv1", "ff.net.2"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    wrapped = [m for m in pipe.unet.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert {type(layer.base_layer) for layer in wrapped} == {QuantLinear, QuantConv2d}
    changed = generate(pipe)
    assert torch.isfinite(changed).all()
    assert not torch.equal(changed, expected)
    with pytest.raises(ValueError, match="cannot be fused"):
        pipe.fuse_lora()
    pipe.unet.delete_adapters("default")
    assert torch.equal(generate(pipe), expected)


def test_lora_trains_on_quantized_layers(quantized_sd):
    """Only the adapters ask for gradients."""
    peft = pytest.importorskip("peft")
    unet = quantized_sd().unet
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    assert all(not p.requires_grad for n, p in unet.named_parameters() if "lora" not in n)
    assert any(p.requires_grad for n, p in unet.named_parameters() if "lora" in n)


def test_plain_save_pretrained_is_refused(quantized, tmp_path):
    """diffusers would load such a directory with random weights, and not say so."""
    with pytest.raises(ValueError, match=r"qdiff\.save"):
        quantized().save_pretrained(tmp_path)


def test_calibration_settings_are_kept(tiny_dit, monkeypatch, quantize):
    seen = []
    original = calibrate.run_pipeline
    monkeypatch.setattr(calibrate, "run_pipeline", lambda pipe, c: (seen.append(c), original(pipe, c)))
    calibration = Calibration(prompts=[1], steps=2, seed=5)
    quantize(tiny_dit(), calibration=calibration)
    quantize(tiny_dit(), calibration=calibration, seed=9)
    assert seen == [calibration, dataclasses.replace(calibration, seed=9)]
