"""Scales of quantized weights, chief among them the two-level scale of the 4-bit format.

    w[n, k] ~ scale[n] * m[n, k // g] * q[n, k]

q is a signed 4-bit code in [-8, 7] (narrower for 2 and 3 bits), m a 4-bit integer in [1, 15] per group of g weights,
scale a float32 per output channel. m * q fits int8 (|m * q| <= 120), so a product with int8 activations stays in
integers until one scale an output channel. One scale a channel is the case m = 1; weights of 5 to 8 bits always have
that form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

M_MAX = 15
GROUP_BITS, ROW_BITS = (2, 3, 4), (2, 3, 4, 5, 6, 7, 8)

# Steps that a range search tries, as shares of the smallest step that clips nothing. Of a group of 64, Gaussian or
# Laplace, the best share is 0.7 to 1: a finer or wider grid gains less than 0.2 % of the squared error. Longer rows
# have longer tails.
_GROUP_SHARES = tuple(1.0 - 0.025 * i for i in range(21))
_ROW_SHARES = tuple(1.0 - 0.02 * i for i in range(46))
# Multipliers tried for a row's largest group, which set the row's scale. Around 15, every multiplier is in use and the
# fine spacing finds the best fit of the other groups; above it the largest group is clipped, for the sake of far
# smaller ones. Measured: 40 values from 10 to 20 gain 0.2 % of the squared error, trying all multipliers at each
# another 0.1 %.
_LARGEST_M = (10.0, 12.0, 13.0, 13.5, 14.0, 14.5, 15.0, 15.5, 16.0, 16.5, 17.0, 20.0, 26.0)
# What a quick fit tries of both. Measured on Gaussian and Laplace rows: its squared error is 0.6 % above the full
# search's, at an eighth of its time.
_QUICK_SHARES = (1.0, 0.93, 0.86, 0.79)
_QUICK_LARGEST_M = (15.0,)
# Weights worked on at once. On a CPU a few float32 temporaries of this size stay in a core's cache; an accelerator
# takes longer to start an operation than to do it on so few.
_CHUNK, _ACCELERATOR_CHUNK = 1 << 16, 1 << 23


def codes_of(bits: int) -> tuple[int, int]:
    """The least and the largest code. 8-bit ones are symmetric, as activations are; below, one more level is worth it.

    Raises:
        ValueError: bits is outside 2 to 8.
    """
    if bits not in ROW_BITS:
        raise ValueError(f"bits: got {bits}, expected one of {list(ROW_BITS)}")
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class TwoLevelWeight(NamedTuple):
    """A quantized matrix: codes_q int8 [N, K], multipliers uint8 [N, G] in [1, 15], scale float32 [N]; G divides K."""

    codes_q: Tensor
    multipliers: Tensor
    scale: Tensor


def fit_two_level(
    w: Tensor,
    group_size: int,
    importance: Tensor | None = None,
    search: bool = True,
    quick: bool = False,
    bits: int = 4,
) -> tuple[Tensor, Tensor]:
    """Scales of the two-level format for a float matrix.

    Minimizes sum_k importance[k] * (w[n, k] - scale[n] m[n, g] q[n, k])^2 for each row n, with q the nearest codes: a
    range search gives each group its best free step; each of a few row scales, the nearest multiplier and its
    neighbours are then tried, with their true error. Rows of zeros get scale 1 and m = 1. The result is finite for
    every finite w.

    Args:
        w: float [N, K].
        group_size: divides K.
        importance: non-negative float [K], such as the mean square of each input; None for ones.
        search: False for min-max ranges, which clip nothing.
        quick: a coarser search, to compare candidates with.
        bits: of the codes, 2 to 4.

    Returns:
        scale float32 [N], positive, and multipliers uint8 [N, K / group_size] in [1, 15].
    """
    _check(w, group_size, importance, bits, GROUP_BITS)
    scale = torch.empty(w.shape[0], dtype=torch.float32, device=w.device)
    multipliers = torch.empty(w.shape[0], w.shape[1] // group_size, dtype=torch.uint8, device=w.device)
    peaks = _peaks(w)
    for rows in _row_chunks(w):
        groups = _Groups.of(w[rows] / peaks[rows, None], group_size, importance if search else None, bits)
        scale[rows], multipliers[rows] = _searched(groups, quick) if search else _min_max(groups)
    return _unscaled(scale, peaks), multipliers


def round_two_level(w: Tensor, scale: Tensor, multipliers: Tensor, group_size: int, bits: int = 4) -> Tensor:
    """Nearest codes in `codes_of(bits)`, half to even: w [N, K], scale [N], multipliers [N, G] to int8 [N, K]."""
    _check(w, group_size, None, bits, GROUP_BITS)
    low, high = codes_of(bits)
    q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    for rows in _row_chunks(w):
        step = (scale[rows, None] * multipliers[rows]).repeat_interleave(group_size, dim=1)
        q[rows] = (w[rows].float() / step).round_().clamp_(low, high)
    return q


def dequantize_two_level(weight: TwoLevelWeight) -> Tensor:
    """The float32 matrix [N, K] that the codes stand for."""
    group_size = weight.codes_q.shape[1] // weight.multipliers.shape[1]
    integers = weight.codes_q * weight.multipliers.view(torch.int8).repeat_interleave(group_size, dim=1)
    return integers * weight.scale[:, None]


def fit_channel(w: Tensor, bits: int, search: bool = True, importance: Tensor | None = None) -> TwoLevelWeight:
    """Nearest codes with one scale a row, by a range search on the squared error, or by min-max.

    Args:
        w: float [N, K].
        bits: 2 to 8.
        search: False for the min-max range.
        importance: non-negative float [K], None for ones.

    Returns:
        codes, multipliers [N, 1] of ones, and scales.
    """
    _check(w, w.shape[-1], importance, bits)
    scale = torch.empty(w.shape[0], dtype=torch.float32, device=w.device)
    peaks = _peaks(w)
    for rows in _row_chunks(w):
        groups = _Groups.of(w[rows] / peaks[rows, None], w.shape[1], importance, bits)
        step = groups.best_step(_ROW_SHARES) if search else groups.widest_step()
        scale[rows] = torch.where(step > 0, step, 1.0)[:, 0]
    return _rounded(w, _unscaled(scale, peaks), bits)


def fit_tensor(w: Tensor, bits: int, search: bool = True, importance: Tensor | None = None) -> TwoLevelWeight:
    """The same with one scale for the whole matrix, repeated for every row."""
    _check(w, w.shape[-1], importance, bits)
    peak = _peaks(w.flatten()[None])[0]
    chunks = [_Groups.of(w[rows] / peak, w.shape[1], importance, bits) for rows in _row_chunks(w)]
    widest = max((float(chunk.widest_step().max()) for chunk in chunks), default=0.0)

    def error(share: float) -> float:
        return sum(float(chunk.error(torch.full_like(chunk.values[0], share * widest)).sum()) for chunk in chunks)

    share = min(_ROW_SHARES, key=error) if search and widest > 0 else 1.0
    step = torch.full((w.shape[0],), share * widest if widest > 0 else 1.0, dtype=torch.float32, device=w.device)
    return _rounded(w, _unscaled(step, peak), bits)


def _peaks(w: Tensor) -> Tensor:
    # Rows are divided by these so that no squared error leaves float32's range; float32 [N], 1 for rows of zeros.
    peaks = w.float().abs().amax(dim=1) if w.numel() else torch.zeros(w.shape[0], device=w.device)
    return torch.where(peaks > 0, peaks, 1.0)


def _unscaled(scale: Tensor, peaks: Tensor) -> Tensor:
    return (scale * peaks).clamp_min(torch.finfo(torch.float32).tiny)


def _rounded(w: Tensor, scale: Tensor, bits: int) -> TwoLevelWeight:
    low, high = codes_of(bits)
    q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    for rows in _row_chunks(w):
        q[rows] = (w[rows].float() / scale[rows, None]).round_().clamp_(low, high)
    return TwoLevelWeight(q, torch.ones(w.shape[0], 1, dtype=torch.uint8, device=w.device), scale)


class _Groups(NamedTuple):
    """Some rows' weights with one *column* a group, so that a group's step is broadcast, and its error summed, along
    dim 0.

    Attributes:
        values: float32 [g, P], P = rows * groups a row, row major.
        importance: float32 [g, P] or None.
        rows: how many.
        bits: of the codes.
    """

    values: Tensor
    importance: Tensor | None
    rows: int
    bits: int

    @classmethod
    def of(cls, w: Tensor, group_size: int, importance: Tensor | None, bits: int) -> _Groups:
        values = w.float().reshape(-1, group_size).t().contiguous()
        if importance is not None:
            importance = importance.float().view(-1, group_size).t().repeat(1, w.shape[0])
        return cls(values, importance, w.shape[0], bits)

    def widest_step(self) -> Tensor:
        """The smallest step [rows, G] that clips nothing symmetric; 0 for groups of zeros."""
        return (self.values.abs().amax(dim=0) / codes_of(self.bits)[1]).view(self.rows, -1)

    def best_step(self, shares: tuple[float, ...]) -> Tensor:
        """The share of the widest step with the least error, [rows, G]; 0 for groups of zeros."""
        widest = self.widest_step().view(-1)
        best, least = widest, self.error(widest)
        for share in shares[1:]:
            step = widest * share
            error = self.error(step)
            best, least = torch.where(error < least, step, best), torch.minimum(error, least)
        return best.view(self.rows, -1)

    def error(self, step: Tensor) -> Tensor:
        """Weighted squared rounding error of every group, float32 [P], for positive steps [P]; 0 stands for any."""
        step = torch.where(step > 0, step, 1.0)
        residual = (self.values / step).round_().clamp_(*codes_of(self.bits)).mul_(step).sub_(self.values)
        squares = residual.square_() if self.importance is None else residual.square_().mul_(self.importance)
        return squares.sum(dim=0)


def _searched(groups: _Groups, quick: bool) -> tuple[Tensor, Tensor]:
    free = groups.best_step(_QUICK_SHARES if quick else _GROUP_SHARES)
    top = free.amax(dim=1)
    top = torch.where(top > 0, top, float(M_MAX))
    best_scale, best_m, least = top / M_MAX, torch.ones_like(free), torch.full_like(top, torch.inf)
    for largest in _QUICK_LARGEST_M if quick else _LARGEST_M:
        scale = top / largest
        m, error = _best_multipliers(groups, scale, free)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_m = torch.where(better, scale, best_scale), torch.where(better[:, None], m, best_m)
    return best_scale, best_m.to(torch.uint8)


def _best_multipliers(groups: _Groups, scale: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers [rows, G] that are best at this row scale, of those next to the free step, and the rows' errors."""
    nearest = (free / scale[:, None]).round_()
    candidates = [(nearest + offset).clamp_(1, M_MAX) for offset in (-1, 0, 1)]
    errors = torch.stack([groups.error((scale[:, None] * m).view(-1)) for m in candidates])
    least, which = errors.min(dim=0)
    m = torch.stack(candidates).flatten(1).gather(0, which[None])[0]
    return m.view_as(free), least.view_as(free).sum(dim=1)


