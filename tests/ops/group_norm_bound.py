"""How far a group norm's values, and their codes, may be from those of float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def assert_values_near(
    y: Tensor, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> None:
    """Every value is within what roundings may do of the float64 one."""
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact, slack = _exact(x, groups, weight, bias, eps, silu)
    assert ((y.double() - exact).abs() <= slack).all()


def assert_codes_near(
    codes: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor,
    smooth: Tensor | None,
    segments: list[int],
) -> None:
    """Every code is nearest to a value that is within what roundings may do of the float64 one, or saturates so: those
    of the value, and of the product with the factor and of the factor, 2^-22 together."""
    assert codes.dtype == torch.int8
    assert codes.is_contiguous(memory_format=torch.channels_last)
    exact, slack = _exact(x, groups, weight, bias, eps, silu)
    steps = torch.cat([column[:, None].expand(-1, width) for column, width in zip(scale.unbind(1), segments)], 1)
    factor = (1.0 if smooth is None else smooth.double()) / steps.double().clamp_min(1e-30)
    factor = factor.repeat_interleave(len(x) // len(scale), 0)[:, :, None, None]
    low, high = ((exact + side * slack) * factor for side in (-1, 1))
    rounded = 0.5 + 127 * 2.0**-22
    assert (codes >= (low - rounded).clamp(-127, 127)).all()
    assert (codes <= (high + rounded).clamp(-127, 127)).all()


def _exact(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """The values in float64, and what roundings may do to each.

    To x's dtype after the norm and after the silu, half a unit in the last place each; of the sums, 2^-16 of what is
    normalized and 2^-18 of a deviation; of weight * x / deviation and bias - weight * mean / deviation, which cancel,
    2^-22 of each; of the silu, 2^-18. The silu's slope is below 1.1.
    """
    by_channel = (1, x.shape[1], 1, 1)
    grouped = x.double().reshape(len(x), groups, -1)
    mean = grouped.mean(2, keepdim=True)
    deviation = ((grouped - mean).square().mean(2, keepdim=True) + eps).sqrt()
    gamma = 1.0 if weight is None else weight.double().view(by_channel)
    beta = 0.0 if bias is None else bias.double().view(by_channel)
    normalized = ((grouped - mean) / deviation).view(x.shape) * gamma
    offset = (mean / deviation).expand_as(grouped).reshape(x.shape) * gamma
    y = normalized + beta
    s = F.silu(y) if silu else y
    half, least = torch.finfo(x.dtype).eps / 2, torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    slack = 2.0**-21 * (offset.abs() + torch.as_tensor(beta).abs())
    slack += 2.0**-16 * normalized.abs() + 2.0**-18 * torch.as_tensor(gamma).abs()
    return s, 1.1 * (slack + half * y.abs() + least) + 2.0**-18 * s.abs() + half * s.abs() + least
