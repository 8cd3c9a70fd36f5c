"""Exact products of int8 matrices."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# |a * b| <= 128 * 128, so this many terms sum to at most 2^24, up to which float32 holds every integer.
_EXACT_TERMS = 1024


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in integers: int8 [M, K] and int8 [N, K] to int32 [M, N].

    Exact for every input with K < 2^17 (then no sum leaves int32). M, N or K may be 0.

    Raises:
        ValueError: not two int8 matrices with the same K.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8 or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"a, b: got {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}, expected int8 [M, K] and int8 [N, K]"
        )
    if 0 in (a.shape[0], b.shape[0], a.shape[1]):
        return torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    if a.device.type == "cuda":
        return _padded_int_mm(a, b)
    if a.device.type == "cpu" and a.shape[1] > 1 and _cpu_int_mm_is_exact():
        return torch._int_mm(_dense(a), _dense(b).t())
    return split_float_matmul(a, b)


def _dense(x: Tensor) -> Tensor:
    # torch takes oneDNN's leading dimension from the stride even of a dimension of size 1, where it can be anything,
    # and
    # does not look at the refusal: the result is then uninitialized memory (pytorch#195066). K = 1 is always refused.
    return x.contiguous().as_strided(x.shape, (x.shape[1], 1))


def split_float_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The same product where there is no integer one: float32 over short pieces of K, each exact, added as int32."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT_TERMS):
        piece = slice(start, start + _EXACT_TERMS)
        total += (a[:, piece].float() @ b[:, piece].float().t()).to(torch.int32)
    return total


@lru_cache(maxsize=1)
def _cpu_int_mm_is_exact() -> bool:
    # Without VNNI instructions, oneDNN's 16-bit intermediate sums saturate (pytorch#136746). Operands at the extremes
    # show it.
    a = torch.full((32, 64), -128, dtype=torch.int8)
    b = torch.full((32, 64), 127, dtype=torch.int8)
    try:
        return bool((torch._int_mm(a, b.t()) == -128 * 127 * 64).all()) and bool(
            (torch._int_mm(b, b.t()) == 127 * 127 * 64).all()
        )
    except (AttributeError, RuntimeError):  # the operator is private: older and other builds may lack it
        return False


def _padded_int_mm(a: Tensor, b: Tensor) -> Tensor:
    # cuBLAS wants more than 16 rows, and K and N in multiples of 8. Zeros change no sum.
    (m, k), n = a.shape, b.shape[0]
    a = F.pad(a, (0, -k % 8, 0, max(0, 17 - m)))
    b = F.pad(b, (0, -k % 8, 0, -n % 8))
    return torch._int_mm(a.contiguous(), b.contiguous().t())[:m, :n]
