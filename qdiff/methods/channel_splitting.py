"""Outlier channel splitting: a channel that stretches the grid becomes two half as large."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qdiff.methods.contract import RoundedWeight, Transform
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState
from qdiff.recipe import check_choice

SPLIT = ("weights", "activations")
# What kernels read at once of 8-bit weights.
BLOCK = 32


@register("channel_splitting")
@dataclass(frozen=True)
class ChannelSplitting(Transform):
    """W x = ((W - d/2) / 2) x + ((W + d/2) / 2) x for the channels with the largest weights, d the step of the grid.

    OCS (arXiv 1901.09504), its quantization-aware splitting: round((u - 1/2) / 2) + round((u + 1/2) / 2) = round(u), so
    that a split channel is rounded no worse than the whole one. As there, channels are split one after the other,
    always the one that is largest after what was split before; one that is split again here becomes p equal parts, (W +
    (i - (p - 1) / 2) d) / p for i = 0 .. p - 1, to which the same identity applies. The paper changes the layer before,
    to make the channel twice; here the layer gathers its input by an index. Copies lie beside their channel and mostly
    in its group, whose step d is taken from a trial rounding of the plain parts.

    The new width has to suit the format: it is rounded up to whole groups, all of which are split channels. Layers of
    two segments are left alone.

    ratio: of the channels that are added, at least; 0.01 to 0.05 in the paper.
    split: "weights" halves the weight; "activations" halves the channel with the largest activations instead, and keeps
           the weight of both copies.
    """

    step: ClassVar[str] = "index"
    ratio: float = 0.02
    split: str = "weights"

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not 0 < self.ratio <= 1:
            raise ValueError(f"channel_splitting.ratio must be in (0, 1]: got {self.ratio!r}")
        check_choice("channel_splitting.split", self.split, SPLIT)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmax"} if self.split == "activations" else ())

    def apply(self, state: LayerState) -> None:
        if len(state.segments) > 1 or (self.split == "activations" and state.statistics is None):
            return
        parts = split_counts(self._sizes(state), self._added(state))
        index = torch.arange(len(parts), device=parts.device).repeat_interleave(parts)
        share = 1 / parts[index].float()
        smooth = None if state.smooth is None else state.smooth[index]
        copies = state.weight.unflatten(1, (state.taps, -1))[..., index]
        if self.split == "activations":
            state.weight, state.index = copies.flatten(1), index
            state.smooth = share if smooth is None else smooth * share
            return
        plain = state.with_weight((copies * share).flatten(1), index=index, smooth=smooth)
        # A row of zeros has a step of one, which stands for none.
        steps = _steps(state.rounding.preview(plain)) * state.weight.any(1, keepdim=True)
        offset = (_rank_in_channel(index) - (parts[index] - 1) / 2) * share
        # The copies of a channel must share a step, or their sum is not the channel.
        steps = steps.unflatten(1, (state.taps, -1))
        whole = torch.zeros_like(steps[..., : len(parts)]).index_add_(2, index, steps * share)
        state.weight = plain.weight + (whole[..., index] * offset).flatten(1)
        state.index, state.smooth = index, smooth

    def _added(self, state: LayerState) -> int:
        """Channels to add: the ratio, up to the next whole group or, of 8-bit weights, block."""
        channels, plan = state.channels, state.plan
        unit = plan.group_size if plan.stored_bits == 4 else math.gcd(BLOCK, channels)
        return -(-(channels + math.ceil(self.ratio * channels)) // unit) * unit - channels

    def _sizes(self, state: LayerState) -> Float[Tensor, " C"]:
        """What of each channel stretches a grid: the largest weight in proportion to its row's, or activation."""
        if self.split == "activations" and state.statistics is not None:
            absmax = state.statistics.channel_absmax.amax(0)
            return absmax if state.smooth is None else absmax * state.smooth
        weight = state.weight.abs()
        if state.plan.granularity != "tensor":
            # Rows have scales of their own: the channel that is an outlier of most of them.
            return (
                state.per_channel((weight / weight.mean(1, keepdim=True).clamp_min(1e-30)).pow(4).mean(0)).mean(1)
                ** 0.25
            )
        return state.per_channel(weight.amax(0)).amax(1)


def split_counts(sizes: Float[Tensor, " C"], added: int) -> Int64[Tensor, " C"]:
    """Parts of each channel after `added` splits, each of the channel whose parts are largest."""
    parts = torch.ones_like(sizes, dtype=torch.int64)
    for _ in range(added):
        parts[(sizes / parts).argmax()] += 1
    return parts


def _rank_in_channel(index: Int64[Tensor, " C'"]) -> Float[Tensor, " C'"]:
    """0, 1, ... among the copies of each channel; copies are neighbours."""
    place = torch.arange(len(index), device=index.device)
    first = torch.searchsorted(index, index)
    return (place - first).float()


def _steps(rounded: RoundedWeight) -> Float[Tensor, "N K"]:
    """The distance of neighbouring levels; zero for a codebook, which has many."""
    n, k = rounded.codes.shape
    if rounded.codebook is not None:
        return rounded.scale.new_zeros(n, k)
    if rounded.multipliers is None:
        return rounded.scale[:, None].expand(n, k)
    groups = rounded.multipliers.shape[1]
    return (rounded.multipliers * rounded.scale[:, None]).repeat_interleave(k // groups, 1)
