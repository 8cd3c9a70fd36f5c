"""Floating-point operations of a module, and how many of them the device does a second at best.

A quantized layer counts as the float one would: what it saves shows as speed, not as less work.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Sides of the square product that the ceiling is measured on. Larger ones measured no faster on an H200.
GPU_SIDE, CPU_SIDE = 8192, 1024
_REPEATS = 5


@contextmanager
def count_first_call(module: nn.Module) -> Iterator[list[int]]:
    """Count the operations of the first call of `module` while the context is open: a list of one number, in the end.

    A multiplication and the addition that follows are two operations; elementwise ones are not counted.
    """
    counts: list[int] = []
    counter = FlopCounterMode(display=False, custom_mapping=_quantized_operators())

    def before(*_: Any) -> None:
        if not counts:
            counter.__enter__()

    def after(*_: Any) -> None:
        if not counts:
            counter.__exit__(None, None, None)
            counts.append(counter.get_total_flops())

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Ceilings:
    """How many operations a second a device does at best, measured once for each device and dtype."""

    measured: dict[tuple[str, str], float] = field(default_factory=dict)

    def of(self, device: torch.device, dtype: str) -> float:
        """Return the ceiling of arithmetic in a dtype, by its name ("torch.float16")."""
        key = (str(device), dtype)
        if key not in self.measured:
            self.measured[key] = matmul_flops_per_second(device, getattr(torch, dtype.removeprefix("torch.")))
        return self.measured[key]


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations a second of a large square matrix product, the best of five."""
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    best = min(_seconds(lambda: a @ b, device) for _ in range(1 + _REPEATS))
    return 2 * side**3 / best


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _quantized_operators() -> dict[Any, Callable[..., int]]:
    """By name, from torch's registry: nothing here knows who registered them."""
    registered = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("qdiff::")}
    found: dict[Any, Callable[..., int]] = {}
    for name in sorted(registered):
        operator = getattr(torch.ops.qdiff, name.removeprefix("qdiff::"))
        if name.endswith("_linear"):
            found[operator] = _linear_flops
        elif name.endswith("_conv2d"):
            arguments = [argument.name for argument in operator.default._schema.arguments]
            found[operator] = functools.partial(_conv_flops, arguments.index("kernel"))
    return found


def _linear_flops(*shapes: Any, out_shape: Any) -> int:
    return 2 * math.prod(shapes[0]) * int(out_shape[-1])


def _conv_flops(kernel: int, *shapes: Any, out_shape: Any) -> int:
    return 2 * math.prod(out_shape) * int(shapes[0][1]) * math.prod(shapes[kernel])
