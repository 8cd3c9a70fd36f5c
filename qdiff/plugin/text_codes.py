"""The codes of a text, which the layers of all blocks of a transformer multiply: quantized once a call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qdiff.ops import quantize_per_token

_Codes = tuple[Tensor, Tensor]  # and their scales


class _Texts(threading.local):
    """Of the calls that this thread is in: what was quantized, when, and what came of it; None outside of any."""

    known: dict[int, tuple[Tensor, int, _Codes]] | None = None


_texts = _Texts()


@contextmanager
def quantized_once() -> Iterator[None]:
    """A text that blocks ask for in here is quantized when the first of them does.

    No longer than a call of the transformer: what a CUDA graph captures must be computed in it.
    """
    before, _texts.known = _texts.known, {}
    try:
        yield
    finally:
        _texts.known = before


def text_codes(text: Tensor) -> _Codes:
    """`quantize_per_token` of a text [..., K], as it is now."""
    known = None if torch.compiler.is_compiling() else _texts.known
    if known is None:
        return quantize_per_token(text, None, None)[:2]
    version = 0 if text.is_inference() else text._version
    found = known.get(id(text))  # which no other tensor has while this one is kept
    if found is None or found[1] != version:
        found = known[id(text)] = text, version, quantize_per_token(text, None, None)[:2]
    return found[2]
