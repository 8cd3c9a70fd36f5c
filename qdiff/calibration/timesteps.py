"""The timesteps that a calibration run visits, in a bounded number of bins."""

from __future__ import annotations

import math

# A table row costs memory in every layer; 64 rows follow any smooth function of the noise level closely.
MAX_TIMESTEPS = 64


class TimestepBins:
    """Bins for the timestep values of a run: every distinct value has its own, until there are more than `capacity`.

    From then on values share bins of equal width, the width doubling as often as needed. It should be the case that the
    bins depend on the sequence of values alone, and that there are never more than `capacity`.
    """

    def __init__(self, capacity: int = MAX_TIMESTEPS) -> None:
        self.capacity = capacity
        self._width = 0.0
        self._sums: dict[float, tuple[float, int]] = {}

    def add(self, value: float) -> tuple[float, dict[float, float] | None]:
        """The bin of a value; and, when bins had to be joined for it, each old bin's new one."""
        key = self._bin(value)
        total, count = self._sums.get(key, (0.0, 0))
        self._sums[key] = (total + value, count + 1)
        moved = self._join() if len(self._sums) > self.capacity else None
        return (moved[key] if moved else key), moved

    def value(self, key: float) -> float:
        """What stands for a bin: the mean of the values that fell into it."""
        total, count = self._sums[key]
        return total / count

    def _bin(self, value: float) -> float:
        # Six digits are what float32, the type of the table's grid, is sure to tell apart.
        return float(f"{value:.6g}") if self._width == 0 else math.floor(value / self._width) * self._width

    def _join(self) -> dict[float, float]:
        moved = {key: key for key in self._sums}
        while len(self._sums) > self.capacity:
            values = {key: self.value(key) for key in self._sums}
            span = max(values.values()) - min(values.values())
            self._width = 2 * self._width or span / self.capacity
            sums: dict[float, tuple[float, int]] = {}
            for key, (total, count) in self._sums.items():
                old_total, old_count = sums.get(self._bin(values[key]), (0.0, 0))
                sums[self._bin(values[key])] = (old_total + total, old_count + count)
            after = {key: self._bin(values[key]) for key in self._sums}
            moved = {first: after[last] for first, last in moved.items()}
            self._sums = sums
        return moved
