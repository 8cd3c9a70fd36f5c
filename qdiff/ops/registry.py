"""Operators as torch sees them: `torch.ops.qdiff.*`, with a fake for tracing.

`torch.library.custom_op` does the same at 12 us a call; this takes 3 us, and 1 us by the shortcut, which matters for
the hundreds of small layers of a denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from qdiff.ops._shortcut import with_shortcut

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_BELOW_VIEWS = torch._C._after_ADInplaceOrView_keyset
_DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)

_LIBRARY = torch.library.Library("qdiff", "DEF")


def operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a function the operator `torch.ops.qdiff.<its name>`; the name then stands for a call of it.

    The schema comes from the annotations, which must be types (no `from __future__ import annotations`). The first
    argument is a tensor; when it is on a CUDA device, that is the current one while the function runs.

    Operators have no gradient: a backward pass that reaches one raises a RuntimeError.

    Args:
        fake: makes the result's tensors, uninitialized, from the same arguments.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name, run = function.__name__, _on_its_device(function)
        # Integer arguments are a layer's constants, never traced; plain ones are also quicker to hand over.
        schema = torch.library.infer_schema(function, mutates_args=()).replace("SymInt", "int")
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        overload: Callable[..., Any] = getattr(torch.ops.qdiff, name).default
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, _without_gradient(overload, run), "Autograd", with_keyset=True)
        torch.library.register_fake(f"qdiff::{name}", fake, lib=_LIBRARY)
        overload.__doc__ = function.__doc__
        return wraps(function)(with_shortcut(name, overload))

    return register


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        index = args[0].get_device()
        if index < 0 or index == torch._C._cuda_getDevice():
            return function(*args)
        with torch.cuda.device(index):
            return function(*args)

    return run


def _without_gradient(overload: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    # Without this, results that depend on a trainable input would have no gradient and torch would at best warn.
    def run(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for value in args:  # `any` takes twice as long
                if isinstance(value, Tensor) and value.requires_grad:
                    return _NoGradient.apply(overload, keyset & _BELOW_AUTOGRAD, *args)
        # Going back to the dispatcher would cost as much again as coming here.
        if _leads_to_the_device(keyset):
            return function(*args)
        return _call_below(overload, keyset & _BELOW_AUTOGRAD, args)

    return run


_known_keysets: dict[int, bool] = {}


def _leads_to_the_device(keyset: Any) -> bool:
    """Whether nothing but the function comes next: neither tracing nor a mode wants to see the operator."""
    number = keyset.raw_repr()
    known = _known_keysets.get(number)
    if known is None:
        known = _known_keysets[number] = (keyset & _BELOW_VIEWS).highestPriorityTypeId() in _DEVICES
    return known


def _call_below(overload: Any, keyset: Any, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset, *args)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, overload: Any, keyset: Any, *args: Any) -> Any:
        ctx.operator = overload
        return _call_below(overload, keyset, args)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{ctx.operator} has no gradient: quantized layers are for inference")
