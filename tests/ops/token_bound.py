"""How far the codes and scales of activated or normalized tokens may be from those of float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.ops.activation import activate


def assert_activated_near(codes: Tensor, scale: Tensor, x: Tensor, smooth: Tensor | None, activation: str) -> None:
    """Roundings to x's dtype of the function and of what it gates; the function's own error, 4e-7 of its argument."""
    info, gated = torch.finfo(x.dtype), activation == "geglu"
    exact = activate(x.double(), activation)
    largest = x.double().abs().amax(-1, keepdim=True) ** (1 + gated)
    slack = 2 * info.eps * (exact.abs() + info.tiny * (1 + largest)) + 4e-7 * largest
    _assert_near(codes, scale, exact, slack, smooth)


def assert_normalized_near(
    codes: Tensor,
    scale: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    smooth: Tensor | None,
) -> None:
    """The rounding to x's dtype; those of the mean, in units of the standard deviation."""
    double = x.double()
    exact = F.layer_norm(
        double, x.shape[-1:], *(None if part is None else part.double() for part in (weight, bias)), eps
    )
    mean, deviation = double.mean(-1, keepdim=True), (double.var(-1, correction=0, keepdim=True) + eps).sqrt()
    gain = 1.0 if weight is None else weight.double().abs().amax()
    slack = torch.finfo(x.dtype).eps * exact.abs() + 3e-7 * gain * (mean.abs() / deviation + 5)
    _assert_near(codes, scale, exact, slack, smooth)


def _assert_near(codes: Tensor, scale: Tensor, exact: Tensor, slack: Tensor, smooth: Tensor | None) -> None:
    """Scales of a largest magnitude within the slack of the exact one, and codes nearest to a value within it."""
    assert codes.dtype == torch.int8
    assert codes.shape == exact.shape
    assert scale.shape == exact.shape[:-1]
    if smooth is not None:
        exact, slack = exact * smooth, slack * smooth
    absmax = exact.abs().amax(-1)
    seen = absmax > slack.amax(-1)  # of anything else, even a row of zeros is right
    assert ((scale * 127 - absmax).abs() <= slack.amax(-1) + 1e-6 * absmax)[seen].all()
    assert ((codes * scale[..., None] - exact).abs() <= slack + scale[..., None] * 0.5001)[seen].all()
