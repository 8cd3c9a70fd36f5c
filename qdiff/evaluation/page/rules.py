"""What a verdict is made of: rules that state their limits, and what each finds of a candidate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from qdiff.evaluation.page.measures import TEXT, measure_of
from qdiff.evaluation.page.plots import chance_of
from qdiff.evaluation.page.sheet import Sheet
from qdiff.evaluation.report import Record


class Outcome(IntEnum):
    """What a rule says, the worst last."""

    NOT_MEASURED = 0
    SHIP = 1
    LOOK = 2
    STOP = 3


@dataclass(frozen=True)
class Finding:
    """What one rule found. says: in plain words, with the figures."""

    outcome: Outcome
    says: str


@dataclass(frozen=True)
class Rule:
    """title: what is judged.  statement: when it says ship, look closer and do not ship.  judge: of a candidate."""

    title: str
    statement: str
    judge: Callable[[Sheet, str], Finding]


# Chosen, not measured. At 25 dB two pictures differ by 6 % of the range (root mean square), at 15 dB by 18 %.
PSNR_LIKE, PSNR_UNLIKE = 25.0, 15.0
LPIPS_LIKE, LPIPS_UNLIKE = 0.1, 0.4
# With no failure among n pictures, at most 3 / n of all fail (95 %, the "rule of three"): 100 leave 3 %.
ENOUGH = 100
GROUP_GAP_DB, GROUP_P = 3.0, 0.01


def _failures(sheet: Sheet, candidate: str) -> Finding:
    counts = {"black": sheet.record("pictures_black", candidate), "NaN": sheet.record("pictures_nan", candidate)}
    found = {what: int(record.value) for what, record in counts.items() if record}
    if not found:
        return Finding(Outcome.NOT_MEASURED, "Black pictures and NaN were not counted.")
    if any(found.values()):
        return Finding(Outcome.STOP, f"Broken pictures: {', '.join(f'{n} {what}' for what, n in found.items() if n)}.")
    return Finding(Outcome.SHIP, "No broken picture.")


def _number(sheet: Sheet, candidate: str) -> Finding:
    sizes = [record.n for name in PAIRED for record in [sheet.record(name, candidate)] if record]
    if not sizes:
        return Finding(Outcome.LOOK, "No picture was compared with its reference (no PSNR, no LPIPS).")
    n = max(sizes)
    unseen = (
        f"a fault in fewer than 1 of {n / 3:,.0f} may have gone unseen"
        if n >= 6
        else "too few to see any but gross faults"
    )
    if n < ENOUGH:
        return Finding(Outcome.LOOK, f"Only {n} picture{'s' * (n > 1)}: {unseen}.")
    return Finding(Outcome.SHIP, f"{n:,} pictures: {unseen}.")


def _within(like: float, unlike: float, name: str) -> Callable[[Sheet, str], Finding]:
    """Compare a whole interval with two limits: all on the good side of the first, or all beyond the second."""

    def judge_likeness(sheet: Sheet, candidate: str) -> Finding:
        record, measure = sheet.record(name, candidate), measure_of(name)
        if record is None:
            return Finding(Outcome.NOT_MEASURED, f"{measure.title} was not measured.")
        worst, best = (record.low, record.high) if measure.better == "higher" else (record.high, record.low)
        if _has_interval(record) and measure.worse(best, unlike):
            return Finding(Outcome.STOP, f"{_figure(record)}: beyond the limit of {unlike:g}.")
        if measure.worse(worst, like):
            return Finding(Outcome.LOOK, f"{_figure(record)}: not all of the interval reaches {like:g}.")
        return Finding(Outcome.SHIP, f"{_figure(record)}.")

    return judge_likeness


def _groups(sheet: Sheet, candidate: str) -> Finding:
    gap, p_value, worst = (
        sheet.record(f"psnr_db_{part}", candidate) for part in ("group_gap", "group_p_value", "worst_group")
    )
    if gap is None or p_value is None:
        return Finding(Outcome.NOT_MEASURED, "Groups were not compared.")
    name = f" ({gap.provenance['worst']})" if "worst" in gap.provenance else ""
    says = f"{gap.value:.1f} dB between the best and the worst group{name}, {chance_of(p_value)}"
    if worst and _has_interval(worst) and worst.high < PSNR_UNLIKE:
        limit = f"beyond the limit of {PSNR_UNLIKE:g}"
        return Finding(Outcome.STOP, f"{_figure(worst)}{name}: {limit}.")
    if gap.value > GROUP_GAP_DB and p_value.value < GROUP_P:
        return Finding(Outcome.LOOK, f"Some lose more than others: {says}.")
    return Finding(Outcome.SHIP, f"{says}.")


def _prompt(sheet: Sheet, candidate: str) -> Finding:
    compared = False
    for name in sheet.names:
        before, after = sheet.record(name, sheet.reference), sheet.record(name, candidate)
        if measure_of(name).family != TEXT or before is None or after is None:
            continue
        compared = True
        if after.high < before.low:
            return Finding(
                Outcome.LOOK, f"{_figure(after)}, below the reference's {measure_of(name).write(before.low)}."
            )
    if not compared:
        return Finding(Outcome.NOT_MEASURED, "Agreement with the prompt was not measured.")
    return Finding(Outcome.SHIP, "Agrees with the prompt as the reference does.")


def _saving(sheet: Sheet, candidate: str) -> Finding:
    shares = {}
    for name, what in SAVINGS.items():
        before, after = sheet.record(name, sheet.reference), sheet.record(name, candidate)
        if before and after and before.value > 0:
            shares[what] = after.value / before.value
    if not shares:
        return Finding(Outcome.NOT_MEASURED, "What it saves was not measured.")
    says = f"Takes {', '.join(f'{100 * share:.0f} % of the {what}' for what, share in shares.items())}"
    if min(shares.values()) >= 1:
        return Finding(Outcome.LOOK, f"{says}: saves nothing that was measured.")
    return Finding(Outcome.SHIP, f"{says}.")


def _has_interval(record: Record) -> bool:
    """One picture has none: the bootstrap's is a point, which says nothing of others."""
    return record.n > 1


