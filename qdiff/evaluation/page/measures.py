"""What each record's name means to a reader: its label, which direction is better, and how its value is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LIKENESS = "Likeness to the reference, picture by picture"
DISTRIBUTION = "Likeness of all pictures together"
TEXT = "Agreement with the prompt"
GROUPS = "For whom"
COST = "Cost"
FAILURES = "Failures"
OTHER = "Other figures"
FAMILIES = (LIKENESS, DISTRIBUTION, TEXT, GROUPS, COST, FAILURES, OTHER)

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Measure:
    """How a record is shown. label: with the unit, unless `write` puts it beside the value."""

    label: str
    family: str
    better: Better
    write: Callable[[float], str]

    def value(self, value: float) -> str:
        """Return the value with its unit."""
        return " ".join(filter(None, [self.write(value), self.label.partition(", ")[2]]))

    @property
    def title(self) -> str:
        """The label without its unit."""
        return self.label.partition(", ")[0]

    @property
    def arrow(self) -> str:
        """The direction that is better, as a sign; empty where neither is."""
        return {"higher": "↑", "lower": "↓", "neither": ""}[self.better]

    def worse(self, value: float, other: float) -> bool:
        """Whether `value` is worse than `other`; never where no direction is better."""
        return {"higher": value < other, "lower": value > other, "neither": False}[self.better]


def measure_of(name: str) -> Measure:
    """Return how records of this name are shown; a name that is not known is shown as it is, without a direction."""
    for ending, derive in _DERIVED.items():
        if name.endswith(ending):
            return derive(measure_of(name.removesuffix(ending)))
    for beginning, measure in _MEASURES.items():
        if name == beginning or name.startswith(f"{beginning}_"):
            variant = name.removeprefix(beginning).replace("_", " ").strip()
            return dataclasses.replace(measure, label=f"{measure.label} ({variant})") if variant else measure
    return Measure(name.replace("_", " "), OTHER, "neither", _WRITTEN_BY_UNIT.get(name.rpartition("_")[2], significant))


def order_of(name: str) -> tuple[int, int, str]:
    """Return the key that sorts names as the page shows them."""
    place = next((i for i, beginning in enumerate(_MEASURES) if name.startswith(beginning)), len(_MEASURES))
    return FAMILIES.index(measure_of(name).family), place, name


def decimals(digits: int) -> Callable[[float], str]:
    """Return what writes a value with so many digits after the point."""
    return lambda value: f"{value:.{digits}f}" if math.isfinite(value) else ("∞" if value > 0 else "-∞")


def significant(value: float) -> str:
    """Three significant digits, never in scientific notation where plain digits are short."""
    if not math.isfinite(value) or value == 0:
        return decimals(0)(value)
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(digits, 0)}f}" if digits < 7 else f"{value:.2e}"


def percent(value: float) -> str:
    """A fraction in percent, three significant digits."""
    return f"{significant(100 * value)} %"


def memory(value: float) -> str:
    """Bytes, with a decimal unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def duration(value: float) -> str:
    """Seconds, in a unit that needs few digits."""
    if value < 1e-3:
        return f"{significant(value * 1e6)} µs"
    return f"{significant(value * 1e3)} ms" if value < 1 else f"{significant(value)} s"


def probability(value: float) -> str:
    """A p-value: three decimals, or that it is below them."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


_Derivation = Callable[[Measure], Measure]


def _derived(what: str, family: str, better: Better | None, write: Callable[[float], str] | None) -> _Derivation:
    """What is said of another measure; None keeps that measure's own direction and writing, with its unit."""

    def derive(base: Measure) -> Measure:
        unit = base.label.removeprefix(base.title) if write is None else ""
        return Measure(f"{base.title}: {what}{unit}", family, better or base.better, write or base.write)

    return derive


# By the ending of the record's name.
_DERIVED: dict[str, _Derivation] = {
    "_worst_group": _derived("worst group", GROUPS, None, None),
    "_group_gap": _derived("gap between groups", GROUPS, "lower", None),
    "_group_p_value": _derived("p-value that all groups lose alike", GROUPS, "neither", probability),
    "_identical": _derived("identical pictures, not in the mean", LIKENESS, "neither", _count),
    "_reference_left_out": _derived("reference pictures without a figure", FAILURES, "lower", _count),
    "_left_out": _derived("pictures without a figure", FAILURES, "lower", _count),
}
_WRITTEN_BY_UNIT = {"bytes": memory, "seconds": duration}
# By the record's name, or how it begins before an underscore; in the order of the page's table.
_MEASURES = {
    "psnr_db": Measure("PSNR, dB", LIKENESS, "higher", decimals(1)),
    "ssim": Measure("SSIM", LIKENESS, "higher", decimals(3)),
    "ms_ssim": Measure("MS-SSIM", LIKENESS, "higher", decimals(3)),
    "lpips": Measure("LPIPS", LIKENESS, "lower", decimals(3)),
    "latent_relative_error": Measure("Relative error of the last latents", LIKENESS, "lower", percent),
    "denoiser_relative_error": Measure("Relative error of the denoiser", LIKENESS, "lower", percent),
    "fid": Measure("FID", DISTRIBUTION, "lower", decimals(2)),
    "kid": Measure("KID", DISTRIBUTION, "lower", significant),
    "fd": Measure("Fréchet distance", DISTRIBUTION, "lower", significant),
    "kd": Measure("Kernel distance", DISTRIBUTION, "lower", significant),
    "inception_score": Measure("Inception Score", DISTRIBUTION, "higher", decimals(2)),
    "precision": Measure("Precision", DISTRIBUTION, "higher", decimals(3)),
    "recall": Measure("Recall", DISTRIBUTION, "higher", decimals(3)),
    "clip_score": Measure("CLIP score", TEXT, "higher", decimals(2)),
    "image_reward": Measure("ImageReward", TEXT, "higher", decimals(3)),
    "pick_score": Measure("PickScore", TEXT, "higher", decimals(2)),
    "stored_bytes": Measure("Stored for the denoiser", COST, "lower", memory),
    "disk_bytes": Measure("On disk", COST, "lower", memory),
    "peak_memory_bytes": Measure("Peak memory", COST, "lower", memory),
    "resident_memory_bytes": Measure("Resident memory", COST, "lower", memory),
    "seconds_per_image": Measure("Time an image", COST, "lower", duration),
    "seconds_per_step": Measure("Time a step", COST, "lower", duration),
    "cold_start_seconds": Measure("Cold start", COST, "lower", duration),
    "joules_per_image": Measure("Energy an image, J", COST, "lower", significant),
    "flops_of_ceiling": Measure("FLOP/s of the device's measured ceiling", COST, "higher", percent),
    "pictures_black": Measure("Black pictures", FAILURES, "lower", _count),
    "pictures_nan": Measure("Pictures with NaN", FAILURES, "lower", _count),
}
