"""What a rounding method hands to a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class QuantizedWeights:
    """The numbers of one quantized layer, unpacked, in the GEMM layout of `qdiff.numerics.gemm_layout`.

    Attributes:
        codes_q: int8 [N, K]; in [-8, 7] with multipliers, indices in [0, 15] with a codebook, in [-127, 127] otherwise.
        multipliers: uint8 [N, G] in [1, 15] for 4-bit weights (also [N, 1], the same for all groups), None for 8-bit
            weights and with a codebook.
        scale: float32 [N].
        smooth: float32 [C], or None: the input is multiplied by it before it is quantized.
        low_rank: (down [r, K], up [N, r]), or None: a branch added to the product, reading the transformed input.
        act_scales: float32 [T, S], or None: activation scales by timestep (one row when static) and channel segment.
        codebook: int8 [N, 16], the integers that 4-bit codes stand for, or None.
        shift, index, rotation: float32 [C], int64 [C'] and int8 [b], the rest of `qdiff.numerics.input_pipeline`, or
            None. With an index, `smooth` and K are of the C' channels it makes.
        bias_change: float32 [N], what is added to the float layer's bias, or None.
        first_token: (float32 [C], float32 [N]), a first token of the raw input that is the same for all samples, and
            the float weight's product with it; or None.
    """

    codes_q: Tensor
    multipliers: Tensor | None
    scale: Tensor
    smooth: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    act_scales: Tensor | None = None
    codebook: Tensor | None = None
    shift: Tensor | None = None
    index: Tensor | None = None
    rotation: Tensor | None = None
    bias_change: Tensor | None = None
    first_token: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class LayerSizes:
    """What a plan does not determine of a layer's buffers.

    Attributes:
        rank: of the low-rank branch; 0 for none.
        has_smooth: whether there is a smoothing vector.
        scale_rows: T, rows of the activation scale table (1 when static; not looked at when there is none).
        has_codebook: whether 4-bit codes are looked up in a codebook.
        has_shift: whether the input is shifted.
        split_channels: C', the channels that an index makes of the input's; 0 without an index.
        rotation: signs of a Hadamard block; 0 for none.
        has_bias: None for a bias where the float layer has one.
        has_first_token: whether a first token is kept apart.
    """

    rank: int = 0
    has_smooth: bool = False
    scale_rows: int = 1
    has_codebook: bool = False
    has_shift: bool = False
    split_channels: int = 0
    rotation: int = 0
    has_bias: bool | None = None
    has_first_token: bool = False

    @classmethod
    def of_weights(cls, weights: QuantizedWeights, bias: Tensor | None) -> LayerSizes:
        """Those of a float layer with this bias once it has these numbers."""
        return cls(
            rank=0 if weights.low_rank is None else weights.low_rank[0].shape[0],
            has_smooth=weights.smooth is not None,
            scale_rows=1 if weights.act_scales is None else weights.act_scales.shape[0],
            has_codebook=weights.codebook is not None,
            has_shift=weights.shift is not None,
            split_channels=0 if weights.index is None else weights.index.shape[0],
            rotation=0 if weights.rotation is None else weights.rotation.shape[0],
            has_bias=bias is not None or weights.bias_change is not None,
            has_first_token=weights.first_token is not None,
        )

    @classmethod
    def of_layer(cls, layer: nn.Module) -> LayerSizes:
        """Those of a quantized layer."""

        def rows(name: str) -> int:
            buffer = getattr(layer, name, None)
            return 0 if buffer is None else int(buffer.shape[0])

        return cls(
            rank=rows("down"),
            has_smooth=rows("smooth") > 0,
            scale_rows=rows("act_scales") or 1,
            has_codebook=rows("codebook") > 0,
            has_shift=rows("shift") > 0,
            split_channels=rows("index"),
            rotation=rows("rotation"),
            has_bias=getattr(layer, "bias", None) is not None,
            has_first_token=rows("first_input") > 0,
        )


NO_SIZES = LayerSizes()
