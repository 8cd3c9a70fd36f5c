"""What is done to which layer: frozen dataclasses, presets, JSON in and out.

A `Recipe` speaks of patterns and defaults; `Recipe.plan` turns it into the `LayerPlan` of one layer. Methods are named,
not imported: a `MethodSpec` is a registry key with options, and this layer needs nothing but the standard library.
"""

from qdiff.recipe.plan import LAYER_KINDS, RANGE_MODES, LayerPlan, group_size_error
from qdiff.recipe.presets import DEFAULT_KEEP, DEFAULT_OVERRIDES, PRESETS
from qdiff.recipe.recipe import RECIPE_FORMAT_VERSION, SAMPLINGS, Recipe
from qdiff.recipe.specs import (
    ACTIVATION_BITS,
    GRANULARITIES,
    WEIGHT_BITS,
    LayerOverride,
    MethodSpec,
    Options,
    OptionValue,
    WeightSpec,
    check_choice,
    nearest_names,
)

__all__ = [
    "ACTIVATION_BITS",
    "DEFAULT_KEEP",
    "DEFAULT_OVERRIDES",
    "GRANULARITIES",
    "LAYER_KINDS",
    "PRESETS",
    "RANGE_MODES",
    "RECIPE_FORMAT_VERSION",
    "SAMPLINGS",
    "WEIGHT_BITS",
    "LayerOverride",
    "LayerPlan",
    "MethodSpec",
    "OptionValue",
    "Options",
    "Recipe",
    "WeightSpec",
    "check_choice",
    "group_size_error",
    "nearest_names",
]
