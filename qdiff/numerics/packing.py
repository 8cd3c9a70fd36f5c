"""Bit layouts of 4-bit weights.

A row is cut into blocks of neighbours along K: `storage_block(group_size)` of them, 32 for every group size that is a
multiple of 32, and the only size that the GPU kernels read. A group of the recipe is one block or several with the same
multiplier.

Codes: one byte holds two weights of one block, the halves of the block side by side, so unpacking writes two contiguous
runs and interleaves nothing. A block of 8 weights q0..q7, stored as u = q + 8 in [0, 15]:

    byte      0         1         2         3
    bits   7654 3210 7654 3210 7654 3210 7654 3210
            u4   u0   u5   u1   u6   u2   u7   u3

Multipliers: 4-bit m in [1, 15], two blocks a byte, even block in the low bits; an odd number of blocks is padded with
m = 1:

    byte      0         1         2           (G = 5)
            m1   m0   m3   m2    1   m4

The integer weight is m * (u - 8), or with a codebook, int8 [N, 16] and no multipliers, codebook[n, u].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGEST_BLOCK = 32


def storage_block(group_size: int) -> int:
    """Weights of a block that are stored with one multiplier, for groups of this size: the largest divisor of 32."""
    return math.gcd(_LARGEST_BLOCK, group_size)


def pack_int4(q: Tensor, group_size: int) -> Tensor:
    """Codes int8 [N, K] in [-8, 7] to packed uint8 [N, K/2].

    It should be the case that `unpack_int4(pack_int4(q, g), g) == q`.
    """
    groups = _grouped(q, group_size)
    if group_size % 2:
        raise ValueError(f"group_size: got {group_size}, expected an even one: a byte holds two weights of one group")
    if q.dtype != torch.int8 or (q.numel() and (int(q.min()) < -8 or int(q.max()) > 7)):
        raise ValueError(f"q: got {q.dtype} values outside int8 [-8, 7]; round and clamp before packing")
    u = (groups + 8).to(torch.uint8)
    low, high = u.split(group_size // 2, dim=-1)
    return (low | (high << 4)).flatten(1)


def unpack_int4(packed: Tensor, group_size: int) -> Tensor:
    """Packed uint8 [N, K/2] to codes int8 [N, K] in [-8, 7]."""
    halves = _grouped(packed, group_size // 2)
    return torch.cat([halves & 15, halves >> 4], dim=-1).view(torch.int8).sub_(8).flatten(1)


def pack_multipliers(multipliers: Tensor) -> Tensor:
    """Multipliers uint8 [N, G] in [1, 15] to packed uint8 [N, ceil(G/2)]."""
    if multipliers.dtype != torch.uint8 or (
        multipliers.numel() and not 1 <= int(multipliers.min()) <= int(multipliers.max()) <= 15
    ):
        raise ValueError(f"multipliers: got {multipliers.dtype} with values outside uint8 [1, 15]")
    if multipliers.shape[1] % 2:
        multipliers = torch.cat([multipliers, torch.ones_like(multipliers[:, :1])], dim=1)
    return multipliers[:, 0::2] | (multipliers[:, 1::2] << 4)


def unpack_multipliers(packed: Tensor, groups: int) -> Tensor:
    """Packed uint8 [N, ceil(groups/2)] to multipliers uint8 [N, groups]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :groups]


def expand_int4(packed: Tensor, packed_multipliers: Tensor, group_size: int) -> Tensor:
    """The integer weights m * q of the two-level format: int8 [N, K], |m * q| <= 120.

    Args:
        packed: uint8 [N, K/2] from `pack_int4`.
        packed_multipliers: uint8 [N, ceil(K / group_size / 2)] from `pack_multipliers`.
        group_size: even, divides K.
    """
    halves = _grouped(packed, group_size // 2)
    m = unpack_multipliers(packed_multipliers, halves.shape[1]).view(torch.int8)
    # Written out over a half group: int8 products of equal shapes run 5 times faster than broadcast 32 bytes at a time.
    m = m[:, :, None].expand(halves.shape).contiguous()
    weights = torch.empty(*halves.shape[:2], group_size, dtype=torch.int8, device=packed.device)
    for nibbles, half in zip((halves & 15, halves >> 4), weights.chunk(2, dim=-1)):
        torch.mul(nibbles.view(torch.int8).sub_(8), m, out=half)
    return weights.flatten(1)


def expand_codebook(packed: Tensor, codebook: Tensor, group_size: int) -> Tensor:
    """The integer weights codebook[n, u]: int8 [N, K].

    Args:
        packed: uint8 [N, K/2], u = q + 8 of the q that `pack_int4` takes.
        codebook: int8 [N, 16].
        group_size: of the layout; even, divides K.
    """
    halves = _grouped(packed, group_size // 2)
    u = torch.cat([halves & 15, halves >> 4], dim=-1).flatten(1)
    return codebook.gather(1, u.long())


def expand_weight(packed: Tensor, multipliers: Tensor | None, codebook: Tensor | None, group_size: int) -> Tensor:
    """The integer weights int8 [N, K] of packed codes that have either multipliers or a codebook."""
    if codebook is not None:
        return expand_codebook(packed, codebook, group_size)
    assert multipliers is not None
    return expand_int4(packed, multipliers, group_size)


def _grouped(rows: Tensor, size: int) -> Tensor:
    if rows.dim() != 2 or size <= 0 or rows.shape[1] % size:
        raise ValueError(
            f"group_size: rows of shape {tuple(rows.shape)} cannot be cut into groups of {size}; use an even divisor"
        )
    return rows.unflatten(1, (rows.shape[1] // size, size))
