"""What is done to which layer: frozen dataclasses, presets, JSON in and out.

A `Recipe` speaks of patterns and defaults; `Recipe.plan` turns it into the `LayerPlan` of one layer. Methods are named,
not imported: a `MethodSpec` is a registry key with options, and this module needs nothing but the standard library.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

RECIPE_FORMAT_VERSION = 1
WEIGHT_BITS = (4, 8)
ACTIVATION_BITS = (8, 16)
GRANULARITIES = ("group", "channel", "tensor")
RANGE_MODES = ("dynamic", "static", "temporal", "none")
LAYER_KINDS = ("linear", "conv2d", "embedding")

OptionValue = str | int | float | bool | None


def nearest_names(name: str, known: Iterable[str]) -> str:
    """The end of an error's sentence: which known names are close to `name`, or else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(known)}"


def check_choice(owner: str, value: object, choices: Sequence[object]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`; `owner` names the argument."""
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{owner} must be one of {', '.join(map(str, choices))}: got {value!r}")


class Options(Mapping[str, OptionValue]):
    """A frozen, hashable, ordered-by-key mapping of a method's options (plain JSON values)."""

    __slots__ = ("_items",)

    def __init__(self, values: Mapping[str, OptionValue] | None = None) -> None:
        self._items = tuple(sorted(dict(values or {}).items()))
        for key, value in self._items:
            if not isinstance(value, str | int | float | bool | None):
                raise ValueError(f"option {key!r} must be a plain JSON value: got {type(value).__name__}")

    def __getitem__(self, key: str) -> OptionValue:
        return dict(self._items)[key]

    def __iter__(self) -> Iterator[str]:
        return (key for key, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return repr(dict(self._items))


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """A method's registry key and its options; `qdiff.methods.resolve` makes the method of it."""

    name: str
    options: Options = dataclasses.field(default_factory=Options)

    def __post_init__(self) -> None:
        if not isinstance(self.options, Options):
            object.__setattr__(self, "options", Options(self.options))

    @classmethod
    def of(cls, name: str, **options: OptionValue) -> MethodSpec:
        """`MethodSpec.of("low_rank", rank=32)`."""
        return cls(name, Options(options))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "options": dict(self.options)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MethodSpec:
        _check_fields("method", data, ("name", "options"))
        return cls(data["name"], Options(data.get("options")))


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """The grid of a weight: bits, weights per group (-1: a segment's channels of one tap), and what shares a scale."""

    bits: int = 4
    group_size: int = 32
    granularity: str = "group"

    def __post_init__(self) -> None:
        check_choice("weight.bits", self.bits, WEIGHT_BITS)
        check_choice("weight.granularity", self.granularity, GRANULARITIES)
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and (size < 2 or size % 2)):
            raise ValueError(f"weight.group_size must be -1 or a positive even number: got {size!r}")
        if self.bits == 8 and self.granularity == "group":
            raise ValueError("weight.granularity 'group' needs 4-bit weights: got bits=8; use 'channel' or 'tensor'")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightSpec:
        _check_fields("weight", data, ("bits", "group_size", "granularity"))
        return cls(**data)


@dataclasses.dataclass(frozen=True)
class LayerOverride:
    """What is different for the layers whose module name matches `pattern` (fnmatch); None leaves a field alone."""

    pattern: str
    weight: WeightSpec | None = None
    activation_bits: int | None = None
    transforms: tuple[MethodSpec, ...] | None = None
    rounding: MethodSpec | None = None
    range: MethodSpec | None = None

    def __post_init__(self) -> None:
        if self.activation_bits is not None:
            check_choice("override.activation_bits", self.activation_bits, ACTIVATION_BITS)
        if self.transforms is not None:
            object.__setattr__(self, "transforms", tuple(self.transforms))

    def to_dict(self) -> dict[str, Any]:
        """Only the fields that are set."""
        return {"pattern": self.pattern} | {k: v for k, v in _plain_fields(self).items() if v is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerOverride:
        _check_fields("override", data, [field.name for field in dataclasses.fields(cls)])
        return cls(**_methods_from(data))


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Everything decided about one layer before its numbers are looked at.

    segments:    channel counts with an activation scale each; their sum is the layer's input channels.
    group_size:  weights that share a multiplier (4-bit: divides every segment); -1 for 8-bit weights.
    range_mode:  "dynamic" (per token, linear only), "static" (one row), "temporal" (a row a timestep), "none" (16 bit).
    """

    name: str
    kind: str
    weight_bits: int
    group_size: int
    granularity: str
    activation_bits: int
    range_mode: str
    range: MethodSpec
    transforms: tuple[MethodSpec, ...]
    rounding: MethodSpec
    segments: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", tuple(self.transforms))
        object.__setattr__(self, "segments", tuple(self.segments))
        check_choice(f"{self.name}: kind", self.kind, LAYER_KINDS)
        check_choice(f"{self.name}: weight_bits", self.weight_bits, WEIGHT_BITS)
        check_choice(f"{self.name}: granularity", self.granularity, GRANULARITIES)
        check_choice(f"{self.name}: activation_bits", self.activation_bits, ACTIVATION_BITS)
        check_choice(f"{self.name}: range_mode", self.range_mode, RANGE_MODES)
        if not self.segments or min(self.segments) < 1:
            raise ValueError(f"{self.name}: segments must be positive channel counts: got {self.segments}")
        size = self.group_size
        if self.weight_bits == 4 and (size < 2 or size % 2 or any(channels % size for channels in self.segments)):
            raise ValueError(group_size_error(self.name, self.group_size, self.segments))
        if self.kind == "conv2d" and self.range_mode == "dynamic":
            raise ValueError(f"{self.name}: a convolution has no per-token range: use 'static' or 'temporal'")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return _plain_fields(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerPlan:
        _check_fields("layer plan", data, [field.name for field in dataclasses.fields(cls)])
        return cls(**_methods_from(data))

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> LayerPlan:
        return cls.from_dict(json.loads(text))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """`transforms* + rounding + activation range`, with which layers, bits and granularity.

    keep:       fnmatch patterns over module names that stay in full precision.
    overrides:  every override that matches a layer is applied, in order; a later one wins field by field.
    """

    name: str
    weight: WeightSpec = WeightSpec()
    activation_bits: int = 8
    transforms: tuple[MethodSpec, ...] = ()
    rounding: MethodSpec = MethodSpec("nearest")
    linear_range: MethodSpec = MethodSpec("dynamic")
    conv_range: MethodSpec = MethodSpec("temporal")
    keep: tuple[str, ...] = ()
    overrides: tuple[LayerOverride, ...] = ()
    split_skips: bool = True
    quantize_embeddings: bool = True

    def __post_init__(self) -> None:
        for field in ("transforms", "keep", "overrides"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        check_choice("activation_bits", self.activation_bits, ACTIVATION_BITS)

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """One of `PRESETS`; raises `ValueError` with the nearest names."""
        if name not in PRESETS:
            raise ValueError(f"unknown recipe {name!r}: {nearest_names(str(name), PRESETS)}")
        return PRESETS[name]

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed; raises `ValueError` for a field that does not exist."""
        _check_fields("recipe", changes, [field.name for field in dataclasses.fields(self)])
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
        mode = mode_of(chosen["range"]) if chosen["activation_bits"] == 8 else "none"
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
        fields = _plain_fields(self)
        fields["overrides"] = [override.to_dict() for override in self.overrides]
        return {"version": RECIPE_FORMAT_VERSION} | fields

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        version = data.get("version", RECIPE_FORMAT_VERSION)
        if version != RECIPE_FORMAT_VERSION:
            raise ValueError(f"recipe version must be {RECIPE_FORMAT_VERSION}: got {version!r}; update qdiff")
        data = {key: value for key, value in data.items() if key != "version"}
        _check_fields("recipe", data, [field.name for field in dataclasses.fields(cls)])
        fields = _methods_from(data)
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


def group_size_error(layer: str, group_size: int, segments: Sequence[int]) -> str:
    """The sentence for a group size that does not fit a layer, with the sizes that would."""
    common = math.gcd(*segments)
    fitting = [size for size in (128, 64, 48, 32, 24, 16, 8, 4, 2) if common % size == 0]
    advice = f"use group_size={fitting[0]}" if fitting else "keep the layer, or give it 8-bit weights"
    came = f"got group_size={group_size}, channels={list(segments)}"
    return f"{layer}: group_size must be even and divide its input channels: {came}; {advice}"


def _resolve_group_size(weight: WeightSpec, segments: Sequence[int]) -> int:
    """8-bit: -1. 4-bit and -1: as many channels as divide every segment, so that a group stays in one tap."""
    if weight.bits == 8:
        return -1
    return math.gcd(*segments) if weight.group_size == -1 else weight.group_size


def _check_fields(owner: str, data: Mapping[str, Any], known: Iterable[str]) -> None:
    known = list(known)
    for key in data:
        if key not in known:
            raise ValueError(f"unknown field {key!r} of a {owner}: {nearest_names(key, known)}")


def _plain_fields(instance: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(instance, field.name)) for field in dataclasses.fields(instance)}


def _plain(value: Any) -> Any:
    if isinstance(value, MethodSpec):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _methods_from(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values back to the dataclasses of the fields that recipes, overrides and plans share."""
    fields = dict(data)
    for key in ("rounding", "range", "linear_range", "conv_range"):
        if fields.get(key) is not None:
            fields[key] = MethodSpec.from_dict(fields[key])
    if fields.get("transforms") is not None:
        fields["transforms"] = tuple(MethodSpec.from_dict(item) for item in fields["transforms"])
    if fields.get("weight") is not None:
        fields["weight"] = WeightSpec.from_dict(fields["weight"])
    return fields


# First and last layers of the UNets and DiTs of diffusers: they see pixels or latents and cost few bytes. Measured on
# emoji-dit: `proj_out_2` alone at 4 bits costs 6 % of denoiser error, with 0.05 % of the weights.
DEFAULT_KEEP = ("conv_in", "conv_out", "pos_embed.proj", "x_embedder", "proj_out", "proj_out_2")

_EIGHT_BIT = WeightSpec(bits=8, group_size=-1, granularity="channel")

# Embeddings of the timestep that all blocks share. Those that a DiT repeats in every block are 8 % of its weights, and
# at 4 bits make 1 % of its squared error: they are as the other layers.
_TIME_EMBEDDINGS = ("*time_embedding*", "adaln_single*", "time_text_embed*", "time_embed*")
# What the residual stream passes through, and the values of attention. With each kind of layer alone at 4 bits, these
# make half of the squared denoiser error of emoji-sd with a sixth of its weights, and a fifth of emoji-dit's with a
# twelfth.
_SENSITIVE = (
    "*attentions.*.proj_in",
    "*attentions.*.proj_out",
    "*.conv_shortcut",
    "*samplers.*.conv",
    "*.to_v",
    "*.to_out.0",
    "proj_out_1",
)
# What a low-rank branch takes from these does not show in the denoiser's output (measured on emoji-dit).
_WITHOUT_BRANCH = ("*.norm1.linear", "transformer_blocks.*timestep_embedder*")

DEFAULT_OVERRIDES = (
    *(LayerOverride(pattern, weight=_EIGHT_BIT, transforms=()) for pattern in (*_TIME_EMBEDDINGS, *_SENSITIVE)),
    *(LayerOverride(pattern, transforms=()) for pattern in _WITHOUT_BRANCH),
)

_W4A8 = Recipe(
    name="w4a8",
    transforms=(MethodSpec.of("smoothing"), MethodSpec.of("low_rank", budget=0.05, min_gain=0.1)),
    rounding=MethodSpec.of("nearest"),
    linear_range=MethodSpec.of("dynamic"),
    conv_range=MethodSpec.of("temporal"),
    keep=DEFAULT_KEEP,
    overrides=DEFAULT_OVERRIDES,
)

PRESETS: Mapping[str, Recipe] = {
    "w4a8": _W4A8,
    "w4a8-static": _W4A8.replace(name="w4a8-static", conv_range=MethodSpec.of("static")),
    "w4a16": _W4A8.replace(name="w4a16", activation_bits=16),
    "w8a8": _W4A8.replace(
        name="w8a8", weight=_EIGHT_BIT, transforms=(MethodSpec.of("smoothing", alpha=0.5),), overrides=()
    ),
    "naive-w4a8": _W4A8.replace(
        name="naive-w4a8",
        weight=WeightSpec(bits=4, group_size=64, granularity="tensor"),
        transforms=(),
        rounding=MethodSpec.of("nearest", search=False),
        linear_range=MethodSpec.of("static", estimator="minmax"),
        conv_range=MethodSpec.of("static", estimator="minmax"),
        overrides=tuple(LayerOverride(pattern, weight=_EIGHT_BIT) for pattern in _TIME_EMBEDDINGS),
        split_skips=False,
    ),
}
