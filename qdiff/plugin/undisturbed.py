"""Running a pipeline for its own sake, and leaving nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import nn


@contextmanager
def undisturbed(pipe: DiffusionPipeline) -> Iterator[None]:
    """Runs the pipeline in evaluation mode, and puts back everything that a run of it changes.

    That is: training flags, the scheduler's timesteps and history, the attributes that `__call__` leaves on the
    pipeline, the progress bar's settings, and torch's global random state.
    """
    modules = [module for part in pipe.components.values() if isinstance(part, nn.Module) for module in part.modules()]
    training = [(module, module.training) for module in modules]
    schedulers = [part for part in pipe.components.values() if hasattr(part, "set_timesteps")]
    states = [(scheduler, copy.deepcopy(vars(scheduler))) for scheduler in schedulers]
    attributes = dict(vars(pipe))
    random_state = torch.get_rng_state()
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for owner, state in [*states, (pipe, attributes)]:
            vars(owner).clear()
            vars(owner).update(state)
        torch.set_rng_state(random_state)
