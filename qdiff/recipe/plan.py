"""What is decided about one layer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qdiff.recipe.specs import (
    ACTIVATION_BITS,
    GRANULARITIES,
    WEIGHT_BITS,
    MethodSpec,
    check_choice,
    check_fields,
    methods_from,
    plain_fields,
)

RANGE_MODES = ("dynamic", "static", "temporal", "none")
LAYER_KINDS = ("linear", "conv2d", "embedding")


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Everything decided about one layer before its numbers are looked at.

    segments:    channel counts with an activation scale each; their sum is the layer's input channels.
    group_size:  weights that share a multiplier (up to 4 bits: divides every segment); -1 for weights stored in a byte.
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
        if self.stored_bits == 4 and (size < 2 or size % 2 or any(channels % size for channels in self.segments)):
            raise ValueError(group_size_error(self.name, self.group_size, self.segments))
        if self.kind == "conv2d" and self.range_mode == "dynamic":
            raise ValueError(f"{self.name}: a convolution has no per-token range: use 'static' or 'temporal'")

    @property
    def stored_bits(self) -> int:
        """Bits that a weight's code takes up: 4, or 8 for 5 to 8."""
        return 4 if self.weight_bits <= 4 else 8

    @property
    def activation_levels(self) -> int:
        """The largest activation code, 127 for 8 bits. Not of interest where activations are 16-bit."""
        return 2 ** (min(self.activation_bits, 8) - 1) - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return plain_fields(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerPlan:
        check_fields("layer plan", data, [field.name for field in dataclasses.fields(cls)])
        return cls(**methods_from(data))

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> LayerPlan:
        return cls.from_dict(json.loads(text))


def group_size_error(layer: str, group_size: int, segments: Sequence[int]) -> str:
    """The sentence for a group size that does not fit a layer, with the sizes that would."""
    common = math.gcd(*segments)
    fitting = [size for size in (128, 64, 48, 32, 24, 16, 8, 4, 2) if common % size == 0]
    advice = f"use group_size={fitting[0]}" if fitting else "keep the layer, or give it 8-bit weights"
    came = f"got group_size={group_size}, channels={list(segments)}"
    return f"{layer}: group_size must be even and divide its input channels: {came}; {advice}"
