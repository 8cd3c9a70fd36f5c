"""Launching a linear layer together with the quantization of its input."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from operator import itemgetter, or_

import torch
from torch import Tensor

from qdiff.ops import _gemm, _quantize_cuda
from qdiff.ops._problem import Launch, allocator
from qdiff.ops._settled import settled
from qdiff.ops._shortcut import offer
from qdiff.ops.checks import Checked

_ALIGNMENT = 128  # bytes: a line of the cache

_Maybe = Tensor | None
# x, smooth and down, then codes, multipliers, codebook, scale, bias, up and residual.
_Tensors = tuple[Tensor, _Maybe, _Maybe, Tensor, _Maybe, _Maybe, Tensor, _Maybe, _Maybe, _Maybe]


class _TwoKernels:
    """What an earlier call made, for those of its kind whose tensors need no copy: the quantizer, and the product.

    The codes, their scales and what the low-rank branch reads are only between the two: one piece of memory.
    """

    def __init__(
        self, quantize: _quantize_cuda.TokenReady, multiply: Launch, tensors: _Tensors, k: int, out: Tensor
    ) -> None:
        x, _, down, _, multipliers, _, _, _, up, _ = tensors
        given = [place for place, tensor in enumerate(tensors) if tensor is not None]
        rows = x.numel() // x.shape[-1]
        values = rows * k
        made = [values, 4 * rows] if down is None else [values, 4 * rows, x.element_size() * rows * down.shape[0]]
        *self._starts, size = accumulate((-(-part // _ALIGNMENT) * _ALIGNMENT for part in made), initial=0)
        self._between, self._like = ((size,), (1,), torch.uint8), (tuple(out.shape), out.stride(), out.dtype)
        # The product's 12 addresses, of those that are given, those that are made, of the result, and of none.
        codes, *rest, second, added = (given.index(i) if i in given else -1 for i in range(3, 10))
        x_codes = len(given)
        low = -1 if up is None else x_codes + 2
        self._places = itemgetter(x_codes, codes, *rest, -1, added, x_codes + 1, low, second, -2)
        self._inputs, self._weights = slice(codes), slice(codes, codes + 1 + (multipliers is not None))
        self._quantize, self._multiply, self._empty = quantize.launch, multiply, allocator(out.device)
        self._forced = _gemm.forced

    def __call__(self, given: Sequence[Tensor]) -> Tensor | None:
        """The result for the tensors that are not None, or None where they need copies."""
        places = [tensor.data_ptr() for tensor in given]
        if reduce(or_, places) % 16 or self._forced != _gemm.forced:
            return None
        between, out = self._empty(*self._between), self._empty(*self._like)
        first = between.data_ptr()
        made = [first + start for start in self._starts]
        self._quantize(*places[self._inputs], *made)
        self._multiply(self._places((*places, *made, out.data_ptr(), 0)), settled(tuple(given[self._weights])))
        return out


def dynamic_linear(known: Checked, tensors: _Tensors, out_dtype: torch.dtype, activation: str) -> Tensor:
    """`qdiff.ops.dynamic_linear` on checked arguments on the current CUDA device; K a multiple of 32."""
    ready: _TwoKernels | None = known.prepared.get(_gemm.forced)
    if ready is not None:
        out = ready([tensor for tensor in tensors if tensor is not None])
        if out is not None:
            offer(tensors, ready)
            return out
    quantizer, product = known.prepared.setdefault("one by one", (Checked(None), Checked(None)))
    x, smooth, down, codes, multipliers, codebook, scale, bias, up, residual = tensors
    weights = codes, multipliers, codebook, scale
    x_codes, x_scale, low = _quantize_cuda.quantize_per_token(quantizer, x, smooth, down, activation)
    x_low = None if down is None else low.to(out_dtype)
    out = _gemm.linear(product, x_codes, x_scale, *weights, bias, x_low, up, residual, out_dtype)
    if ready is None and (down is None or activation == "none"):
        ready = _prepare(quantizer, product, tensors, x_codes.shape[-1], out)
        if ready is not None:
            known.prepared[_gemm.forced] = ready
            offer(tensors, ready)
    return out


def _prepare(quantizer: Checked, product: Checked, tensors: _Tensors, k: int, out: Tensor) -> _TwoKernels | None:
    """What computes the like of these tensors; None where every call makes copies, or has more than two kernels."""
    x, smooth, down, *_ = tensors
    quantize: _quantize_cuda.TokenReady | None = quantizer.prepared.get(True)
    multiply: _gemm.Ready | None = product.prepared.get(_gemm.forced)
    if quantize is None or multiply is None or not all(part is None or part.is_contiguous() for part in (x, smooth)):
        return None
    if down is not None and not (quantize.fused and down.is_contiguous() and x.dtype == down.dtype == out.dtype):
        return None
    return _TwoKernels(quantize, multiply.launch, tensors, k, out)
