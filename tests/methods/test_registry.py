from __future__ import annotations

import dataclasses
import pkgutil

import pytest

import qdiff.methods
from qdiff.calibration import NEEDS
from qdiff.methods import REGISTRY, ActivationRange, Rounding, Transform, needs_of, range_mode, register, resolve
from qdiff.methods.contract import STEPS, Probabilities
from qdiff.methods.registry import methods_of
from qdiff.recipe import PRESETS, RANGE_MODES, MethodSpec, Recipe

ROLES = (Transform, Rounding, ActivationRange, Probabilities)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_method_keeps_the_house_rules(name):
    method = REGISTRY[name]()
    assert dataclasses.is_dataclass(method)
    assert sum(isinstance(method, role) for role in ROLES) == 1
    assert method.needs <= NEEDS
    assert type(method).__module__ == f"qdiff.methods.{name}"  # one method, one file, one stem
    assert type(method).__doc__
    if isinstance(method, ActivationRange):
        assert method.mode in RANGE_MODES
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1


def test_every_module_of_the_folder_is_imported():
    modules = {module.name for module in pkgutil.iter_modules(qdiff.methods.__path__)}
    assert set(REGISTRY) <= modules
    assert {"smoothing", "low_rank", "nearest", "dynamic", "static", "temporal"} <= set(REGISTRY)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_name_methods_that_exist(name):
    recipe = Recipe.preset(name)
    for kind in ("linear", "conv2d", "embedding"):
        plan = recipe.plan("layer", kind, (64,), range_mode)
        assert needs_of(plan) <= NEEDS


def test_naive_recipe_needs_nothing_but_absmax():
    assert needs_of(Recipe.preset("naive").plan("layer", "conv2d", (64,), range_mode)) == {"absmax"}


def test_options_reach_the_method():
    assert resolve(MethodSpec.of("low_rank", rank=3)).rank == 3
    assert resolve(MethodSpec.of("static", estimator="minmax")).needs == {"absmax"}
    assert range_mode(MethodSpec.of("temporal", estimator="percentile")) == "temporal"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resolve(MethodSpec.of("smothing")), "unknown method 'smothing': did you mean 'smoothing'"),
        (lambda: resolve(MethodSpec.of("qqq"), Rounding), "known: .*nearest"),
        (lambda: resolve(MethodSpec.of("dynamic"), Rounding), "'dynamic' is no Rounding: use one of .*nearest"),
        (
            lambda: resolve(MethodSpec.of("low_rank", rnk=3)),
            "unknown option 'rnk' of method 'low_rank': did you mean 'rank'",
        ),
        (lambda: resolve(MethodSpec.of("dynamic", x=3)), "it has none"),
        (lambda: resolve(MethodSpec.of("low_rank", rank=0)), "positive integer or None: got 0"),
        (lambda: resolve(MethodSpec.of("low_rank", budget=2)), "budget must be in"),
        (lambda: resolve(MethodSpec.of("low_rank", iterations=0)), "iterations must be at least 1"),
        (lambda: resolve(MethodSpec.of("low_rank", min_gain=1.0)), "low_rank.min_gain"),
        (lambda: resolve(MethodSpec.of("smoothing", min_gain=-1.0)), "smoothing.min_gain"),
        (lambda: resolve(MethodSpec.of("smoothing", alpha=1.5)), "got 1.5"),
        (lambda: resolve(MethodSpec.of("smoothing", alpha="auto")), "got 'auto'"),
        (lambda: resolve(MethodSpec.of("static", estimator="best")), "one of minmax, percentile, .*: got 'best'"),
        (lambda: resolve(MethodSpec.of("temporal", estimator="best")), "got 'best'"),
        (lambda: resolve(MethodSpec.of("temporal", percentile=0.0)), "percentile"),
        (lambda: resolve(MethodSpec.of("low_rank", budget="much")), "option of the wrong type"),
        (lambda: register("nearest")(object), "taken by Nearest"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_new_method_is_one_registration():
    @register("test_only")
    @dataclasses.dataclass(frozen=True)
    class Nothing(Transform):
        strength: float = 1.0

        def apply(self, state):
            state.weight = state.weight * self.strength

    try:
        assert resolve(MethodSpec.of("test_only", strength=2.0), Transform) == Nothing(2.0)
    finally:
        del REGISTRY["test_only"]


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (("hadamard", "smoothing"), "'smoothing' cannot come after 'hadamard': a rotation mixes the channels"),
        (("hadamard", "channel_splitting"), "'channel_splitting' cannot come after 'hadamard'"),
        (("smoothquant", "shift"), "'shift' cannot come after 'smoothquant': scales are measured about zero"),
        (("channel_splitting", "shift"), "'shift' cannot come after 'channel_splitting'"),
        (("low_rank", "awq"), "'awq' cannot come after 'low_rank': the branch reads the input as it is by then"),
        (("low_rank", "bias_correction", "hadamard"), "'hadamard' cannot come after 'low_rank'"),
        (("clipping", "low_rank"), "'low_rank' cannot come after 'clipping'"),
        (("smoothing", "awq"), "'smoothing' and 'awq' do not go together: both change the layer's smooth"),
        (("hadamard", "hadamard"), "'hadamard' and 'hadamard' do not go together"),
    ],
)
def test_transforms_that_do_not_go_together(bench, linear, transforms, message):
    plan = bench.plan(linear, transforms=tuple(map(MethodSpec, transforms)))
    with pytest.raises(ValueError, match=f"^layer: transforms? {message}"):
        methods_of(plan)


def test_all_transforms_in_their_order(bench, linear):
    order = (
        "first_token",
        "shift",
        "channel_splitting",
        "smoothing",
        "hadamard",
        "low_rank",
        "clipping",
        "bias_correction",
    )
    transforms, _, _ = methods_of(bench.plan(linear, transforms=tuple(map(MethodSpec, order))))
    assert [transform.step for transform in transforms] == list(STEPS)
    swapped = bench.plan(linear, transforms=(MethodSpec("smoothing"), MethodSpec("channel_splitting")))
    assert len(methods_of(swapped)[0]) == 2


def test_a_measured_range_of_a_remade_input_needs_samples():
    def needs(range_, *transforms):
        recipe = Recipe.preset("naive").replace(transforms=transforms, linear_range=MethodSpec.of(range_))
        return needs_of(recipe.plan("layer", "linear", (64,), range_mode))

    assert "samples" in needs("static", MethodSpec.of("hadamard"))
    assert "samples" not in needs("dynamic", MethodSpec.of("hadamard"))
    assert "samples" not in needs("static")