def _figure(record: Record) -> str:
    measure = measure_of(record.name)
    ends = f"{measure.write(record.low)} to {measure.write(record.high)}"
    return f"{measure.title} {measure.value(record.value)} ({ends})"


PAIRED = ("psnr_db", "lpips_alex")
SAVINGS = {
    "stored_bytes": "denoiser's bytes",
    "disk_bytes": "bytes on disk",
    "peak_memory_bytes": "peak memory",
    "seconds_per_image": "time",
    "joules_per_image": "energy",
}
RULES = (
    Rule("Failures", "Any black picture or NaN: do not ship.", _failures),
    Rule("Pictures", f"Fewer than {ENOUGH} pairs of pictures, or none: look closer.", _number),
    Rule(
        "PSNR",
        f"Ship: the whole interval at {PSNR_LIKE:g} dB or more. Do not ship: all of it below {PSNR_UNLIKE:g} dB.",
        _within(PSNR_LIKE, PSNR_UNLIKE, "psnr_db"),
    ),
    Rule(
        "LPIPS",
        f"Ship: the whole interval at {LPIPS_LIKE:g} or less. Do not ship: all of it above {LPIPS_UNLIKE:g}.",
        _within(LPIPS_LIKE, LPIPS_UNLIKE, "lpips_alex"),
    ),
    Rule(
        "Groups",
        f"A gap above {GROUP_GAP_DB:g} dB with p < {GROUP_P:g} (permutation test): look closer. The worst group's "
        f"whole interval below {PSNR_UNLIKE:g} dB: do not ship.",
        _groups,
    ),
    Rule("Prompt", "The whole interval below the reference's: look closer.", _prompt),
    Rule("Saving", "Neither fewer bytes, less time nor less energy than the reference: look closer.", _saving),
)
