"""Linear layers of one input as one product, whose weights lie side by side in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from weakref import ref

import torch
from torch import Tensor, nn

from qdiff.layers.quant_linear import QuantLinear
from qdiff.layers.quantized_weights import LayerSizes

_NAMES = ("codes", "multipliers", "codebook", "scale", "bias")
_ALIGNMENT = 16  # rows of the smallest buffer that kernels read, one byte each: so that every part starts at 16 bytes

# By identity of the first layer's codes: the buffers of all layers, where they are, and the layer they are views of.
_known: dict[int, tuple[list[Callable[[], Tensor | None]], list[int], QuantLinear]] = {}


def lay_side_by_side(layers: Sequence[nn.Module]) -> None:
    """Move the weights of these layers, if they are alike, to where `side_by_side` finds them.

    Their buffers become views of one layer's: nothing is stored twice, and what is loaded into them is loaded there. So
    this is for whoever has just made or moved the layers: a captured CUDA graph knows their old places. Layers that
    differ in size, format or bias, or that are no `QuantLinear` with `takes_quantized`, stay as they are.
    """
    ours = [layer for layer in layers if type(layer) is QuantLinear and layer.takes_quantized]
    if len(ours) < len(layers) or ours[0].codes.is_meta or ours[0].out_features % _ALIGNMENT:
        return
    kinds = [_kind(layer) for layer in ours]
    if side_by_side(ours) is None and all(kind == kinds[0] for kind in kinds):
        _lay_out(ours)


def side_by_side(layers: Sequence[QuantLinear]) -> QuantLinear | None:
    """A layer that computes what all of these do, one result after the other in the last dimension.

    None where `lay_side_by_side` was not called (for a copy, say) or left them alone, where a buffer was replaced
    since or has its values elsewhere (`.data`, which offloading swaps), and while torch.compile looks on.
    """
    if torch.compiler.is_compiling():
        return None
    key = id(layers[0]._buffers["codes"])
    found = _known.get(key)
    if found is None:
        return None
    references, places, whole = found
    parts = _parts(layers)
    if len(parts) != len(references) or any(reference() is not part for reference, part in zip(references, parts)):
        return None
    if _places(parts) != places:
        _known.pop(key, None)  # it is none of theirs any more, and would keep memory that they have left
        return None
    return whole


def _parts(layers: Sequence[QuantLinear]) -> list[Tensor | None]:
    return [layer._buffers[name] for layer in layers for name in _NAMES]


def _places(parts: Sequence[Tensor | None]) -> list[int]:
    return [part.data_ptr() for part in parts if part is not None]


def _kind(layer: QuantLinear) -> list[object]:
    sizes = (None if part is None else (part.shape, part.dtype, part.device) for part in _parts([layer]))
    return [layer.storage_block, *sizes]


def _lay_out(layers: Sequence[QuantLinear]) -> None:
    first = layers[0]
    sizes = LayerSizes(has_codebook=first.codebook is not None, has_bias=first.bias is not None)
    shape = (first.in_features, first.out_features * len(layers))
    whole = QuantLinear.empty(nn.Linear(*shape, device="meta", dtype=first.compute_dtype), first.plan, sizes)
    # Tensors like the ones that were there: those of inference mode could not be loaded into outside of it.
    with torch.inference_mode(False), torch.no_grad():
        for name in _NAMES:
            parts = [part for layer in layers if (part := layer._buffers[name]) is not None]
            if not parts:
                continue
            whole._buffers[name] = together = torch.cat(parts)
            for layer, view in zip(layers, together.split(first.out_features)):
                layer._buffers[name] = view
    if first.codes.is_cuda:
        torch.cuda.current_stream(first.codes.device).synchronize()  # calls on other streams read it too
    _remember(layers, whole)


def _remember(layers: Sequence[QuantLinear], whole: QuantLinear) -> None:
    # Weakly: where the layers' buffers go, so does what they are views of.
    codes, parts = layers[0].codes, _parts(layers)
    references: list[Callable[[], Tensor | None]] = [_none if part is None else ref(part) for part in parts]
    references[0] = ref(codes, partial(_gone, id(codes)))
    _known[id(codes)] = references, _places(parts), whole


def _none() -> None:
    return None


def _gone(key: int, _: ref[Tensor]) -> None:
    _known.pop(key, None)