def _min_max(groups: _Groups) -> tuple[Tensor, Tensor]:
    widest = groups.widest_step()
    top = widest.amax(dim=1)
    scale = torch.where(top > 0, top / M_MAX, 1.0)
    return scale, (widest / scale[:, None]).ceil_().clamp_(1, M_MAX).to(torch.uint8)


def _row_chunks(w: Tensor) -> Iterator[slice]:
    chunk = _CHUNK if w.device.type == "cpu" else _ACCELERATOR_CHUNK
    step = max(1, chunk // max(1, w.shape[1]))
    return (slice(start, start + step) for start in range(0, w.shape[0], step))


def _check(w: Tensor, group_size: int, importance: Tensor | None, bits: int, known: tuple[int, ...] = ROW_BITS) -> None:
    if w.dim() != 2 or not w.is_floating_point() or group_size < 1 or w.shape[1] % group_size:
        raise ValueError(
            f"group_size: got {group_size} for w {w.dtype} {tuple(w.shape)}, expected a float [N, K] and a divisor of K"
        )
    if bits not in known:
        raise ValueError(f"bits: got {bits}, expected one of {list(known)}")
    if importance is not None and importance.shape != w.shape[1:]:
        raise ValueError(f"importance: got {tuple(importance.shape)}, expected [{w.shape[1]}], one value an input")
