"""Scales of samples and channel segments, as cuda/include/sample_factors.cuh reads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

MAX_SEGMENTS = 8  # in the kernels' parameters; or as many as there are channels


def in_few_segments(scale: Tensor, segments: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
    """The same scales [R, S], one for each channel where there are more segments than the kernels take."""
    if len(segments) <= MAX_SEGMENTS:
        return scale, segments
    columns = [column[:, None].expand(-1, width) for column, width in zip(scale.unbind(1), segments)]
    return torch.cat(columns, dim=1), (1,) * sum(segments)


def ends_of(segments: Sequence[int], channels: int) -> list[int]:
    """Where each of the first MAX_SEGMENTS ends, in channels; the last of all, where there are fewer."""
    return [*accumulate(segments), *([channels] * MAX_SEGMENTS)][:MAX_SEGMENTS]
