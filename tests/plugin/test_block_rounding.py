from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from qdiff import Recipe, load, save
from qdiff.calibration import collect
from qdiff.denoising import StepTracker
from qdiff.methods import draft_layer
from qdiff.methods.adaround import AdaRound
from qdiff.plugin import block_rounding
from qdiff.plugin.block_rounding import block_loss, learn_block
from qdiff.plugin.blocks import BlockCall
from qdiff.plugin.calls import Call
from qdiff.recipe import MethodSpec, WeightSpec

BLOCKS = MethodSpec.of("adaround", iterations=20, block_iterations=4)
RECIPE = Recipe.preset("brecq").replace(rounding=BLOCKS)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.requires_grad_(False)

    def forward(self, sample, timestep=None):
        return sample + self.second(torch.relu(self.first(sample)))


def problem(block, steps, count=32):
    """Calls of a block whose inputs are a mixture of few sources, and drafts of its layers."""
    generator = torch.Generator().manual_seed(1)
    mixture = torch.randn(8, 32, generator=generator)
    inputs = [torch.randn(4, 32, 8, generator=generator) @ mixture for _ in range(count)]
    calls = [BlockCall(Call((x,), {}), None, [block(x)], [torch.ones(32)]) for x in inputs]
    recipe = Recipe.preset("brecq").replace(
        rounding=MethodSpec.of("adaround", iterations=1, block_iterations=steps), weight=WeightSpec(3, 16)
    )
    plans = {name: recipe.plan(name, "linear", (32,)) for name in ("first", "second")}
    layers = {name: getattr(block, name) for name in plans}

    def run():
        for x in inputs:
            block(x, timestep=torch.tensor(1.0))

    seen = collect(run, block, layers, {"samples"}, progress=False)
    drafts = {name: draft_layer(plan, layers[name], seen.layers[name]) for name, plan in plans.items()}
    return calls, drafts


def error(block, drafts, codes, calls):
    with block_rounding._opened(block, drafts, StepTracker([1.0])) as layers:
        for name, learned in codes.items():
            layers[name].matrix = learned * drafts[name].rounded.steps()
        return sum(float(block_loss(block, call, StepTracker([1.0]))) for call in calls) ** 0.5


def test_a_blocks_error_falls_on_calls_that_it_did_not_learn_from():
    block = Block()
    calls, drafts = problem(block, steps=200, count=48)
    codes = learn_block(block, drafts, calls[:32], StepTracker([1.0]))
    assert error(block, drafts, codes, calls[32:]) < 0.75 * error(block, drafts, {}, calls[32:])
    for name, learned in codes.items():
        floor = (drafts[name].state.weight / drafts[name].rounded.steps()).floor()
        inside = (floor >= -4) & (floor < 3)
        assert (((learned - floor) == 0) | ((learned - floor) == 1))[inside].all()
    assert type(block.first) is nn.Linear


def test_codes_that_are_no_better_are_not_taken(monkeypatch):
    block = Block()
    calls, drafts = problem(block, steps=3)
    monkeypatch.setattr(block_rounding._Choice, "codes", lambda self: self.base)  # everything is rounded down
    assert learn_block(block, drafts, calls, StepTracker([1.0])) == {}


def test_a_block_without_error_keeps_its_codes():
    block = Block()
    calls, drafts = problem(block, steps=3)
    silent = [call._replace(costs=[torch.zeros(32)]) for call in calls]
    assert learn_block(block, drafts, silent, StepTracker([1.0])) == {}


def test_too_few_calls_to_hold_one_out_are_said():
    block = Block()
    calls, drafts = problem(block, steps=3)
    with pytest.warns(UserWarning, match="learned from 3 calls of the denoiser and judged by the same, with 4 one of"):
        learn_block(block, drafts, calls[:3], StepTracker([1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn_block(block, drafts, calls[:4], StepTracker([1.0]))


def test_full_round_trip(tiny_dit, quantize, generate, tmp_path):
    first, second = quantize(tiny_dit(), recipe=RECIPE), quantize(tiny_dit(), recipe=RECIPE)
    images = generate(first)
    assert torch.equal(images, generate(second))  # the same bytes every time
    assert torch.isfinite(images).all()
    save(first, tmp_path / "saved")
    assert torch.equal(images, generate(load(tmp_path / "saved")))


def test_what_blocks_learn_is_what_is_stored(tiny_dit, quantize, monkeypatch):
    monkeypatch.setattr(
        block_rounding,
        "learn_block",
        lambda block, drafts, *_: {name: draft.rounded.codes.flip(0) for name, draft in drafts.items()},
    )
    flipped = quantize(tiny_dit(), recipe=RECIPE).transformer
    monkeypatch.setattr(block_rounding, "learn_block", lambda *_: {})
    kept = quantize(tiny_dit(), recipe=RECIPE).transformer
    for name, layer in kept.named_modules():
        if hasattr(layer, "codes") and "transformer_blocks" in name:
            turned = torch.equal(flipped.get_submodule(name).codes, layer.codes.flip(0))
            assert turned == ("class_embedder" not in name), name
    assert kept.transformer_blocks[0].attn1.to_q.codes.any()


def test_blocks_of_a_unet(tiny_sd, quantize, generate):
    recipe = RECIPE.replace(keep=(*RECIPE.keep, "down_blocks*", "mid_block*", "up_blocks.0*", "up_blocks.1.*.[1-9]*"))
    assert torch.isfinite(generate(quantize(tiny_sd(), recipe=recipe))).all()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_pipeline_is_as_it_was_on_any_error(tiny, quantize, snapshot, monkeypatch, error):
    pipe, seen = tiny(), []
    before, inner = snapshot(pipe), block_loss

    def fail(*arguments):
        seen.append(1)
        if len(seen) == 30:
            raise error
        return inner(*arguments)

    monkeypatch.setattr(block_rounding, "block_loss", fail)
    with pytest.raises(error):
        quantize(pipe, recipe=RECIPE)
    before.assert_unchanged()


def test_every_layer_of_a_block_keeps_a_rounding_of_its_own():
    assert AdaRound().block_steps == 0
    assert AdaRound(block_iterations=7).block_steps == 7
