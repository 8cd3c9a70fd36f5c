"""Quantizers that compute what comes before them too, at the shapes of SDXL (batch 2, 128 x 128 latents) and FLUX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench.timing import copies_for, race
from qdiff import ops
from qdiff.ops.activation import activate

Row = dict[str, Any]
_Call = Callable[[Tensor], Any]


def fused() -> Iterator[Row]:
    """One kernel, or two, against torch's own and then a quantizer; and against torch's alone, as a float model has."""
    for name, x, call, before, quantize in _cases():
        copies = copies_for(2 * x.numel())
        inputs = [torch.randn_like(x) for _ in range(copies)]
        competitors = {
            "fused": lambda i, inputs=inputs, call=call: call(inputs[i]),
            "apart": lambda i, inputs=inputs, before=before, quantize=quantize: quantize(before(inputs[i])),
            "torch": lambda i, inputs=inputs, before=before: before(inputs[i]),
        }
        timings = race(competitors, copies)
        yield {"name": name, "us": {key: timing.us for key, timing in timings.items()}}


def _cases() -> Iterator[tuple[str, Tensor, _Call, _Call, _Call]]:
    """Name, input, both at once, what comes first, and the quantizer."""
    half = torch.float16

    def per_token(x: Tensor, activation: str = "none") -> Any:
        return ops.quantize_per_token(x, None, None, 127, activation)

    for rows, k, activation in ((2048, 5120, "geglu"), (8192, 2560, "geglu"), (4608, 12288, "gelu_tanh")):
        x = torch.empty(rows, k * (2 if activation == "geglu" else 1), device="cuda", dtype=half)
        yield (
            f"{activation} {rows}x{k}",
            x,
            lambda x, a=activation: per_token(x, a),
            lambda x, a=activation: activate(x, a),
            per_token,
        )
    for rows, k in ((2048, 1280), (8192, 640)):
        x, weight = torch.empty(rows, k, device="cuda", dtype=half), torch.ones(k, device="cuda", dtype=half)
        yield (
            f"layer_norm {rows}x{k}",
            x,
            lambda x, w=weight: ops.quantize_layer_norm(x, w, w, 1e-5, None),
            lambda x, k=k, w=weight: F.layer_norm(x, (k,), w, w),
            per_token,
        )
    for side, channels in ((128, 320), (64, 640), (32, 1280)):
        x = torch.empty(2, channels, side, side, device="cuda", dtype=half, memory_format=torch.channels_last)
        weight, scale = torch.ones(channels, device="cuda", dtype=half), torch.full((1, 1), 0.03, device="cuda")
        yield (
            f"group_norm, silu 2x{side}x{side} {channels}",
            x,
            lambda x, c=channels, w=weight, s=scale: ops.quantize_group_norm(x, 32, w, w, 1e-5, True, s, None, [c]),
            lambda x, w=weight: F.silu(F.group_norm(x, 32, w, w)),
            lambda x, c=channels, s=scale: ops.quantize_per_sample(x, s, None, [c], 1),
        )
