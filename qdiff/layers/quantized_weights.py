"""What a rounding method hands to a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class QuantizedWeights:
    """The numbers of one quantized layer, unpacked, in the GEMM layout of `qdiff.numerics.gemm_layout`.

    Attributes:
        codes_q: int8 [N, K]; in [-8, 7] with multipliers, indices in [0, 15] with a codebook, in [-127, 127] otherwise.
        multipliers: uint8 [N, G] in [1, 15] for 4-bit weights (also [N, 1], the same for all groups), None for 8-bit
            weights and with a codebook.
        scale: float32 [N].
        smooth: float32 [C], or None: the input is multiplied by it before it is quantized.
        low_rank: (down [r, K], up [N, r]), or None: a branch added to the product, reading the smoothed input.
        act_scales: float32 [T, S], or None: activation scales by timestep (one row when static) and channel segment.
        codebook: int8 [N, 16], the integers that 4-bit codes stand for, or None.
    """

    codes_q: Tensor
    multipliers: Tensor | None
    scale: Tensor
    smooth: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    act_scales: Tensor | None = None
    codebook: Tensor | None = None
