"""Telling the first text token, which is the same for every prompt, from any other."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative distance up to which tokens count as the same: text encoders in half precision differ by 1e-3.
_TOLERANCE = 0.01


def same_token(tokens: Tensor, value: Tensor) -> Tensor:
    """Whether each of tokens [..., C] is the token `value` [C], but for rounding: bool [...]."""
    value = value.float()
    distance = torch.linalg.vector_norm(tokens.float() - value, dim=-1)
    return distance <= _TOLERANCE * torch.linalg.vector_norm(value)
