"""calibrate: one run for several recipes gives each of them the bytes of a run of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff import Calibration, Recipe, calibrate, quantize_pipeline
from qdiff.plugin.structure import find_denoiser, quantization_of
from qdiff.recipe import MethodSpec, WeightSpec

PLAIN = Recipe("plain", WeightSpec(4, -1), rounding=MethodSpec.of("nearest", search=False))
HISTOGRAMS_ALONE = PLAIN.replace(name="histograms", conv_range=MethodSpec.of("temporal", estimator="percentile"))
SAMPLES_ALONE = PLAIN.replace(
    name="samples", rounding=MethodSpec.of("nearest"), conv_range=MethodSpec.of("static", estimator="minmax")
)
IN_ORDER = PLAIN.replace(name="in order", rounding=MethodSpec.of("adaquant", iterations=3))
FIRST_TOKEN = PLAIN.replace(name="first token", transforms=(MethodSpec.of("first_token"),))
TOGETHER = [Recipe.preset("w4a8"), Recipe.preset("naive"), HISTOGRAMS_ALONE, SAMPLES_ALONE]


def calibration_of(pipe, **changes) -> Calibration:
    prompts = ["red apple, noto style", "green cat"] if hasattr(pipe, "unet") else [1, 7]
    return Calibration(prompts, **{"steps": 3, "seed": 5} | changes)


def bytes_of(pipe) -> dict[str, torch.Tensor]:
    denoiser = find_denoiser(pipe)[1]
    assert quantization_of(denoiser) is not None
    return {**denoiser.state_dict(), **dict(denoiser.named_buffers())}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_recipe_gives_the_same_bytes_with_shared_statistics_as_with_its_own(tiny, snapshot):
    pipe = tiny()
    before = snapshot(pipe)
    recipes = [*TOGETHER, IN_ORDER]
    statistics = calibrate(pipe, recipes, calibration_of(pipe), progress=False)
    before.assert_unchanged()
    # The costly ones on one model only: a UNet has many layers.
    for recipe in [HISTOGRAMS_ALONE, SAMPLES_ALONE] if hasattr(pipe, "unet") else recipes:
        shared = quantize_pipeline(tiny(), recipe=recipe, statistics=statistics, progress=False)
        alone = quantize_pipeline(tiny(), recipe=recipe, calibration=calibration_of(pipe), progress=False)
        assert_equal(bytes_of(shared), bytes_of(alone))


def test_the_seed_and_a_preset_by_name(tiny_sd):
    pipe = tiny_sd()
    statistics = calibrate(pipe, "zeroquant", calibration_of(pipe), seed=9, progress=False)
    assert statistics.calibration == calibration_of(pipe, seed=9)
    shared = quantize_pipeline(tiny_sd(), recipe="zeroquant", statistics=statistics, progress=False)
    alone = quantize_pipeline(tiny_sd(), recipe="zeroquant", calibration=calibration_of(pipe, seed=9), progress=False)
    assert_equal(bytes_of(shared), bytes_of(alone))


def test_statistics_that_lack_what_a_recipe_needs_are_refused(tiny_sd, snapshot):
    pipe = tiny_sd()
    statistics = calibrate(pipe, HISTOGRAMS_ALONE, calibration_of(pipe), progress=False)
    before = snapshot(pipe)
    wanting = {
        r"needs absmax, .*samples.*, and absmax.* was collected; pass the recipe to calibrate": SAMPLES_ALONE,
        r"needs absmax, first_token, .*and absmax.* was collected": FIRST_TOKEN,
        r"steps that recipe 'sampled' samples, 'uniform': they are of 'all'": HISTOGRAMS_ALONE.replace(
            name="sampled", sampling="uniform"
        ),
        r"was not shown all timesteps": HISTOGRAMS_ALONE.replace(all_timesteps=("time_embedding.*",)),
    }
    for message, recipe in wanting.items():
        with pytest.raises(ValueError, match=message):
            quantize_pipeline(pipe, recipe=recipe, statistics=statistics, progress=False)
    before.assert_unchanged()


def test_statistics_without_a_first_token_serve_no_recipe_that_has_it(tiny_sd):
    pipe = tiny_sd()
    statistics = calibrate(pipe, FIRST_TOKEN, calibration_of(pipe), progress=False)
    with pytest.raises(ValueError, match="absmax, first_token, histograms was collected"):
        quantize_pipeline(pipe, recipe=PLAIN, statistics=statistics, progress=False)


def test_a_layer_that_another_recipe_keeps_was_not_looked_at(tiny_sd):
    pipe = tiny_sd()
    statistics = calibrate(pipe, PLAIN.replace(keep=("conv_in",)), calibration_of(pipe), progress=False)
    with pytest.raises(ValueError, match=r"'conv_in' needs absmax, .*and nothing was collected"):
        quantize_pipeline(
            pipe, recipe=PLAIN.replace(weight=WeightSpec(8, -1, "channel")), statistics=statistics, progress=False
        )


def test_statistics_of_a_wider_denoiser_are_refused(tiny_sd):
    pipe = tiny_sd()
    statistics = calibrate(pipe, PLAIN, calibration_of(pipe), progress=False)
    name, layer = next((n, m) for n, m in pipe.unet.named_modules() if isinstance(m, nn.Linear))
    pipe.unet.set_submodule(name, nn.Linear(2 * layer.in_features, layer.out_features))
    with pytest.raises(ValueError, match=f"'{name}' has {2 * layer.in_features} input channels, and"):
        quantize_pipeline(pipe, recipe=PLAIN, statistics=statistics, progress=False)


def test_recipes_that_cannot_share_a_run_are_refused(tiny_sd):
    pipe = tiny_sd()
    with pytest.raises(ValueError, match="at the same steps: 'ptq4dm' samples 'normal' and 'naive' 'all'"):
        calibrate(pipe, ["naive", "ptq4dm"], calibration_of(pipe), progress=False)
    with pytest.raises(ValueError, match=r"agree on the first token of .*'first token'"):
        calibrate(pipe, [PLAIN, FIRST_TOKEN], calibration_of(pipe), progress=False)
    with pytest.raises(ValueError, match="recipes must name at least one"):
        calibrate(pipe, [], progress=False)


@pytest.mark.parametrize("extra", [{"calibration": ["red cat"]}, {"seed": 1}], ids=["calibration", "seed"])
def test_statistics_come_with_their_calibration(tiny_sd, extra):
    pipe = tiny_sd()
    statistics = calibrate(pipe, PLAIN, calibration_of(pipe), progress=False)
    with pytest.raises(ValueError, match=f"{next(iter(extra))} does not go with statistics"):
        quantize_pipeline(pipe, recipe=PLAIN, statistics=statistics, **extra, progress=False)
