"""The processes that share the work, however they were launched (`accelerate launch`, `torchrun`, or one alone)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

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


@dataclass(frozen=True)
class Joined:
    """Processes that share the work and meet over the network, whatever they compute on; GPUs may be shared."""

    state: Any

    @property
    def num_processes(self) -> int:
        return int(self.state.num_processes)

    @property
    def process_index(self) -> int:
        return int(self.state.process_index)

    @property
    def is_main_process(self) -> bool:
        return bool(self.state.is_main_process)

    @property
    def device(self) -> torch.device:
        return self.state.device  # type: ignore[no-any-return]

    def wait_for_everyone(self) -> None:
        """Return when every process has called this.

        Raises:
            ConnectionError: one of them has ended, or did not come for `PATIENCE`.
        """
        try:
            torch.distributed.monitored_barrier(timeout=PATIENCE)
        except RuntimeError as error:
            raise ConnectionError(
                f"process {self.process_index} of {self.num_processes} waited in vain: another has ended before its "
                "work was done, and its own message says why; what was made is kept: run the same command again and it "
                "goes on where it was"
            ) from error


def this_process() -> Processes:
    """Return this process's place among those that it was launched with, joining them the first time.

    They meet over gloo: NCCL, which nothing else here needs, refuses two processes on one GPU, and leaves those that
    wait for one that was killed waiting. Several processes on one GPU share it.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Asked for the CPU, or left with it: without being told, it would not join processes that have no accelerator.
    accelerators = (torch.cuda, torch.xpu, torch.backends.mps)
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not any(kind.is_available() for kind in accelerators)
    by_gloo = {"backend": "gloo"} if "LOCAL_RANK" in os.environ and not cpu else {}  # on a CPU it always is
    state: Any = PartialState(cpu=cpu, timeout=PATIENCE, **by_gloo)
    meets_by_gloo = torch.distributed.is_initialized() and "gloo" in torch.distributed.get_backend()
    return Joined(state) if meets_by_gloo else state
