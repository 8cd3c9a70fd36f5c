"""One layer from float to integers: transforms, then rounding, then the activation range."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from qdiff.calibration import LayerStatistics, Statistics
from qdiff.layers import QuantizedWeights, low_rank_dtype
from qdiff.methods.contract import RoundedWeight, Transform
from qdiff.methods.registry import methods_of
from qdiff.methods.state import LayerState
from qdiff.numerics.gemm_layout import to_gemm
from qdiff.recipe import LayerPlan


@dataclass(frozen=True)
class Draft:
    """A layer whose codes are chosen, while other codes on the same grid may still turn out to be better.

    state: as it is after the transforms.  act_scales: float32 [T, S], or None.
    """

    state: LayerState
    transforms: Sequence[Transform]
    rounded: RoundedWeight
    act_scales: Float[Tensor, "rows segments"] | None

    def finished(self, codes: Int8[Tensor, "N K"] | None = None) -> QuantizedWeights:
        """The integer form with these codes, or with those chosen; the draft is not changed."""
        rounded = self.rounded if codes is None else dataclasses.replace(self.rounded, codes=codes)
        state = dataclasses.replace(self.state)
        for transform in self.transforms:
            transform.finish(state, rounded)
        return QuantizedWeights(
            codes_q=rounded.codes,
            multipliers=rounded.multipliers,
            codebook=rounded.codebook,
            scale=rounded.scale,
            shift=state.shift,
            index=state.index,
            smooth=state.smooth,
            rotation=state.rotation,
            bias_change=state.bias_change,
            low_rank=state.low_rank,
            first_token=state.first_token,
            act_scales=self.act_scales,
        )


def quantize_layer(
    plan: LayerPlan, layer: nn.Module, statistics: Statistics | LayerStatistics | None = None
) -> QuantizedWeights:
    """The integer form of a linear, convolution or embedding layer, as its plan says; the layer is not changed.

    layer: its weight is [N, K], [N, C, kh, kw] or (embedding) [rows, width], of any float dtype.
    Raises `ValueError` for a plan that does not fit the layer, or that needs statistics which are not there.
    """
    with torch.no_grad():
        return draft_layer(plan, layer, statistics).finished()


@torch.no_grad()
def draft_layer(plan: LayerPlan, layer: nn.Module, statistics: Statistics | LayerStatistics | None = None) -> Draft:
    """The same, and raises the same, but for what the final codes decide."""
    if isinstance(statistics, Statistics):
        statistics = statistics.layers.get(plan.name)
    state = prepare(plan, layer, statistics)
    transforms, _, _ = methods_of(plan)
    for transform in transforms:
        transform.apply(state)
    rounded = state.rounding.round(state)
    scales = None if state.range is None else state.range.scales(state)
    if scales is not None and rounded.step_ratio is not None:
        scales = scales * rounded.step_ratio
    return Draft(state, transforms, rounded, scales)


def prepare(plan: LayerPlan, layer: nn.Module, statistics: LayerStatistics | None) -> LayerState:
    """A fresh work sheet of a layer."""
    _, rounding, range_ = methods_of(plan)
    needed = {"static", "temporal"} & {plan.range_mode}
    if needed and statistics is None:
        raise ValueError(
            f"{plan.name}: a {plan.range_mode} activation range needs calibration, and the layer did not run in it; "
            "keep the layer, or give it a dynamic range"
        )
    weight = layer.weight
    if not isinstance(weight, Tensor) or weight.ndim not in (2, 4) or weight.shape[1] != sum(plan.segments):
        shape = tuple(getattr(weight, "shape", ()))
        raise ValueError(f"{plan.name}: segments {list(plan.segments)} must add up to the weight's axis 1: got {shape}")
    return LayerState(
        plan=plan,
        weight=to_gemm(weight.detach().float(), plan.segments),
        taps=weight[0, 0].numel(),
        padded=any(getattr(layer, "padding", ())),
        rounding=rounding,
        range=range_,
        statistics=statistics,
        branch_dtype=low_rank_dtype(weight.dtype),
    )
