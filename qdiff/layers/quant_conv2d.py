"""A convolution with quantized weights and, by its plan, quantized activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdiff.layers.norm_vectors import norm_vectors
from qdiff.layers.quantized_weights import NO_SIZES, LayerSizes, QuantizedWeights
from qdiff.layers.weight_buffers import WeightBuffers
from qdiff.numerics.gemm_layout import from_gemm
from qdiff.numerics.ranges import LEVELS
from qdiff.ops import quantize_group_norm, quantize_per_sample, w4a8_conv2d, w4a16_conv2d, w8a8_conv2d

if TYPE_CHECKING:
    from qdiff.recipe import LayerPlan


class QuantConv2d(WeightBuffers, nn.Conv2d):
    """`nn.Conv2d` on quantized numbers, with one activation scale a sample and channel segment.

    The output has the input's dtype and channels-last order. Its buffers are listed in `WeightBuffers`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # peft makes the convolutions of a LoRA branch as type(base_layer)(in_channels, rank, ...),
        # and means float ones.
        return nn.Conv2d(*args, **kwargs) if args and isinstance(args[0], int) else super().__new__(cls)

    def __init__(self, layer: nn.Conv2d, plan: LayerPlan, sizes: LayerSizes) -> None:
        nn.Module.__init__(self)  # not nn.Conv2d's: it would make float parameters
        _check(layer, plan, sizes)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(layer, name))
        for name in ("transposed", "output_padding", "padding_mode", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(layer, name))
        taps = self.kernel_size[0] * self.kernel_size[1]
        self._register(layer.out_channels, taps, plan, layer, sizes)

    @classmethod
    def empty(cls, layer: nn.Conv2d, plan: LayerPlan, sizes: LayerSizes = NO_SIZES) -> QuantConv2d:
        """Every buffer at its final shape and dtype, uninitialized, to load a `state_dict` into.

        On the float layer's device, which may be "meta".

        Args:
            layer: the float layer, for its sizes, bias, dtype and device.
            plan: what is decided about it.
            sizes: of the buffers that the plan leaves open; rank 0, as convolutions have no low-rank branch.
        """
        return cls(layer, plan, sizes)

    @classmethod
    @torch.no_grad()
    def from_float(cls, layer: nn.Conv2d, plan: LayerPlan, weights: QuantizedWeights) -> QuantConv2d:
        """The layer with these numbers; the float layer is not changed."""
        quantized = cls.empty(layer, plan, LayerSizes.of_weights(weights, layer.bias))
        quantized._fill(weights, layer.bias)
        return quantized.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:  # nn.Conv2d takes one image without a batch
            return self.forward(x[None])[0]
        inputs, smooth = self._transformed(x, 1)
        if self.plan.range_mode == "none":
            weights, geometry = self._weights_and_geometry()
            return w4a16_conv2d(inputs.to(x.dtype), smooth, *weights, self._buffers["bias"], *geometry)
        scale = self._input_scales(x.shape[0])
        codes = quantize_per_sample(inputs, scale, smooth, self.segments, 1, self._levels)
        return self._product(codes, scale, x.dtype)

    @property
    def takes_normalized(self) -> bool:
        """Whether there is `forward_normalized`: of 8-bit activations that are only smoothed before."""
        return self._only_smooths and self._levels == LEVELS and self.plan.range_mode != "none"

    def forward_normalized(
        self, x: Tensor, norm: nn.GroupNorm, *, shift: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """self(silu(norm(x))) + shift + residual, without a pass for each and with one rounding at the end.

        There is no gradient.

        Args:
            x: [B, C, H, W] of the norm's dtype.
            norm: its forward is not called.
            shift: float [B, N], added to every pixel, or None.
            residual: of x's dtype and the result's shape, or None.
        """
        scale = self._input_scales(x.shape[0])
        given = (x, norm.num_groups, *norm_vectors(norm), norm.eps, True)
        codes = quantize_group_norm(*given, scale, self._buffers["smooth"], self.segments)
        return self._product(codes, scale, x.dtype, shift, residual)

    def _product(
        self,
        codes: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        weights, geometry = self._weights_and_geometry()
        rest = (self._buffers["bias"], shift, residual, *geometry, dtype)
        if self.plan.stored_bits == 8:
            return w8a8_conv2d(codes, scale, self._buffers["codes"], self._buffers["scale"], *rest)
        return w4a8_conv2d(codes, scale, *weights, *rest)

    def _weights_and_geometry(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The operators' arguments."""
        own = self._buffers
        weights = (own["codes"], own["multipliers"], own["codebook"], own["scale"], self.storage_block)
        return weights, (self.kernel_size, self.stride, self.padding, self.segments)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float weight [N, C, kh, kw] that this layer applies to the raw input, made anew on each access."""
        plan, kernel = self.plan, (self.kernel_size[0], self.kernel_size[1])
        matrix = self._float_matrix(kernel[0] * kernel[1])
        return from_gemm(matrix, plan.segments, kernel).to(self.compute_dtype)

    def extra_repr(self) -> str:
        return nn.Conv2d.extra_repr(self) + self._describe()


def _check(layer: nn.Conv2d, plan: LayerPlan, sizes: LayerSizes) -> None:
    plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    if not plain or isinstance(layer.padding, str) or layer.transposed:
        raise ValueError(
            f"{plan.name}: got groups={layer.groups}, dilation={layer.dilation}, padding={layer.padding!r} "
            f"({layer.padding_mode}), expected groups 1, dilation 1 and zero padding given in numbers; keep this layer"
        )
    if sum(plan.segments) != layer.in_channels:
        raise ValueError(f"{plan.name}: segments {plan.segments}, expected a sum of {layer.in_channels} input channels")
    if plan.range_mode == "dynamic":
        raise ValueError(f"{plan.name}: range_mode 'dynamic' is for linear layers; use 'static', 'temporal' or 'none'")
    if sizes.rank or sizes.has_first_token:
        raise ValueError(
            f"{plan.name}: rank={sizes.rank}, has_first_token={sizes.has_first_token}, expected 0 and False: "
            "convolutions have no low-rank branch, and no tokens"
        )
    if sizes.has_shift and set(layer.padding) != {0}:
        raise ValueError(
            f"{plan.name}: a shift is given, expected None with padding {layer.padding}, whose zeros it would move"
        )
