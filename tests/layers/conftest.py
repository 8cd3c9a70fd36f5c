from collections.abc import Callable, Iterator

import pytest
import torch

from qdiff.layers import QuantizedWeights
from qdiff.numerics.gemm_layout import channels_to_gemm, to_gemm
from qdiff.numerics.two_level import fit_channel, fit_two_level, round_two_level
from qdiff.recipe import LayerPlan, MethodSpec

GROUP = 8


@pytest.fixture
def make_plan() -> Callable[..., LayerPlan]:
    """Factory of plans; only what the layers read needs to be given."""

    def make(kind, segments, bits=4, mode="dynamic", group_size=GROUP):
        return LayerPlan(
            name="block.layer",
            kind=kind,
            weight_bits=bits,
            group_size=group_size if bits == 4 else -1,
            granularity="group" if bits == 4 else "channel",
            activation_bits=16 if mode == "none" else 8,
            range_mode=mode,
            range=MethodSpec("dynamic"),
            transforms=(),
            rounding=MethodSpec("nearest"),
            segments=segments,
        )

    return make


@pytest.fixture
def quantize() -> Callable[..., QuantizedWeights]:
    """Factory of a float weight's numbers, with everything optional as told."""

    def make(weight, plan, smooth=None, low_rank=None, act_scales=None):
        matrix = to_gemm(weight.detach().float(), plan.segments)
        if smooth is not None:
            matrix = matrix / channels_to_gemm(smooth, plan.segments, weight[0, 0].numel())
        if low_rank is not None:
            matrix = matrix - low_rank[1] @ low_rank[0]
        if plan.weight_bits == 8:
            fitted = fit_channel(matrix, 8)
            return QuantizedWeights(fitted.codes_q, None, fitted.scale, smooth, low_rank, act_scales)
        scale, multipliers = fit_two_level(matrix, plan.group_size)
        codes = round_two_level(matrix, scale, multipliers, plan.group_size)
        return QuantizedWeights(codes, multipliers, scale, smooth, low_rank, act_scales)

    return make


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """Layers and inputs are random, and the same in every run; nothing here trains."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield
