"""Whether a module may be left out by a block that does the module's work itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


def are_plain(*modules: nn.Module) -> bool:
    """Whether nobody listens to calls of these modules or replaces their `forward`: no hooks, of their own or for all
    modules, and none of the wrappers that offloaders put over `forward`."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    for module in modules:
        own = module.__dict__  # at every call of every block: attributes would take twice as long
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            return False
    return True


def drops_nothing(module: nn.Module) -> bool:
    """Whether it is a dropout that has no effect."""
    return type(module) is nn.Dropout and (module.p == 0 or not module.training)


def is_inference(x: Tensor) -> bool:
    """Whether what is computed of x has no gradient, and the dtype of x."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
