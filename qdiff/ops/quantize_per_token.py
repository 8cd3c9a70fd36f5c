"""int8 activations with one dynamic scale a token."""

import torch
from torch import Tensor

from qdiff.numerics.ranges import LEVELS
from qdiff.ops.checks import FLOATS, check_tensor
from qdiff.ops.row_blocks import row_blocks

# Below this largest magnitude 127 / absmax would overflow float32; such rows get the step of this magnitude.
_SMALLEST_ABSMAX = 1e-30


@torch.library.custom_op("qdiff::quantize_per_token", mutates_args=())
def quantize_per_token(x: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize every row of x * smooth to int8 with its own scale.

    With v = x * smooth in float32 and a = max |v| over a row: scale = a / 127, code = round(v * (127 / a)), half to
    even. It should be the case that |v - code * scale| <= scale / 2 (1 + 2^-14), that a row's largest magnitude has
    code +-127, and that zeros have code 0. A row of zeros has scale 1. A row with NaN or infinity has a NaN or infinite
    scale, so it stays visible in the product.

    Args:
        x: float32, float16 or bfloat16 [..., K], any strides.
        smooth: float32 [K], the *reciprocal* of SmoothQuant's vector s (arXiv 2211.10438, equation 3), or None.

    Returns:
        codes int8 [..., K] in [-127, 127], contiguous, and scale float32 [...].
    """
    _check(x, smooth)
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    for block in row_blocks(rows.shape[0], 4 * rows.shape[1], x.device):
        codes[block], scale[block] = _quantize(rows[block], smooth)
    return codes.view(x.shape), scale.view(x.shape[:-1])


def _quantize(x: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    v = x.float() if smooth is None else x * smooth
    absmax = v.abs().amax(dim=1, keepdim=True)
    step = absmax.clamp_min(_SMALLEST_ABSMAX)
    # v is ours to overwrite unless it is x itself; a second temporary of its size costs more than the arithmetic.
    codes = (v * (LEVELS / step) if v is x else v.mul_(LEVELS / step)).round_()
    scale = torch.where(absmax == 0, 1.0, step / LEVELS)
    return codes, scale[:, 0]


@quantize_per_token.register_fake
def _(x: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def _check(x: Tensor, smooth: Tensor | None) -> None:
    if x.dtype not in FLOATS or x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, expected a float tensor [..., K] with K > 0")
    if smooth is not None:
        check_tensor("smooth", smooth, [torch.float32], [x.shape[-1]], x.device)
