"""The operators, one file each: schema, checks, reference, fake. The reference defines the result.

On a CUDA device the kernels of `cuda/` run where they can; `set_backend` chooses otherwise.
"""

from qdiff.ops.backend import set_backend, use_backend
from qdiff.ops.dynamic_linear import dynamic_linear
from qdiff.ops.gptq_descent import gptq_descent
from qdiff.ops.gptq_feedback import gptq_feedback
from qdiff.ops.group_norm import group_norm
from qdiff.ops.low_rank_down import low_rank_down
from qdiff.ops.quantize_group_norm import quantize_group_norm
from qdiff.ops.quantize_layer_norm import quantize_layer_norm
from qdiff.ops.quantize_per_sample import quantize_per_sample
from qdiff.ops.quantize_per_token import quantize_per_token
from qdiff.ops.transform_input import transform_input
from qdiff.ops.w4a8_conv2d import w4a8_conv2d
from qdiff.ops.w4a8_linear import w4a8_linear
from qdiff.ops.w4a16_conv2d import w4a16_conv2d
from qdiff.ops.w4a16_linear import w4a16_linear
from qdiff.ops.w8a8_conv2d import w8a8_conv2d
from qdiff.ops.w8a8_linear import w8a8_linear

__all__ = [
    "dynamic_linear",
    "gptq_descent",
    "gptq_feedback",
    "group_norm",
    "low_rank_down",
    "quantize_group_norm",
    "quantize_layer_norm",
    "quantize_per_sample",
    "quantize_per_token",
    "set_backend",
    "transform_input",
    "use_backend",
    "w4a8_conv2d",
    "w4a8_linear",
    "w4a16_conv2d",
    "w4a16_linear",
    "w8a8_conv2d",
    "w8a8_linear",
]
