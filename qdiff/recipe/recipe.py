"""`Recipe`: patterns and defaults, and the plan that they make of a layer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from qdiff.recipe.plan import LayerPlan
from qdiff.recipe.specs import (
    ACTIVATION_BITS,
    LayerOverride,
    MethodSpec,
    WeightSpec,
    check_choice,
    check_fields,
    methods_from,
    nearest_names,
    plain_fields,
)

RECIPE_FORMAT_VERSION = 1
SAMPLINGS = ("all", "uniform", "normal")

_WEIGHT = WeightSpec()
_NEAREST, _DYNAMIC, _TEMPORAL = MethodSpec("nearest"), MethodSpec("dynamic"), MethodSpec("temporal")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """`transforms* + rounding + activation range`, with which layers, bits and granularity.

    keep:       fnmatch patterns over module names that stay in full precision.
    overrides:  every override that matches a layer is applied, in order; a later one wins field by field.
    sampling:   the steps of its trajectories that calibration looks at, where the caller does not say: "all", or a
                quarter of them, "uniform" or "normal" (see `qdiff.Calibration`).
    all_timesteps:  fnmatch patterns of layers that depend on the timestep alone; calibration shows them all timesteps
                instead of those of one schedule (TFMQ-DM, arXiv 2311.16503).
    probabilities:  what attention's softmax outputs are rounded by, such as "log2"; None: by nothing.
    """

    name: str
    weight: WeightSpec = _WEIGHT
    activation_bits: int = 8
    transforms: tuple[MethodSpec, ...] = ()
    rounding: MethodSpec = _NEAREST
    linear_range: MethodSpec = _DYNAMIC
    conv_range: MethodSpec = _TEMPORAL
    keep: tuple[str, ...] = ()
    overrides: tuple[LayerOverride, ...] = ()
    split_skips: bool = True
    quantize_embeddings: bool = True
    sampling: str = "all"
    all_timesteps: tuple[str, ...] = ()
    probabilities: MethodSpec | None = None

    def __post_init__(self) -> None:
        for field in ("transforms", "keep", "overrides", "all_timesteps"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        check_choice("activation_bits", self.activation_bits, ACTIVATION_BITS)
        check_choice("sampling", self.sampling, SAMPLINGS)

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """One of `PRESETS`; raises `ValueError` with the nearest names."""
        from qdiff.recipe.presets import PRESETS  # made of recipes

        if name not in PRESETS:
            raise ValueError(f"unknown recipe {name!r}: {nearest_names(str(name), PRESETS)}")
        return PRESETS[name]

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed; raises `ValueError` for a field that does not exist."""
        check_fields("recipe", changes, [field.name for field in dataclasses.fields(self)])
        return dataclasses.replace(self, **changes)

    def kept_by(self, layer: str) -> str | None:
        """The first `keep` pattern that matches a module's name, or None."""
        return next((pattern for pattern in self.keep if fnmatchcase(layer, pattern)), None)

    def plan(
        self,
        layer: str,
        kind: str,
        segments: Sequence[int],
        mode_of: Callable[[MethodSpec], str] = lambda spec: spec.name,
    ) -> LayerPlan:
        """The plan of one layer, overrides applied.

        segments: input channel counts (embedding: the row's width).  mode_of: a range method's mode
        (`qdiff.methods.range_mode`).  Raises `ValueError` where group_size does not divide a segment.
        """
        chosen: dict[str, Any] = {
            "weight": self.weight,
            "activation_bits": self.activation_bits,
            "transforms": self.transforms,
            "rounding": self.rounding,
            "range": self.conv_range if kind == "conv2d" else self.linear_range,
        }
        for override in self.overrides:
            if fnmatchcase(layer, override.pattern):
                chosen.update({k: getattr(override, k) for k in chosen if getattr(override, k) is not None})
        if kind == "embedding":  # a table is looked up, not multiplied: nothing to transform, no activation
            chosen.update(activation_bits=16, transforms=())
        weight: WeightSpec = chosen["weight"]
        mode = mode_of(chosen["range"]) if chosen["activation_bits"] <= 8 else "none"
        return LayerPlan(
            name=layer,
            kind=kind,
            weight_bits=weight.bits,
            group_size=_resolve_group_size(weight, segments),
            granularity=weight.granularity,
            activation_bits=chosen["activation_bits"],
            range_mode=mode,
            range=chosen["range"],
            transforms=chosen["transforms"],
            rounding=chosen["rounding"],
            segments=tuple(segments),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        fields = plain_fields(self)
        fields["overrides"] = [override.to_dict() for override in self.overrides]
        return {"version": RECIPE_FORMAT_VERSION} | fields

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        version = data.get("version", RECIPE_FORMAT_VERSION)
        if version != RECIPE_FORMAT_VERSION:
            raise ValueError(f"recipe version must be {RECIPE_FORMAT_VERSION}: got {version!r}; update qdiff")
        data = {key: value for key, value in data.items() if key != "version"}
        check_fields("recipe", data, [field.name for field in dataclasses.fields(cls)])
        fields = methods_from(data)
        fields["overrides"] = tuple(LayerOverride.from_dict(item) for item in data.get("overrides", ()))
        return cls(**fields)

    def to_json(self, indent: int | None = 2) -> str:
        """Law: `Recipe.from_json(recipe.to_json()) == recipe`."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe of a JSON text; raises `ValueError` for a damaged text or an unknown field."""
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"a recipe in JSON must be an object: got {type(data).__name__}")
        return cls.from_dict(data)


def _resolve_group_size(weight: WeightSpec, segments: Sequence[int]) -> int:
    """In bytes: -1. In four bits and -1: as many channels as divide every segment, so that a group stays in one tap."""
    if weight.bits > 4:
        return -1
    return math.gcd(*segments) if weight.group_size == -1 else weight.group_size
