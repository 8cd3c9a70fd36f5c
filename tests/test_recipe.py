from __future__ import annotations

import copy
import json
import pickle

import pytest

from qdiff.methods import range_mode
from qdiff.recipe import (
    DEFAULT_KEEP,
    PRESETS,
    LayerOverride,
    LayerPlan,
    MethodSpec,
    Options,
    Recipe,
    WeightSpec,
)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name):
    recipe = Recipe.preset(name)
    assert recipe.name == name
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.to_json() == recipe.to_json()


def test_every_field_survives_json():
    recipe = Recipe(
        name="mine",
        weight=WeightSpec(4, 32, "channel"),
        activation_bits=16,
        transforms=(MethodSpec.of("low_rank", rank=7, budget=0.5), MethodSpec.of("smoothing", alpha=0.25)),
        rounding=MethodSpec.of("nearest", search=False),
        linear_range=MethodSpec.of("static", estimator="minmax"),
        conv_range=MethodSpec.of("temporal", percentile=0.5),
        keep=("a*", "b.?"),
        overrides=(
            LayerOverride("*.x", weight=WeightSpec(8, -1, "tensor"), transforms=()),
            LayerOverride("*.y", activation_bits=8, rounding=MethodSpec("nearest"), range=MethodSpec("static")),
        ),
        split_skips=False,
        quantize_embeddings=False,
    )
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.overrides[0].transforms == ()
    assert again.overrides[1].transforms is None


def test_recipes_copy_pickle_and_hash():
    recipe = Recipe.preset("w4a8")
    assert copy.deepcopy(recipe) == pickle.loads(pickle.dumps(recipe)) == recipe
    assert hash(copy.deepcopy(recipe)) == hash(recipe)


def test_options_compare_as_mappings_whatever_their_order():
    assert Options({"a": 1, "b": 2}) == Options({"b": 2, "a": 1})
    assert hash(Options({"a": 1, "b": 2})) == hash(Options({"b": 2, "a": 1}))
    assert Options({"a": 1}) != Options({"a": 2})
    assert dict(**Options({"a": 1})) == {"a": 1}


def test_default_recipe_keeps_first_and_last_layers():
    recipe = Recipe.preset("w4a8")
    for layer in ("conv_in", "conv_out", "pos_embed.proj", "proj_out_2"):
        assert recipe.kept_by(layer) in DEFAULT_KEEP
    for layer in ("mid_block.attentions.0.proj_out", "down_blocks.0.resnets.0.conv1", "norm_out.linear"):
        assert recipe.kept_by(layer) is None


def test_plan_of_a_convolution():
    plan = Recipe.preset("w4a8").plan("up_blocks.0.resnets.0.conv1", "conv2d", (128, 64))
    assert (plan.weight_bits, plan.group_size, plan.granularity) == (4, 32, "group")
    assert (plan.activation_bits, plan.range_mode, plan.range.name) == (8, "temporal", "temporal")
    assert plan.segments == (128, 64)


def test_plan_of_an_8_bit_layer_has_no_groups():
    plan = Recipe.preset("w4a8").plan("time_text_embed.linear_1", "linear", (100,))
    assert (plan.weight_bits, plan.group_size, plan.transforms, plan.range_mode) == (8, -1, (), "dynamic")


@pytest.mark.parametrize(
    ("layer", "bits"),
    [
        ("down_blocks.0.attentions.1.proj_in", 8),
        ("up_blocks.1.resnets.0.conv_shortcut", 8),
        ("up_blocks.1.upsamplers.0.conv", 8),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", 8),
        ("up_blocks.2.resnets.0.conv2", 8),
        ("transformer_blocks.3.attn1.to_v", 8),
        ("transformer_blocks.3.ff.net.0.proj", 8),
        ("transformer_blocks.3.ff.net.2", 4),
        ("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj", 4),
        ("up_blocks.1.resnets.0.conv1", 4),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_k", 4),
        ("single_transformer_blocks.3.proj_out", 4),
        ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1", 4),
        ("adaln_single.emb.timestep_embedder.linear_1", 8),
    ],
)
def test_default_bits_follow_what_was_measured(layer, bits):
    assert Recipe.preset("w4a8").plan(layer, "linear", (64,)).weight_bits == bits


