"""The four roles of a quantization method. A method is a frozen dataclass in one of them; its fields are its options.

    transforms* -> rounding -> activation range -> (tuner?)

A method reads and writes the `LayerState` it is given and nothing else: no module is touched, no op is called. What it
leaves there ends up as plain tensors in plain buffers.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

if TYPE_CHECKING:
    from qdiff.methods.state import LayerState
    from qdiff.recipe import LayerPlan


@dataclass(frozen=True)
class RoundedWeight:
    """w ~ scale[n] * multipliers[n, k // g] * codes[n, k]; multipliers None: all one, and one byte a code.

    With a codebook: w ~ scale[n] * codebook[n, codes[n, k]], no multipliers, and four bits a code.

    codes: int8 [N, K] in [-8, 7] (4 bits), [-127, 127], or [0, 15] with a codebook.  multipliers: uint8 [N, K/g] in
    [1, 15].  scale: f32 [N].  codebook: int8 [N, 16].  step_ratio: f32 [S], what the steps of a measured activation
    range are to be multiplied by, each channel segment's, where the rounding has fitted them together with the weight.
    """

    codes: Int8[Tensor, "N K"]
    multipliers: UInt8[Tensor, "N G"] | None
    scale: Float[Tensor, " N"]
    codebook: Int8[Tensor, "N 16"] | None = None
    step_ratio: Float[Tensor, " S"] | None = None

    def dequantize(self) -> Float[Tensor, "N K"]:
        """The float32 weight that the codes stand for."""
        if self.codebook is not None:
            return self.codebook.gather(1, self.codes.long()) * self.scale[:, None]
        values = self.codes.float()
        if self.multipliers is not None:
            groups = self.multipliers.shape[1]
            values = (values.unflatten(1, (groups, -1)) * self.multipliers[..., None]).flatten(1)
        return values * self.scale[:, None]

    def steps(self) -> Float[Tensor, "N K"]:
        """What each weight changes by where its code does by one; without a codebook."""
        return dataclasses.replace(self, codes=torch.ones_like(self.codes)).dequantize()


@dataclass(frozen=True)
class Method(ABC):  # noqa: B024  # every role adds its own abstract method
    """What every role shares."""

    @property
    def needs(self) -> frozenset[str]:
        """What calibration must collect for it, given its options: of `qdiff.calibration.NEEDS`."""
        return frozenset()

    def check(self, plan: LayerPlan) -> None:  # noqa: B027  # most methods suit every plan
        """Raise `ValueError` for a plan that the method cannot serve; asked before anything is calibrated."""


# What a transform can change, in the order in which the layer meets it.
STEPS = ("first_token", "shift", "index", "smooth", "rotation", "low_rank", "weight", "bias")


@dataclass(frozen=True)
class Transform(Method):
    """Rewrites the float weight, with an exact inverse on the other side.

    Law: before rounding, the layer's output is what it was.
    step: what of a layer it changes, of `STEPS`; what can follow what is in `qdiff.methods.registry`.
    """

    step: ClassVar[str] = ""

    @abstractmethod
    def apply(self, state: LayerState) -> None:
        """Change `state.weight` together with the state's input pipeline, `low_rank` or `bias_change`.

        A transform that chooses for itself must not make the output error on the samples worse.
        """

    def finish(self, state: LayerState, rounded: RoundedWeight) -> None:
        """What is left to do once the final codes are known, such as to correct the bias."""


@dataclass(frozen=True)
class Rounding(Method):
    """Chooses the codes and scales of `state.weight`, on the grid that `state.plan` names.

    It may use all of the state: GPTQ takes its Hessian from `state.inputs()`, learned roundings their targets. Where it
    fits the steps of a measured activation range too, it says by what to multiply them.
    """

    @abstractmethod
    def round(self, state: LayerState) -> RoundedWeight:
        """The final codes."""

    @property
    def block_steps(self) -> int:
        """Steps in which the codes of all layers of a block are learned together, from those chosen layer by layer.

        More than 0: the layer's needs name "carried". Every weight then goes up or down, on the grid that it has.
        """
        return 0

    def preview(self, state: LayerState) -> RoundedWeight:
        """What transforms try candidates with, often: a costly rounding overrides this with a cheap stand-in."""
        return self.round(state)


@dataclass(frozen=True)
class ActivationRange(Method):
    """Gives the step sizes of the int8 activations, of the *smoothed* input.

    mode: what the layer does with them, one of `qdiff.recipe.RANGE_MODES`. A learned table over time is "temporal".
    """

    mode: ClassVar[str]

    @property
    def least_timesteps(self) -> int:
        """Calibrated timesteps below which it is not what its options say."""
        return 1

    @abstractmethod
    def scales(self, state: LayerState) -> Float[Tensor, "rows segments"] | None:
        """float32 [T, S] (temporal), [1, S] (static) or None (dynamic); positive, finite: x ~ scale * code."""

    def preview(self, state: LayerState) -> Float[Tensor, "rows segments"] | None:
        """What transforms and roundings try candidates with, often: a costly range overrides this with a stand-in."""
        return self.scales(state)


@dataclass(frozen=True)
class Probabilities(Method):
    """Rounds what attention's softmax gives, at every call: a property of the denoiser and not of a layer."""

    @abstractmethod
    def quantize(self, probabilities: Tensor) -> Tensor:
        """Float [..., queries, keys] in [0, 1] to what the codes stand for, in the same dtype."""


@dataclass(frozen=True)
class Tuner(Method):
    """Trains what is trainable of a denoiser whose layers are quantized already (scales, branches, tables)."""

    @abstractmethod
    def tune(self, denoiser: Any, reference: Any, batches: Any) -> None:
        """Improve `denoiser` in place towards `reference`, on recorded batches of its inputs."""
