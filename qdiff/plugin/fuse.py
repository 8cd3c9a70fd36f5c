"""Blocks of a quantized denoiser that compute in fewer passes what diffusers computes module by module."""

from __future__ import annotations

from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from qdiff.plugin.fused_feed_forward import FusedFeedForward
from qdiff.plugin.fused_group_norm import FusedGroupNorm
from qdiff.plugin.fused_resnet import FusedResnetBlock2D
from qdiff.plugin.fused_transformer import FusedTransformerBlock
from qdiff.plugin.fused_transformer_2d import FusedTransformer2D

# Subclasses that add nothing but another `forward`, or a part of it, which decides at each call: so a block's modules
# can still be replaced, hooked and loaded into.
_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicTransformerBlock: FusedTransformerBlock,
    FeedForward: FusedFeedForward,
    ResnetBlock2D: FusedResnetBlock2D,
    Transformer2DModel: FusedTransformer2D,
    nn.GroupNorm: FusedGroupNorm,
}
# diffusers and accelerate find blocks by the name of their class: `_repeated_blocks`, `_no_split_modules`.
for _theirs, _ours in _FUSED.items():
    _ours.__name__ = _theirs.__name__


def fuse_blocks(denoiser: nn.Module) -> None:
    """Make each block of these classes, but of none of their subclasses, one of ours, in place.

    Comes after the layers have their numbers, some of which it moves.
    """
    for module in denoiser.modules():
        module.__class__ = _FUSED.get(type(module), type(module))
        if isinstance(module, FusedTransformerBlock):
            module.lay_out()
