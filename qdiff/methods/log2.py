"""Attention's probabilities as powers of two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.methods.contract import Probabilities
from qdiff.methods.registry import register
from qdiff.numerics.log2 import dequantize_log2, quantize_log2


@register("log2")
@dataclass(frozen=True)
class Log2(Probabilities):
    """P ~ 2^-q, q = clip(round(-log2 P), 0, 2^b - 1).

    The log2 quantization of FQ-ViT's Log-Int-Softmax (arXiv 2111.13824). Softmax's outputs are many small numbers and a
    few large ones; a uniform grid of 4 bits has a step of 1/15, in which most are lost. A product with a power of two
    is a shift. Here the arithmetic is simulated in floating point: what is had is the accuracy of codes of `bits` bits,
    not their speed. As in the paper, rows are not made to add up to one again. A probability of exactly zero, as of a
    masked key, stays zero (the authors' code makes a zero of everything that is beyond the last code).
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"log2.bits must be a whole number in 2 to 8: got {self.bits!r}")

    def quantize(self, probabilities: Tensor) -> Tensor:
        values = dequantize_log2(quantize_log2(probabilities, self.bits))
        return torch.where(probabilities > 0, values, 0.0).to(probabilities.dtype)
