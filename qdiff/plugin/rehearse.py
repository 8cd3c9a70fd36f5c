"""First calls of a denoiser: the kernels that they miss are compiled together, while one is in the middle of it."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.dropout import _DropoutNd

from qdiff.ops import rehearsal

# Whose modules compute the same however often they are called. Others' may count their calls.
_STATELESS = {"torch", "diffusers", "peft", "qdiff"}


def rehearse_first_calls(denoiser: nn.Module) -> None:
    """Have a call of the denoiser that finds a kernel missing rehearsed (`qdiff.ops.rehearsal`), where nobody notices.

    Modules and attention processors of packages that are not known to keep nothing of a call might, hooks, whatever
    replaces a `forward`, as most kinds of offloading do, and users of random numbers, where dropout is at work. With
    those, kernels are compiled one by one.
    """
    denoiser.register_forward_pre_hook(_begin, with_kwargs=True)
    denoiser.register_forward_hook(_end, always_call=True)


def _begin(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        rehearsal.expect(partial(_call, denoiser, args, kwargs))


def _end(denoiser: nn.Module, args: object, output: object) -> None:
    if not torch.compiler.is_compiling():
        rehearsal.expect(None)


def _call(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _keeps_nothing(denoiser):
        denoiser.forward(*args, **kwargs)  # without hooks: those of its own have run


def _keeps_nothing(denoiser: nn.Module) -> bool:
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    for module in denoiser.modules():
        own = vars(module)
        # A model that is moved to the GPU as a whole is there when a kernel is missing.
        if "forward" in own and (module is not denoiser or type(own.get("_hf_hook")).__name__ != "CpuOffload"):
            return False
        if not all(_package(part) in _STATELESS for part in (type(module), type(own.get("processor", module)))):
            return False
        hooks = chain(own["_forward_pre_hooks"].values(), own["_forward_hooks"].values())
        if not all(_package(hook) == "qdiff" for hook in hooks):
            return False
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:  # draws random numbers
            return False
    return True


def _package(thing: object) -> str:
    return str(getattr(thing, "__module__", "")).partition(".")[0]
