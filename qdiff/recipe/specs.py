"""The parts of a recipe: methods by name, the grid of a weight, what is different for some layers."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8)
ACTIVATION_BITS = (4, 5, 6, 7, 8, 16)
GRANULARITIES = ("group", "channel", "tensor")

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
        check_fields("method", data, ("name", "options"))
        return cls(data["name"], Options(data.get("options")))


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """The grid of a weight: bits, weights per group (-1: a segment's channels of one tap), and what shares a scale.

    Up to 4 bits are stored in four, with a multiplier a group; 5 to 8 in a byte, with one scale a channel or tensor.
    """

    bits: int = 4
    group_size: int = 32
    granularity: str = "group"

    def __post_init__(self) -> None:
        check_choice("weight.bits", self.bits, WEIGHT_BITS)
        check_choice("weight.granularity", self.granularity, GRANULARITIES)
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and (size < 2 or size % 2)):
            raise ValueError(f"weight.group_size must be -1 or a positive even number: got {size!r}")
        if self.bits > 4 and self.granularity == "group":
            raise ValueError(
                f"weight.granularity 'group' needs weights of at most 4 bits: got bits={self.bits}; "
                "use 'channel' or 'tensor'"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightSpec:
        check_fields("weight", data, ("bits", "group_size", "granularity"))
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
        return {"pattern": self.pattern} | {k: v for k, v in plain_fields(self).items() if v is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerOverride:
        check_fields("override", data, [field.name for field in dataclasses.fields(cls)])
        return cls(**methods_from(data))


def check_fields(owner: str, data: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `ValueError` for a key of `data` that is not known; `owner` names what it is a field of."""
    known = list(known)
    for key in data:
        if key not in known:
            raise ValueError(f"unknown field {key!r} of a {owner}: {nearest_names(key, known)}")


def plain_fields(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain JSON values."""
    return {field.name: _plain(getattr(instance, field.name)) for field in dataclasses.fields(instance)}


def _plain(value: Any) -> Any:
    if isinstance(value, MethodSpec):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def methods_from(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values back to the dataclasses of the fields that recipes, overrides and plans share."""
    fields = dict(data)
    for key in ("rounding", "range", "linear_range", "conv_range", "probabilities"):
        if fields.get(key) is not None:
            fields[key] = MethodSpec.from_dict(fields[key])
    if fields.get("transforms") is not None:
        fields["transforms"] = tuple(MethodSpec.from_dict(item) for item in fields["transforms"])
    if fields.get("weight") is not None:
        fields["weight"] = WeightSpec.from_dict(fields["weight"])
    return fields
