"""Checks that every operator makes before it computes.

A kind of call that has passed is remembered, so that another one is a look into a table.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from qdiff.ops import _shortcut

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)
INT8 = (torch.int8,)
UINT8 = (torch.uint8,)
# torch.int32 asks for the integer accumulators themselves.
OUT_DTYPES = (*FLOATS, torch.int32)

_MOST_KINDS = 4096


class Checked:
    """What is known of a kind of call that has passed its checks.

    Attributes:
        refusal: why the kernels do not take it, or None.
        prepared: what a launcher keeps for the next call.
    """

    __slots__ = ("prepared", "refusal")

    def __init__(self, refusal: str | None) -> None:
        self.refusal = refusal
        self.prepared: dict[Hashable, Any] = {}


CHECKED: dict[Hashable, Checked] = {}


def kind_of_call(operator: str, tensors: Sequence[Tensor | None], *rest: Hashable) -> Hashable:
    """All that checks look at, and all that a launch depends on but the tensors' addresses.

    Args:
        operator: its name.
        tensors: all of its arguments that are tensors, or None.
        rest: all of its other arguments.
    """
    layouts = [t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    return (operator, *layouts, *rest)


def remember(kind: Hashable, refusal: str | None = None) -> Checked:
    """Enter a kind of call that has passed into `CHECKED`."""
    if len(CHECKED) >= _MOST_KINDS:
        CHECKED.clear()
    known = CHECKED[kind] = Checked(refusal)
    return known


def forget() -> None:
    """Check every kind of call anew."""
    CHECKED.clear()
    _shortcut.forget()


def check_tensor(
    name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int | None], device: torch.device
) -> None:
    """Raise a ValueError unless `tensor` has one of `dtypes`, the given `shape` (None: any size) and `device`."""
    if tensor.shape == shape and tensor.dtype in dtypes and tensor.device == device:
        return
    fits = tensor.dim() == len(shape) and all(want is None or want == got for want, got in zip(shape, tensor.shape))
    if tensor.dtype not in dtypes or not fits or tensor.device != device:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name}: got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected "
            f"{' or '.join(map(str, dtypes))} [{expected}] on {device}"
        )


def check_int4_weight(
    codes: Tensor,
    multipliers: Tensor | None,
    codebook: Tensor | None,
    scale: Tensor,
    group_size: int,
    k: int,
    device: torch.device,
) -> None:
    """Raise a ValueError unless these are the packed 4-bit weights of a matrix [N, k]."""
    check_group_size(group_size, (k,))
    n = codes.shape[0]
    check_tensor("codes", codes, UINT8, (n, k // 2), device)
    if (multipliers is None) == (codebook is None):
        given = "neither" if codebook is None else "both"
        raise ValueError(f"multipliers, codebook: got {given}, expected one of them")
    if multipliers is not None:
        check_tensor("multipliers", multipliers, UINT8, (n, (k // group_size + 1) // 2), device)
    if codebook is not None:
        check_tensor("codebook", codebook, INT8, (n, 16), device)
    check_tensor("scale", scale, FLOAT32, (n,), device)


def check_group_size(group_size: int, segments: Sequence[int]) -> None:
    """Raise a ValueError unless groups of this size can be packed, and none crosses a segment."""
    if group_size >= 2 and group_size % 2 == 0:
        for width in segments:
            if width % group_size:
                break
        else:
            return
    raise ValueError(f"group_size: got {group_size} for segments of {list(segments)}, expected an even divisor of each")


def check_int8_weight(codes: Tensor, scale: Tensor, k: int, device: torch.device) -> None:
    """Raise a ValueError unless these are the 8-bit weights of a matrix [N, k]."""
    n = codes.shape[0]
    check_tensor("codes", codes, INT8, (n, k), device)
    check_tensor("scale", scale, FLOAT32, (n,), device)


def check_linear_input(
    x_codes: Tensor,
    x_scale: Tensor,
    n: int,
    bias: Tensor | None,
    x_low: Tensor | None,
    up: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Raise a ValueError unless a linear operator can take these beside a weight of n rows."""
    device, rows = x_codes.device, x_codes.shape[:-1]
    if x_codes.dtype is not torch.int8 or x_codes.dim() < 1:
        raise ValueError(f"x_codes: got {x_codes.dtype} {tuple(x_codes.shape)}, expected int8 [..., K]")
    check_tensor("x_scale", x_scale, FLOAT32, rows if x_scale.shape == rows else (x_scale.numel(),), device)
    check_divides("x_scale", x_scale.numel(), rows.numel())
    check_bias_and_dtype(bias, n, out_dtype, OUT_DTYPES, device)
    if (x_low is None) != (up is None):
        raise ValueError("x_low, up: got one of them, expected both or neither")
    if x_low is not None and up is not None:
        rank = up.shape[-1] if up.dim() else 0
        check_tensor("up", up, FLOATS, (n, rank), device)
        check_tensor("x_low", x_low, FLOATS, (*rows, rank), device)
    if residual is not None and out_dtype != torch.int32:
        check_tensor("residual", residual, (out_dtype,), (*rows, n), device)


def check_bias_and_dtype(
    bias: Tensor | None, n: int, out_dtype: torch.dtype, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Raise a ValueError unless bias is None or a float [n], and out_dtype one of dtypes."""
    if bias is not None:
        check_tensor("bias", bias, FLOATS, (n,), device)
    if out_dtype not in dtypes:
        raise ValueError(f"out_dtype: got {out_dtype}, expected one of {', '.join(map(str, dtypes))}")


def check_group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """Raise a ValueError unless an image x [B, C, H, W] has this group norm."""
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: got {groups} for {x.shape[1]} channels, expected a number that divides them")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: got {eps}, expected a number that is not negative")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_tensor(name, vector, (x.dtype,), (x.shape[1],), x.device)


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


def check_levels(levels: int) -> None:
    """Raise a ValueError unless `levels` is a largest activation code that int8 holds."""
    if not 1 <= levels <= 127:
        raise ValueError(f"levels: got {levels}, expected 1 to 127: 2^(b - 1) - 1 for b bits")
