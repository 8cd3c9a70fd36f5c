"""The part of a layer's input pipeline that no quantizer does by itself."""

import torch
from torch import Tensor

from qdiff.numerics.input_pipeline import InputPipeline
from qdiff.ops.checks import FLOAT32, FLOATS, INT8, check_tensor
from qdiff.ops.registry import operator
from qdiff.ops.row_blocks import row_blocks


def _fake(
    x: Tensor,
    shift: Tensor | None,
    index: Tensor | None,
    smooth: Tensor | None,
    rotation: Tensor | None,
    channel_dim: int,
) -> Tensor:
    shape = list(x.shape)
    shape[channel_dim] = shape[channel_dim] if index is None else index.shape[0]
    order = torch.contiguous_format if channel_dim == -1 else torch.channels_last
    return torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=order)


@operator(_fake)
def transform_input(
    x: Tensor,
    shift: Tensor | None,
    index: Tensor | None,
    smooth: Tensor | None,
    rotation: Tensor | None,
    channel_dim: int,
) -> Tensor:
    """rotate((x - shift)[index] * smooth) along the channels: see `qdiff.numerics.input_pipeline`.

    Args:
        x: float32, float16 or bfloat16, any strides: [..., C], or an image [B, C, H, W].
        shift: float32 [C] or None.
        index: int64 [C'], the channel that each of the result's is a copy of, or None.
        smooth: float32 [C'], the reciprocal smoothing vector, or None for ones.
        rotation: int8 [b], the signs of a Hadamard block of b channels, a power of two that divides C', or None.
        channel_dim: -1, or 1 for an image.

    Returns:
        float32, so that what follows rounds once, of x's shape with C' channels; contiguous, an image in channels-last
        order.
    """
    _check(x, shift, index, smooth, rotation, channel_dim)
    pipeline = InputPipeline(shift, index, smooth, rotation)
    result = _fake(x, shift, index, smooth, rotation, channel_dim)
    last, into = (x, result) if channel_dim == -1 else (x.permute(0, 2, 3, 1), result.permute(0, 2, 3, 1))
    rows, into = last.reshape(-1, last.shape[-1]), into.view(-1, into.shape[-1])
    for block in row_blocks(rows.shape[0], 4 * into.shape[1], x.device):
        into[block] = pipeline.channels(rows[block])
    return result


def _check(
    x: Tensor,
    shift: Tensor | None,
    index: Tensor | None,
    smooth: Tensor | None,
    rotation: Tensor | None,
    channel_dim: int,
) -> None:
    if x.dtype not in FLOATS or x.dim() < 1:
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, expected a float tensor [..., C] or [B, C, H, W]")
    if channel_dim != -1 and (channel_dim != 1 or x.dim() != 4):
        raise ValueError(f"channel_dim: got {channel_dim} for x {tuple(x.shape)}, expected -1, or 1 for [B, C, H, W]")
    channels = x.shape[channel_dim]
    if shift is not None:
        check_tensor("shift", shift, FLOAT32, (channels,), x.device)
    if index is not None:
        check_tensor("index", index, (torch.int64,), (None,), x.device)
        channels = index.shape[0]
    if smooth is not None:
        check_tensor("smooth", smooth, FLOAT32, (channels,), x.device)
    if rotation is not None:
        check_tensor("rotation", rotation, INT8, (None,), x.device)
        block = rotation.shape[0]
        if block < 1 or block & (block - 1) or channels % block:
            raise ValueError(f"rotation: got {block} signs, expected a power of two that divides {channels} channels")
