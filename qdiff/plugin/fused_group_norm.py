"""Group norms that leave an image in channels-last order, and read it so."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdiff.layers.norm_vectors import has_vectors_of, norm_vectors
from qdiff.ops import group_norm
from qdiff.plugin.plain import is_inference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FusedGroupNorm(nn.GroupNorm):
    """torch's norm, which for an image in channels-last order is our operator: torch copies it into the other order on
    a GPU, and leaves it there. Any other input, and one with a gradient or under autocast, is torch's."""

    def forward(self, input: Tensor) -> Tensor:
        if not self._fuses(input):
            return super().forward(input)
        return group_norm(input, self.num_groups, *norm_vectors(self), self.eps, False)  # type: ignore[no-any-return]

    def _fuses(self, x: Tensor) -> bool:
        if x.dim() != 4 or x.dtype not in _DTYPES or not is_inference(x):
            return False
        weight = self._parameters["weight"]
        here = weight is None or weight.device == x.device
        return (
            here
            and has_vectors_of(self, x.dtype)
            and x.shape[1] == self.num_channels
            and x.is_contiguous(memory_format=torch.channels_last)
        )
