"""From the lines that processes wrote to a report, the README's tables and the plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from board.peers import SECTION as PEERS
from board.rows import DEFAULT
from qdiff.evaluation import Record, Report
from qdiff.evaluation.scatter import Point, scatter_chart

Line = Mapping[str, Any]  # one measured unit: model, recipe, section, baseline, seed, and figures or "failed"

FIGURES = ("ratio_to_fp16", "denoiser_relative_error", "psnr_db", "ssim")
GAIN, ERROR_RATIO = "psnr_over_baseline_db", "error_over_baseline"
MARKER = "<!-- figures: scripts/leaderboard.py -->"


def over_seeds(name: str, values: Iterable[float], tags: Mapping[str, str]) -> Record:
    """The median over the seeds; `low` and `high` are the smallest and the largest."""
    values = list(values)
    return Record(name, statistics.median(values), min(values), max(values), len(values), tags)


def report_of(lines: Sequence[Line], settings: Mapping[str, Any]) -> Report:
    """All records; what a row improves on is compared seed by seed. Rows that failed are in `settings["failed"]`."""
    found: dict[tuple[str, str], dict[int, Line]] = {}
    failed: dict[tuple[str, str], str] = {}
    for line in lines:
        key = (line["model"], line["recipe"])
        if "failed" in line:
            failed[key] = line["failed"]
        else:
            found.setdefault(key, {})[line["seed"]] = line
    records: list[Record] = []
    for (model, recipe), by_seed in found.items():
        first = next(iter(by_seed.values()))
        tags = {"model": model, "recipe": recipe, "section": first["section"]}
        records += [over_seeds(name, (line[name] for line in by_seed.values()), tags) for name in FIGURES]
        base = found.get((model, first["baseline"] or ""), {})
        if both := sorted(by_seed.keys() & base.keys()):
            tags |= {"baseline": first["baseline"]}
            gains = [by_seed[seed]["psnr_db"] - base[seed]["psnr_db"] for seed in both]
            name = "denoiser_relative_error"
            ratios = [by_seed[seed][name] / base[seed][name] for seed in both]
            records += [over_seeds(GAIN, gains, tags), over_seeds(ERROR_RATIO, ratios, tags)]
    failures = [{"model": model, "recipe": recipe, "why": why} for (model, recipe), why in failed.items()]
    return Report("leaderboard", tuple(records), {**settings, "failed": failures})


def markdown(report: Report) -> str:
    """Two tables: recipes and peers in absolute figures, methods against what each of them improves on."""
    models = list(dict.fromkeys(record.tags["model"] for record in report.records))
    head = " | ".join(f"{model}: of fp16 | error | PSNR, dB | SSIM" for model in models)
    lines = [f"| | {head} |", "|" + " --- |" * (1 + 4 * len(models))]
    lines += [
        f"| {_name(recipe)} | {' | '.join(_figures(report, model, recipe) for model in models)} |"
        for recipe in _recipes(report, ("presets", PEERS))
    ]
    for gain in _find(report, GAIN, recipe=DEFAULT):
        model, baseline = gain.tags["model"], gain.tags["baseline"]
        ends = f"{gain.low:+.2f} to {gain.high:+.2f} over {gain.n} seeds"
        lines += ["", f"{DEFAULT} against {baseline} on {model}: {_gain(report, model, DEFAULT)} ({ends})."]
    methods = [
        recipe
        for recipe in _recipes(report, ("rounding", "transforms", "ranges", "sampling"))
        if _find(report, GAIN, recipe=recipe)
    ]
    if methods:
        lines += ["", f"| | improves on | {' | '.join(models)} |", "|" + " --- |" * (2 + len(models))]
    for recipe in methods:
        baseline = _find(report, GAIN, recipe=recipe)[0].tags["baseline"]
        lines.append(f"| {recipe} | {baseline} | {' | '.join(_gain(report, model, recipe) for model in models)} |")
    if bits := _recipes(report, ("bits",)):
        lines += ["", f"| | {head} |", "|" + " --- |" * (1 + 4 * len(models))]
        lines += [
            f"| {recipe} | {' | '.join(_figures(report, model, recipe) for model in models)} |" for recipe in bits
        ]
    failed = [f"{item['recipe']} ({item['model']}): {item['why']}" for item in report.settings.get("failed", ())]
    return "\n".join([*lines, *(["", "Not measured: " + "; ".join(failed) + "."] if failed else [])])


def _recipes(report: Report, sections: Sequence[str]) -> list[str]:
    """Of these sections, in their order and then as they were listed."""
    order = report.settings.get("order", [])
    found = dict.fromkeys((r.tags["section"], r.tags["recipe"]) for r in report.records)
    chosen = [recipe for section in sections for kind, recipe in found if kind == section]
    return sorted(chosen, key=lambda recipe: order.index(recipe) if recipe in order else -1)


def _name(recipe: str) -> str:
    return f"**{recipe}**" if recipe == DEFAULT else recipe


def _find(report: Report, name: str, **tags: str) -> list[Record]:
    return [r for r in report.records if r.name == name and tags.items() <= r.tags.items()]


def _figures(report: Report, model: str, recipe: str) -> str:
    found = {name: _find(report, name, model=model, recipe=recipe) for name in FIGURES}
    if not all(found.values()):
        return " | | | "
    ratio, error, psnr, ssim = (found[name][0] for name in FIGURES)
    spread = f" ({psnr.low:.1f} to {psnr.high:.1f})" if psnr.n > 1 else ""
    return f"{ratio.value:.3f} | {100 * error.value:.2f} % | {psnr.value:.1f}{spread} | {ssim.value:.3f}"


def _gain(report: Report, model: str, recipe: str) -> str:
    gain, ratio = (_find(report, name, model=model, recipe=recipe) for name in (GAIN, ERROR_RATIO))
    if not gain:
        return ""
    text = f"{gain[0].value:+.2f} dB, error x {ratio[0].value:.2f}"
    return text if gain[0].value > 0 and ratio[0].value < 1 else f"{text}: here it is not better"


def into_readme(path: Path, text: str, marker: str = MARKER) -> None:
    """Replace what stands between the two markers.

    Raises:
        ValueError: there are not exactly two.
    """
    parts = path.read_text(encoding="utf-8").split(marker)
    if len(parts) != 3:
        raise ValueError(f"{path} must hold the marker {marker} twice, around the tables: found {len(parts) - 1}")
    path.write_text(f"{parts[0]}{marker}\n{text}\n{marker}{parts[2]}", encoding="utf-8")


def plot(report: Report, model: str) -> str:
    """PSNR against bytes: the default, the other presets, the peers."""

    def points(section: str, *, default: bool) -> list[Point]:
        return [
            (record.tags["recipe"], report.find("ratio_to_fp16", **record.tags).value, record.value)
            for record in _find(report, "psnr_db", model=model, section=section)
            if (record.tags["recipe"] == DEFAULT) == default
        ]

    groups = {
        "peers": points(PEERS, default=False),
        "presets": points("presets", default=False),
        f"{DEFAULT}, the default": points("presets", default=True),
    }
    return scatter_chart(
        {name: group for name, group in groups.items() if group},
        title=f"{model}: likeness to full precision against size",
        x_label="bytes over float16",
        y_label="PSNR, dB",
    )
