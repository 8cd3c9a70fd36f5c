"""A linear layer with quantized weights and, by its plan, quantized activations."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qdiff.layers.quantized_weights import NO_SIZES, LayerSizes, QuantizedWeights
from qdiff.layers.weight_buffers import WeightBuffers
from qdiff.numerics.first_token import same_token
from qdiff.numerics.ranges import LEVELS
from qdiff.ops import (
    dynamic_linear,
    low_rank_down,
    quantize_per_sample,
    quantize_per_token,
    w4a8_linear,
    w4a16_linear,
    w8a8_linear,
)
from qdiff.ops.activation import activate, activated_width

if TYPE_CHECKING:
    from qdiff.recipe import LayerPlan


# Of so few rows (embeddings of time and text, modulations) reading the weights is all the work. 4-bit weights save
# that; 8-bit activations would save nothing, so these stay as they are, on every device.
FEW_ROWS = 16


class QuantLinear(WeightBuffers, nn.Linear):
    """`nn.Linear` on quantized numbers: with x_s = x * smooth, y = Q(x_s) @ Q(R).T + (x_s @ down.T) @ up.T + bias,
    where R = W / smooth - up @ down (SVDQuant, arXiv 2411.05007).

    The output has the input's dtype. Its buffers are listed in `WeightBuffers`.

    Attributes:
        takes_quantized: whether there is `forward_quantized`: activations have 8 bits and a scale a token, and nothing
            is done to them before.
    """

    def __init__(self, layer: nn.Linear, plan: LayerPlan, sizes: LayerSizes) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would make float parameters
        self.in_features, self.out_features = layer.in_features, layer.out_features
        if plan.segments != (layer.in_features,):
            raise ValueError(
                f"{plan.name}: segments {plan.segments}, expected one of {layer.in_features} for a linear layer"
            )
        self._register(layer.out_features, 1, plan, layer, sizes)
        # What follows from the plan, found once: where layers are small, the host's time is what a call takes.
        self._four_bit = plan.stored_bits == 4
        self._dynamic = plan.range_mode == "dynamic"
        self._quantizes_tokens = self._dynamic and self._levels == LEVELS and self._only_smooths
        self.takes_quantized = self._quantizes_tokens and not (sizes.has_smooth or sizes.rank or sizes.has_first_token)
        few = FEW_ROWS * layer.in_features if self._dynamic and self._four_bit else -1
        self._most_float = sys.maxsize if plan.range_mode == "none" else few  # values of an input that stays float

    @classmethod
    def empty(cls, layer: nn.Linear, plan: LayerPlan, sizes: LayerSizes = NO_SIZES) -> QuantLinear:
        """Every buffer at its final shape and dtype, uninitialized, to load a `state_dict` into.

        On the float layer's device, which may be "meta".

        Args:
            layer: the float layer, for its sizes, bias, dtype and device.
            plan: what is decided about it.
            sizes: of the buffers that the plan leaves open.
        """
        return cls(layer, plan, sizes)

    @classmethod
    @torch.no_grad()
    def from_float(cls, layer: nn.Linear, plan: LayerPlan, weights: QuantizedWeights) -> QuantLinear:
        """The layer with these numbers; the float layer is not changed."""
        quantized = cls.empty(layer, plan, LayerSizes.of_weights(weights, layer.bias))
        quantized._fill(weights, layer.bias)
        return quantized.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self._product(x)
        first, product = self._buffers["first_input"], self._buffers["first_output"]
        if first is not None and product is not None and x.dim() == 3 and x.shape[1]:
            known = same_token(x[:, 0], first)[:, None]
            y[:, 0] = torch.where(known, product.to(y.dtype), y[:, 0])
        return y

    def forward_activated(self, x: Tensor, activation: str, residual: Tensor | None = None) -> Tensor:
        """self(activate(x, activation)) + residual, where it can be without a pass for each and with one rounding.

        There is no gradient.

        Args:
            x: [..., K], or [..., 2 K] for "geglu".
            activation: one of `qdiff.ops.activation.ACTIVATIONS`.
            residual: of x's dtype [..., N], or None.
        """
        own = self._buffers
        few = x.numel() // x.shape[-1] * activated_width(x, activation) <= self._most_float
        if few or not self._quantizes_tokens or own["first_input"] is not None:
            y = self(activate(x, activation))
            return y if residual is None else y + residual
        weights = own["codes"], own["multipliers"], own["codebook"], own["scale"], self.storage_block
        added = own["bias"], own["up"], x.dtype, activation, residual
        return dynamic_linear(x, own["smooth"], own["down"], *weights, *added)

    def takes_codes_of(self, x: Tensor) -> bool:
        """Whether self(x) is `forward_quantized` of what `quantize_per_token` makes of x."""
        return self.takes_quantized and x.numel() > self._most_float

    def forward_quantized(
        self, codes: Tensor, scale: Tensor, dtype: torch.dtype, residual: Tensor | None = None
    ) -> Tensor:
        """self of the input that these codes stand for, plus residual; only with `takes_quantized`.

        Args:
            codes, scale: what `quantize_per_token` makes: int8 [..., K], float32 [...].
            dtype: of the result.
            residual: of this dtype [..., N], or None.
        """
        return self._multiply(codes, scale, None, residual, dtype)

    def _multiply(
        self, codes: Tensor, scale: Tensor, low: Tensor | None, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        own = self._buffers
        added = own["bias"], low, own["up"], residual, dtype
        if not self._four_bit:
            return w8a8_linear(codes, scale, own["codes"], own["scale"], *added)
        weights = own["codes"], own["multipliers"], own["codebook"], own["scale"], self.storage_block
        return w4a8_linear(codes, scale, *weights, *added)

    def _product(self, x: Tensor) -> Tensor:
        own, dtype, block = self._buffers, x.dtype, self.storage_block
        weights = own["codes"], own["multipliers"], own["codebook"], own["scale"]
        if x.numel() <= self._most_float:
            inputs, smooth = self._transformed(x, -1)
            inputs = inputs if inputs.dtype == dtype else inputs.to(dtype)
            return w4a16_linear(inputs, smooth, *weights, block, own["bias"], own["down"], own["up"])
        if self._dynamic and self._levels == LEVELS:
            inputs, smooth = self._transformed(x, -1)
            return dynamic_linear(inputs, smooth, own["down"], *weights, block, own["bias"], own["up"], dtype)
        codes, scale, low = self._quantize(x)
        return self._multiply(codes, scale, low, None, dtype)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The codes, their scales, and what the branch reads if there is one."""
        dtype, down = x.dtype, self._buffers["down"]
        x, smooth = self._transformed(x, -1)
        if self._dynamic:
            codes, scale, low = quantize_per_token(x, smooth, down, self._levels)
            return codes, scale, None if down is None else low.to(dtype)
        branch = None if down is None else low_rank_down(x.to(dtype), smooth, down)
        batched = x if x.dim() > 1 else x[None]
        scale = self._input_scales(batched.shape[0])
        codes = quantize_per_sample(batched, scale, smooth, self.segments, -1, self._levels)
        return codes if x.dim() > 1 else codes[0], scale.flatten(), branch

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float weight [out_features, in_features] applied to the raw input, made anew on each access."""
        return self._float_matrix(1).to(self.compute_dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
            + self._describe()
        )
