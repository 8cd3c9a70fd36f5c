"""Residual blocks whose norms, activations and additions are parts of the convolutions' passes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from qdiff.layers import QuantConv2d
from qdiff.layers.norm_vectors import has_vectors_of
from qdiff.plugin.fused_group_norm import FusedGroupNorm
from qdiff.plugin.plain import are_plain, drops_nothing, is_inference


class FusedResnetBlock2D(ResnetBlock2D):
    """diffusers' block, whose convolutions normalize what they quantize and add the time embedding and the residual.

    Each addition is then rounded together with the product before it, and not once more. Where anybody could see what
    is left out (a hook, a wrapped layer, dropout, a gradient, autocast), and where the block also changes the size of
    the image, it computes as diffusers does.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._fuses(input_tensor, temb):
            return super().forward(input_tensor, temb, *args, **kwargs)  # type: ignore[arg-type,no-any-return]
        # Read by the norm, the shortcut and the addition, all of which want it so.
        x = input_tensor.contiguous(memory_format=torch.channels_last)
        shift = None
        if self.time_emb_proj is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        hidden = self.conv1.forward_normalized(x, self.norm1, shift=shift)  # type: ignore[operator]
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        if self.output_scale_factor == 1:
            return self.conv2.forward_normalized(hidden, self.norm2, residual=residual)  # type: ignore[no-any-return,operator]
        return (residual + self.conv2.forward_normalized(hidden, self.norm2)) / self.output_scale_factor  # type: ignore[no-any-return,operator]

    def _fuses(self, x: Tensor, temb: Tensor | None) -> bool:
        if not is_inference(x) or self.time_embedding_norm != "default":
            return False
        if self.upsample is not None or self.downsample is not None:
            return False
        if self.time_emb_proj is None:
            if temb is not None:
                return False
        elif temb is None or temb.dim() != 2 or len(temb) != len(x):
            return False
        own = self._modules  # at every call of every block: attributes would take ten times as long
        norms, convs, between = (own["norm1"], own["norm2"]), (own["conv1"], own["conv2"]), own["nonlinearity"]
        return (
            type(between) is nn.SiLU
            and drops_nothing(own["dropout"])
            and _is_group_norm(norms[0], x.dtype)
            and _is_group_norm(norms[1], x.dtype)
            and _takes_normalized(convs[0])
            and _takes_normalized(convs[1])
            and (self.conv_shortcut is not None or x.shape[1] == convs[1].out_channels)  # and not broadcast
            and are_plain(between, own["dropout"], *norms, *convs)
        )


def _is_group_norm(module: nn.Module | None, dtype: torch.dtype) -> bool:
    known = (FusedGroupNorm, nn.GroupNorm)
    return isinstance(module, nn.GroupNorm) and type(module) in known and has_vectors_of(module, dtype)


def _takes_normalized(module: nn.Module | None) -> bool:
    return type(module) is QuantConv2d and module.takes_normalized
