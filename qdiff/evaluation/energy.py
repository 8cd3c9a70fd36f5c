"""Joules that a device used, where it can say so: NVML on NVIDIA GPUs, RAPL on CPUs whose counters may be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")

# Reads a counter, in joules; only differences of it mean something.
Counter = Callable[[], float]


def energy_counter(device: torch.device, rapl: Path = RAPL) -> Counter | str:
    """Return a function that reads the device's energy counter, or why there is none.

    A GPU's counter is of the whole board; RAPL's are of whole processor packages, whatever else runs on them.
    """
    return _nvml_counter(device) if device.type == "cuda" else _rapl_counter(rapl)


def _nvml_counter(device: torch.device) -> Counter | str:
    try:
        import pynvml
    except ImportError:
        return "needs NVML's Python bindings: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return f"NVML has no energy counter for {device}: {error}"

    def read() -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3  # millijoules

    return read


def _rapl_counter(rapl: Path) -> Counter | str:
    packages = [zone for zone in sorted(rapl.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    if not packages:
        return f"no RAPL counters in {rapl}"
    try:
        ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in packages]
        last = [int((zone / "energy_uj").read_text()) for zone in packages]
    except OSError as error:
        return f"RAPL counters cannot be read: {error}"
    total = 0

    def read() -> float:
        nonlocal total
        for index, zone in enumerate(packages):
            now = int((zone / "energy_uj").read_text())
            total += (now - last[index]) % (ranges[index] + 1)  # it starts at 0 again after its range
            last[index] = now
        return total / 1e6  # microjoules

    return read
