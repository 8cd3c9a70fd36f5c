"""The 4-bit weight format with two levels of scales: w[n, k] ~ scale[n] * m[n, k // g] * q[n, k].

q is a signed 4-bit code in [-8, 7], m a 4-bit integer in [1, 15] per group of g weights, scale a float32 per output channel.
m * q fits int8 (|m * q| <= 120), so a product with int8 activations never leaves integers until one scale an output channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Q_MIN, Q_MAX = -8, 7
M_MAX = 15


class TwoLevelWeight(NamedTuple):
    """A quantized matrix: codes_q int8 [N, K] in [-8, 7], multipliers uint8 [N, G] in [1, 15], scale float32 [N]."""

    codes_q: Tensor
    multipliers: Tensor
    scale: Tensor


# Steps tried by a range search, as shares of the smallest step that clips nothing. Measured on Gaussian and Laplace groups of 64:
# the best share is never below 0.5, and a finer grid gains less than 0.1 % of the squared error.
_SHARES = tuple(1.0 - 0.025 * i for i in range(21))
# Largest step of a row over its scale. 15 spends the whole multiplier range; less leaves head room but is finer for no group; more
# clips the largest group and serves rows whose other groups are far smaller.
_LARGEST_MULTIPLIERS = (9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.5, 19.0, 24.0, 32.0)
# Weights worked on at once: a few float32 temporaries of this many elements stay in a core's cache.
_CHUNK = 1 << 16


def fit_two_level(
    w: Tensor, group_size: int, importance: Tensor | None = None, search: bool = True
) -> tuple[Tensor, Tensor]:
    groups = _groups(w, group_size)
    top = _free_steps(groups)
    scale = top.amax(1) / M_MAX
    m = (top / scale[:, None]).round().clamp(1, M_MAX)
    return scale, m.to(torch.uint8)


def round_two_level(w: Tensor, scale: Tensor, multipliers: Tensor, group_size: int) -> Tensor:
    groups = _groups(w, group_size)
    step = (scale[:, None] * multipliers)[..., None]
    return (groups / step).round_().clamp_(Q_MIN, Q_MAX).to(torch.int8).view(w.shape)


def dequantize_two_level(weight: TwoLevelWeight) -> Tensor:
    n, k = weight.codes_q.shape
    step = (weight.scale[:, None] * weight.multipliers)[..., None]
    return (weight.codes_q.view(n, weight.multipliers.shape[1], -1) * step).view(n, k)


def fit_channel(w: Tensor, bits: int, search: bool = True, importance: Tensor | None = None) -> TwoLevelWeight:
    top = 7 if bits == 4 else 127
    scale = w.float().abs().amax(1) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    q = (w / scale[:, None]).round().clamp(-8 if bits == 4 else -127, top).to(torch.int8)
    return TwoLevelWeight(q, torch.ones(w.shape[0], 1, dtype=torch.uint8), scale)


def fit_tensor(w: Tensor, bits: int, search: bool = True, importance: Tensor | None = None) -> TwoLevelWeight:
    fit = fit_channel(w.reshape(1, -1), bits, search)
    n = w.shape[0]
    return TwoLevelWeight(fit.codes_q.view(w.shape), fit.multipliers.expand(n, 1).clone(), fit.scale.expand(n).clone())


def _free_steps(groups):
    top = groups.abs().amax(-1) / Q_MAX
    return torch.where(top > 0, top, torch.ones_like(top))


def _groups(w, g):
    return w.float().unflatten(1, (-1, g))
