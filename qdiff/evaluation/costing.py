"""What drawing costs: seconds, memory, joules, and the share of the device's arithmetic that is used.

A pipeline in a folder is measured in a fresh process, `python -m qdiff.evaluation.costing`, so that nothing else is in
its memory, and so that its cold start is one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qdiff.evaluation.cost import half_precision_bytes
from qdiff.evaluation.energy import energy_counter
from qdiff.evaluation.flops import Ceilings, count_first_call
from qdiff.evaluation.generation import Generation, draw
from qdiff.evaluation.prompts import Item
from qdiff.evaluation.report import Record
from qdiff.evaluation.sources import PipelineSource, denoiser_of
from qdiff.evaluation.timing import median_and_range, step_marks, wait_for

RUNS = 3
# NVML's counter moves every 20 to 100 ms: a second of work is known to a tenth or better.
SECONDS_OF_WORK = 1.0
# Of the launcher: a process of its own must not join the others' group.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FRESH = "known of a pipeline's folder alone: it takes a fresh process"


@dataclass
class Costs:
    """samples: of each figure, one value or several repetitions.  not_measured: why a figure is missing.

    about: the device, the dtype and the batch of all figures.  flops_per_second: what the denoiser does, a quantized
    layer counted as the float one.  ceiling: what `flops_of_ceiling` is a part of.
    """

    samples: dict[str, list[float]] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    flops_per_second: float = 0.0
    ceiling: str = ""

    def compare_with(self, ceilings: Ceilings, device: torch.device) -> None:
        """Add `flops_of_ceiling`, for the device and the dtype that were measured."""
        ceiling = ceilings.of(device, self.about["dtype"])
        self.samples["flops_of_ceiling"] = [self.flops_per_second / ceiling]
        self.ceiling = f"{ceiling / 1e12:.3g} TFLOP/s, a square product in {self.about['dtype']}"

    def records(self, tags: Mapping[str, str]) -> list[Record]:
        """The median of each figure; `low` and `high` are its smallest and largest repetition."""
        of_all = [
            Record(name, *median_and_range(values), len(values), dict(tags), dict(self.about))
            for name, values in self.samples.items()
        ]
        return [
            record.sourced({"ceiling": self.ceiling}) if record.name == "flops_of_ceiling" else record
            for record in of_all
        ]


def measure_costs(pipe: Any, items: Sequence[Item], generation: Generation) -> Costs:
    """Draw `items` as one batch, once to warm up and then at least three times, and return what that takes."""
    device, denoiser = pipe.device, denoiser_of(pipe)
    dtype = str(next(denoiser.parameters()).dtype)
    costs = Costs(about={"device": _device_name(device), "dtype": dtype, "batch": str(len(items))})
    costs.samples["stored_bytes"] = [float(half_precision_bytes(denoiser))]
    draw(pipe, items, generation)
    counter = energy_counter(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, steps = _timed(pipe, items, generation, costs, counter)
    costs.samples["seconds_per_image"] = [value / len(items) for value in seconds]
    costs.samples["seconds_per_step"] = steps
    if device.type == "cuda":
        costs.samples["peak_memory_bytes"] = [float(torch.cuda.max_memory_allocated(device))]
    else:
        costs.not_measured["peak_memory_bytes"] = _FRESH
    costs.flops_per_second = _operations(pipe, items, generation) / median_and_range(steps)[0]
    return costs


def _timed(
    pipe: Any, items: Sequence[Item], generation: Generation, costs: Costs, counter: Any
) -> tuple[list[float], list[float]]:
    """Seconds of each run and of each step, and the joules, which are of all runs together."""
    runs: list[float] = []
    steps: list[float] = []
    before = None if isinstance(counter, str) else counter()
    while len(runs) < RUNS or (before is not None and sum(runs) < SECONDS_OF_WORK):
        wait_for(pipe.device)
        started = time.perf_counter()
        with step_marks(pipe.scheduler, pipe.device) as marks:
            draw(pipe, items, generation)
        wait_for(pipe.device)
        runs.append(time.perf_counter() - started)
        steps += marks.seconds()
    if before is None:
        costs.not_measured["joules_per_image"] = str(counter)
    else:
        costs.samples["joules_per_image"] = [(counter() - before) / len(runs) / len(items)]
    if not steps:  # one step has no other to be measured from
        steps = [run / generation.steps for run in runs]
    return runs, steps


def _operations(pipe: Any, items: Sequence[Item], generation: Generation) -> int:
    """Of one call of the denoiser."""
    with count_first_call(denoiser_of(pipe)) as counts:
        draw(pipe, items, dataclasses.replace(generation, steps=min(2, generation.steps)))
    return counts[0]


def costs_of_folder(
    source: PipelineSource, items: Sequence[Item], generation: Generation, device: torch.device
) -> Costs:
    """Measure a pipeline's folder in a fresh process.

    Raises:
        RuntimeError: the process failed; its last words are in the message.
    """
    assert source.folder is not None
    task = {
        "folder": str(source.folder),
        "dtype": source.dtype,
        "device": str(device),
        "items": [[item.prompt, item.seed, item.negative_prompt] for item in items],
        "generation": dataclasses.asdict(generation),
        "started": time.time(),
    }
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "qdiff.evaluation.costing"]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = "\n".join((done.stderr.strip() or "no message").splitlines()[-3:])
        raise RuntimeError(f"measuring the cost of {source.name} failed with exit code {done.returncode}: {last}")
    costs = Costs(**json.loads(done.stdout.splitlines()[-1]))
    costs.samples["disk_bytes"] = [
        float(sum(path.stat().st_size for path in source.folder.rglob("*") if path.is_file()))
    ]
    return costs


def main() -> None:
    """What the fresh process does: one picture as soon as it can, then the batch."""
    task = json.loads(sys.stdin.read())
    items = [Item(index, prompt, seed, None, negative) for index, (prompt, seed, negative) in enumerate(task["items"])]
    generation, device = Generation(**task["generation"]), torch.device(task["device"])
    pipe = PipelineSource("candidate", Path(task["folder"]), task["dtype"]).load(device)
    resident = float(torch.cuda.memory_allocated(device)) if device.type == "cuda" else _process_bytes("VmRSS")
    draw(pipe, items[:1], generation)
    wait_for(device)
    cold = time.time() - task["started"]
    costs = measure_costs(pipe, items, generation)
    costs.samples["cold_start_seconds"] = [cold]
    costs.samples["resident_memory_bytes"] = [resident]
    if device.type != "cuda":
        del costs.not_measured["peak_memory_bytes"]
        costs.samples["peak_memory_bytes"] = [_process_bytes("VmHWM")]
    print(json.dumps(dataclasses.asdict(costs)))


def _process_bytes(field: str) -> float:
    """Of this process, all of it, Python and the libraries too: resident now (VmRSS), or at most (VmHWM)."""
    # Not getrusage: its maximum is inherited from the parent.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return 1024 * float(line.split()[1])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
