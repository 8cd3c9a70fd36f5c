"""The four roles of a quantization method. A method is a frozen dataclass in one of them; its fields are its options.

    transforms* -> rounding -> activation range -> (tuner?)

A method reads and writes the `LayerState` it is given and nothing else: no module is touched, no op is called. What it
leaves there ends up as plain tensors in plain buffers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float, Int8, UInt8
from torch import Tensor

if TYPE_CHECKING:
    from qdiff.methods.state import LayerState


@dataclass(frozen=True)
class RoundedWeight:
    """w ~ scale[n] * multipliers[n, k // g] * codes[n, k]; multipliers None: all one, and one byte a code.

    codes: int8 [N, K] in [-8, 7] (4 bits) or [-127, 127].  multipliers: uint8 [N, K/g] in [1, 15].  scale: f32 [N].
    """

    codes: Int8[Tensor, "N K"]
    multipliers: UInt8[Tensor, "N G"] | None
    scale: Float[Tensor, " N"]

    def dequantize(self) -> Float[Tensor, "N K"]:
        """The float32 weight that the codes stand for."""
        values = self.codes.float()
        if self.multipliers is not None:
            groups = self.multipliers.shape[1]
            values = (values.unflatten(1, (groups, -1)) * self.multipliers[..., None]).flatten(1)
        return values * self.scale[:, None]


@dataclass(frozen=True)
class Method(ABC):  # noqa: B024  # every role adds its own abstract method
    """What every role shares."""

    @property
    def needs(self) -> frozenset[str]:
        """What calibration must collect for it, given its options: of `qdiff.calibration.NEEDS`."""
        return frozenset()


@dataclass(frozen=True)
class Transform(Method):
    """Rewrites the float weight, with an exact inverse on the other side.

    Law: before rounding, the layer's output is what it was.
    """

    @abstractmethod
    def apply(self, state: LayerState) -> None:
        """Change `state.weight` together with `state.smooth` or `state.low_rank`.

        A transform that chooses for itself must not make the output error on the samples worse.
        """


@dataclass(frozen=True)
class Rounding(Method):
    """Chooses the codes and scales of `state.weight`, on the grid that `state.plan` names.

    It may use all of the state: GPTQ takes its Hessian from `state.inputs()`, learned roundings their targets.
    """

    @abstractmethod
    def round(self, state: LayerState) -> RoundedWeight:
        """The final codes."""

    def preview(self, state: LayerState) -> RoundedWeight:
        """What transforms try candidates with, often: a costly rounding overrides this with a cheap stand-in."""
        return self.round(state)


@dataclass(frozen=True)
class ActivationRange(Method):
    """Gives the step sizes of the int8 activations, of the *smoothed* input.

    mode: what the layer does with them, one of `qdiff.recipe.RANGE_MODES`. A learned table over time is "temporal".
    """

    mode: ClassVar[str]

    @abstractmethod
    def scales(self, state: LayerState) -> Float[Tensor, "rows segments"] | None:
        """float32 [T, S] (temporal), [1, S] (static) or None (dynamic); positive, finite: x ~ scale * code."""


@dataclass(frozen=True)
class Tuner(Method):
    """Trains what is trainable of a denoiser whose layers are quantized already (scales, branches, tables)."""

    @abstractmethod
    def tune(self, denoiser: Any, reference: Any, batches: Any) -> None:
        """Improve `denoiser` in place towards `reference`, on recorded batches of its inputs."""
