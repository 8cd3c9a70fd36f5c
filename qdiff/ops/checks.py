"""Checks that every operator makes before it computes."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(
    name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int | None], device: torch.device
) -> None:
    """Raise a ValueError unless `tensor` has one of `dtypes`, the given `shape` (None: any size) and `device`."""
    fits = tensor.dim() == len(shape) and all(want is None or want == got for want, got in zip(shape, tensor.shape))
    if tensor.dtype not in dtypes or not fits or tensor.device != device:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name}: got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected "
            f"{' or '.join(map(str, dtypes))} [{expected}] on {device}"
        )


def check_int4_weight(
    codes: Tensor, multipliers: Tensor, scale: Tensor, group_size: int, k: int, device: torch.device
) -> None:
    """Raise a ValueError unless these are the packed 4-bit weights of a matrix [N, k]."""
    check_group_size(group_size, [k])
    n = codes.shape[0]
    check_tensor("codes", codes, [torch.uint8], [None, k // 2], device)
    check_tensor("multipliers", multipliers, [torch.uint8], [n, (k // group_size + 1) // 2], device)
    check_tensor("scale", scale, [torch.float32], [n], device)


def check_group_size(group_size: int, segments: Sequence[int]) -> None:
    """Raise a ValueError unless groups of this size can be packed, and none crosses a segment."""
    if group_size < 2 or group_size % 2 or any(width % group_size for width in segments):
        raise ValueError(
            f"group_size: got {group_size} for segments of {list(segments)}, expected an even divisor of each"
        )


def check_int8_weight(codes: Tensor, scale: Tensor, k: int, device: torch.device) -> None:
    """Raise a ValueError unless these are the 8-bit weights of a matrix [N, k]."""
    check_tensor("codes", codes, [torch.int8], [None, k], device)
    check_tensor("scale", scale, [torch.float32], [codes.shape[0]], device)


def check_linear_input(
    x_codes: Tensor,
    x_scale: Tensor,
    n: int,
    bias: Tensor | None,
    x_low: Tensor | None,
    up: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Raise a ValueError unless a linear operator can take these beside a weight of n rows."""
    device, rows = x_codes.device, x_codes.shape[:-1].numel()
    if x_codes.dtype != torch.int8 or x_codes.dim() < 1:
        raise ValueError(f"x_codes: got {x_codes.dtype} {tuple(x_codes.shape)}, expected int8 [..., K]")
    check_tensor("x_scale", x_scale, [torch.float32], [None], device)
    check_divides("x_scale", x_scale.shape[0], rows)
    check_bias_and_dtype(bias, n, out_dtype, device)
    if (x_low is None) != (up is None):
        raise ValueError("x_low, up: got one of them, expected both or neither")
    if x_low is not None and up is not None:
        check_tensor("up", up, FLOATS, [n, None], device)
        check_tensor("x_low", x_low, FLOATS, [*x_codes.shape[:-1], up.shape[1]], device)


def check_bias_and_dtype(bias: Tensor | None, n: int, out_dtype: torch.dtype, device: torch.device) -> None:
    """Raise a ValueError unless bias is None or a float [n], and out_dtype a float."""
    if bias is not None:
        check_tensor("bias", bias, FLOATS, [n], device)
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype: got {out_dtype}, expected one of {', '.join(map(str, FLOATS))}")


def check_divides(name: str, part: int, rows: int) -> None:
    """Raise a ValueError unless `part` rows of scales can be shared evenly by `rows` rows."""
    if (part == 0 and rows) or (part and rows % part):
        raise ValueError(
            f"{name}: got {part} rows of scales for {rows} rows of input, expected a number that divides them"
        )


def check_segments(segments: Sequence[int], channels: int) -> None:
    """Raise a ValueError unless `segments` are positive channel counts that add up to `channels`."""
    if not segments or min(segments) < 1 or sum(segments) != channels:
        raise ValueError(f"segments: got {list(segments)}, expected positive channel counts that sum to {channels}")