def test_plan_of_an_embedding_has_no_activation():
    plan = Recipe.preset("w4a8").plan("class_embedder.table", "embedding", (64,))
    assert (plan.range_mode, plan.transforms, plan.weight_bits) == ("none", (), 8)


def test_sixteen_bit_activations_have_no_range():
    assert Recipe.preset("w4a16").plan("a", "linear", (64,)).range_mode == "none"


def test_later_overrides_win_field_by_field():
    recipe = Recipe.preset("w4a8").replace(
        overrides=(
            LayerOverride("a.*", weight=WeightSpec(4, 64), range=MethodSpec.of("static")),
            LayerOverride("*.b", weight=WeightSpec(4, 16)),
        )
    )
    plan = recipe.plan("a.b", "linear", (64,))
    assert (plan.group_size, plan.range_mode) == (16, "static")
    assert recipe.plan("a.c", "linear", (64,)).group_size == 64
    assert recipe.plan("c.c", "linear", (64,)).group_size == 32


def test_mode_of_decides_the_mode_of_a_range_method():
    recipe = Recipe.preset("w4a8").replace(conv_range=MethodSpec("learned"))
    assert recipe.plan("a", "conv2d", (64,), mode_of=lambda spec: "temporal").range_mode == "temporal"


@pytest.mark.parametrize(("segments", "expected"), [((96,), 96), ((128, 64), 64), ((96, 64), 32)])
def test_group_of_minus_one_is_what_divides_every_segment(segments, expected):
    recipe = Recipe.preset("w4a8").replace(weight=WeightSpec(4, -1))
    assert recipe.plan("a", "linear", segments).group_size == expected


def test_plans_survive_json():
    for recipe in PRESETS.values():
        for kind, segments in (("linear", (64,)), ("conv2d", (64, 128)), ("embedding", (64,))):
            plan = recipe.plan("layer", kind, segments, range_mode)
            assert LayerPlan.from_json(plan.to_json()) == plan
            assert json.loads(plan.to_json())["segments"] == list(segments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe.preset("w4a88"), "did you mean 'w4a8'"),
        (lambda: Recipe.preset("zzz"), "known: adaquant"),
        (lambda: Recipe.preset("w4a8").replace(kep=()), "did you mean 'keep'"),
        (lambda: Recipe.from_json('{"name": "a", "wieght": {}}'), "did you mean 'weight'"),
        (lambda: Recipe.from_json('{"name": "a", "version": 99}'), "version must be 1"),
        (lambda: Recipe.from_json("[]"), "must be an object"),
        (lambda: Recipe.from_json("{"), "Expecting property name"),
        (lambda: Recipe(name="a", activation_bits=3), "activation_bits must be one of 4, 5, 6, 7, 8, 16: got 3"),
        (lambda: WeightSpec(bits=9, granularity="channel"), "weight.bits must be one of 2, .*, 8: got 9"),
        (lambda: WeightSpec(group_size=0), "group_size must be -1 or a positive even number: got 0"),
        (lambda: WeightSpec(group_size=True), "group_size must be"),
        (lambda: WeightSpec(granularity="row"), "granularity must be one of"),
        (lambda: WeightSpec(bits=5), "use 'channel' or 'tensor'"),
        (lambda: MethodSpec.of("a", x=[1]), "plain JSON value"),
        (
            lambda: Recipe.preset("w4a8").plan("l", "linear", (100,)),
            "l: group_size must be even and divide.*use group_size=4",
        ),
        (lambda: Recipe.preset("w4a8").plan("l", "linear", (7,)), "8-bit weights"),
        (lambda: Recipe.preset("w4a8").plan("l", "conv3d", (64,)), "kind must be one of"),
        (lambda: Recipe.preset("w4a8").plan("l", "linear", ()), "segments"),
        (
            lambda: Recipe.preset("w4a8").replace(conv_range=MethodSpec("dynamic")).plan("l", "conv2d", (64,)),
            "no per-token",
        ),
    ],
)
def test_errors_say_what_came_and_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
