"""An embedding table with quantized rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qdiff.layers.quantized_weights import NO_SIZES, LayerSizes, QuantizedWeights
from qdiff.layers.weight_buffers import WeightBuffers
from qdiff.ops.w4a16_linear import float_weight

if TYPE_CHECKING:
    from qdiff.recipe import LayerPlan


class QuantEmbedding(WeightBuffers, nn.Embedding):
    """`nn.Embedding` with quantized rows; only the rows that are looked up are unpacked.

    The output has the dtype of the float table. Its buffers are listed in `WeightBuffers`: N embeddings of width K.
    """

    def __init__(self, layer: nn.Embedding, plan: LayerPlan, sizes: LayerSizes) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's: it would make a float table
        if layer.max_norm is not None or plan.segments != (layer.embedding_dim,) or plan.range_mode != "none":
            raise ValueError(
                f"{plan.name}: got max_norm={layer.max_norm}, segments={plan.segments}, "
                f"range_mode={plan.range_mode!r}, expected None, ({layer.embedding_dim},) and 'none'; keep this layer"
            )
        for name in (
            "num_embeddings",
            "embedding_dim",
            "padding_idx",
            "max_norm",
            "norm_type",
            "scale_grad_by_freq",
            "sparse",
        ):
            setattr(self, name, getattr(layer, name))
        if sizes != LayerSizes(has_codebook=sizes.has_codebook, has_bias=sizes.has_bias) or sizes.has_bias:
            raise ValueError(f"{plan.name}: got {sizes}, expected nothing but a codebook for an embedding")
        self._register(layer.num_embeddings, 1, plan, layer, sizes)

    @classmethod
    def empty(cls, layer: nn.Embedding, plan: LayerPlan, sizes: LayerSizes = NO_SIZES) -> QuantEmbedding:
        """Every buffer at its final shape and dtype, uninitialized, to load a `state_dict` into.

        On the float table's device, which may be "meta".

        Args:
            layer: the float table, for its sizes, dtype and device.
            plan: what is decided about it.
            sizes: all as they are by default but for the codebook: a table has no activations.
        """
        return cls(layer, plan, sizes)

    @classmethod
    @torch.no_grad()
    def from_float(cls, layer: nn.Embedding, plan: LayerPlan, weights: QuantizedWeights) -> QuantEmbedding:
        """The table with these numbers; the float table is not changed."""
        quantized = cls.empty(layer, plan, LayerSizes.of_weights(weights, None))
        quantized._fill(weights, None)
        return quantized.train(layer.training)

    def forward(self, ids: Tensor) -> Tensor:
        chosen = ids.flatten()
        return self._rows(chosen).view(*ids.shape, self.embedding_dim)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float table [num_embeddings, embedding_dim], made anew on each access."""
        return self._rows(slice(None))

    def _rows(self, chosen: Tensor | slice) -> Tensor:
        multipliers, codebook = (None if t is None else t[chosen] for t in (self.multipliers, self.codebook))
        packed = (self.codes[chosen], multipliers, codebook, self.scale[chosen], self.storage_block)
        rows = float_weight(None, *packed, None, None)
        return rows.to(self.compute_dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}" + self._describe()
