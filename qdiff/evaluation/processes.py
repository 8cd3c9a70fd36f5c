"""The processes that share the work, however they were launched (`accelerate launch`, `torchrun`, or one alone)."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import torch

# One process reduces, measures costs and writes the report while the others wait; the default is ten minutes.
PATIENCE = timedelta(hours=12)


class Processes(Protocol):
    """What is used of accelerate's `Accelerator` and `PartialState`."""

    @property
    def num_processes(self) -> int: ...
    @property
    def process_index(self) -> int: ...
    @property
    def is_main_process(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    def wait_for_everyone(self) -> None: ...


def this_process() -> Processes:
    """Return accelerate's view of this process, joining the others where it was launched with some."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Asked for the CPU, or left with it: without being told, it would not join processes that have no accelerator.
    accelerators = (torch.cuda, torch.xpu, torch.backends.mps)
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not any(kind.is_available() for kind in accelerators)
    state: Processes = PartialState(cpu=cpu, timeout=PATIENCE)
    return state
