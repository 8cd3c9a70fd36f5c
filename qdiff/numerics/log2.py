"""The grid of powers of two, for values in (0, 1] that matter by their ratio: attention's probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_log2(values: Tensor, bits: int) -> Tensor:
    """clip(round(-log2 x), 0, 2^bits - 1), uint8: FQ-ViT's (arXiv 2111.13824).

    Laws: 2^-code is within a factor of sqrt(2) of x for x in [2^(0.5 - 2^bits), 1]; powers of two are exact; monotone.

    Args:
        values: float, in [0, 1]; zero takes the largest code.
        bits: of a code, 1 to 8.
    """
    return values.float().log2().neg_().round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def dequantize_log2(codes: Tensor) -> Tensor:
    """2^-code, float32: what it stands for."""
    return torch.exp2(codes.float().neg_())
