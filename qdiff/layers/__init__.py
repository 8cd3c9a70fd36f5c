"""Quantized layers: drop-in `nn.Linear`, `nn.Conv2d` and `nn.Embedding` whose state is plain buffers."""

from qdiff.layers.open_layer import OpenLayer
from qdiff.layers.quant_conv2d import QuantConv2d
from qdiff.layers.quant_embedding import QuantEmbedding
from qdiff.layers.quant_linear import QuantLinear
from qdiff.layers.quantized_weights import LayerSizes, QuantizedWeights
from qdiff.layers.weight_buffers import low_rank_dtype, stored_bytes

__all__ = [
    "LayerSizes",
    "OpenLayer",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizedWeights",
    "low_rank_dtype",
    "stored_bytes",
]
