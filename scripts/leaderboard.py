"""Every method and the peers on the same work: `assets/benchmarks/leaderboard.json`, the README's tables, the plots.

    python scripts/leaderboard.py --jobs 2                               # CPU
    python scripts/leaderboard.py --device cuda --jobs 28 --minutes 9    # GPUs: the processes take turns on all of them
    python scripts/leaderboard.py --resume --minutes 0                   # only the report, of what is there

64 pictures a model (held-out captions of emoji-sd, class labels of emoji-dit), 20 steps, guidance 4, paired with
full precision in float32 from the same noise, which a CPU generator draws. A seed changes the noise of the pictures and
that of the calibration; figures are the median over the seeds, with the smallest and the largest.

Columns: bytes of everything the denoiser stores, of a float16 model, over those in float16; the denoiser's relative
output error, replayed on the inputs of the full-precision trajectory (the figure of least variance); PSNR and SSIM of
the pictures. The rows are in `board/rows.py`; the peers, which must be installed beside qdiff (`pip install --no-deps
sdnq==0.2.8 optimum-quanto==0.2.7`), in `board/peers.py`.

Every unit (row, model, seed) is written to a line of `leaderboard.jsonl` as soon as it is measured. A run that was
killed goes on with `--resume`, which takes a unit's old line unless its recipe or the settings changed. Full-precision
runs and the statistics of a calibration, which rows share, are made first and kept in `--work`. Layers are calibrated
and run on the device; but for those with learned roundings they are quantized on the CPU. A run ends with the median
seconds of each of its phases.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from board.measure import DTYPES
from board.peers import SECTION as PEERS
from board.peers import Peer, all_peers
from board.processes import Outcome, run_all
from board.rows import SECTIONS, Row, all_rows
from board.table import MARKER, into_readme, markdown, plot, report_of
from board.units import Settings, Unit, tasks_of

MODELS = ("emoji-sd", "emoji-dit")


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    settings = Settings(
        arguments.assets,
        arguments.work,
        arguments.count,
        arguments.steps,
        replayed=min(arguments.replayed, arguments.count),
        device=arguments.device,
        dtype=arguments.dtype,
    )
    everything: list[Row | Peer] = [*all_rows(), *all_peers()]
    rows = chosen(everything, arguments.sections, arguments.rows)
    seeds = range(arguments.seeds)
    units = [Unit(model, seed, row) for seed in seeds for row in rows for model in arguments.models]
    log = Log(arguments.out / "leaderboard.jsonl", settings, resume=arguments.resume)
    missing = [unit for unit in units if not log.has(unit)]
    settings.work.mkdir(parents=True, exist_ok=True)
    deadline = started + 60 * arguments.minutes
    run_all(tasks_of(missing, settings), settings, arguments.jobs, arguments.threads, deadline, log.add)
    labels = [row.label for row in everything]
    lines = [log.lines[unit.key(settings)] for unit in units if log.has(unit)]
    report = report_of(lines, about(arguments, lines) | {"order": labels})
    report.write(arguments.out / "leaderboard.json")
    for model in arguments.models:
        if any(record.tags["model"] == model for record in report.records):
            (arguments.out / f"leaderboard-{model}.svg").write_text(plot(report, model), encoding="utf-8")
    text = markdown(report)
    if arguments.readme:
        into_readme(arguments.readme, text)
    undone = sum(not log.has(unit) for unit in units)
    print(f"{text}\n\n{len(units)} units, {undone} of them left undone, {time.monotonic() - started:.0f} s")
    for phase, seconds in log.phases.items():
        print(f"{phase}: median {statistics.median(seconds):.1f} s, most {max(seconds):.1f} s, {len(seconds)} times")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    parser.add_argument(
        "--work", type=Path, default=Path("out/leaderboard"), help="full-precision runs and shared statistics"
    )
    parser.add_argument("--readme", type=Path, help=f"put the tables between the two markers {MARKER} of this file")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--sections", nargs="+", default=[*SECTIONS, PEERS], choices=[*SECTIONS, PEERS])
    parser.add_argument("--rows", nargs="+", help="labels; their baselines come with them; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--count", type=int, default=64, help="pictures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--replayed", type=int, default=8, help="pictures whose denoiser calls are replayed")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of quantized denoisers")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--threads", type=int, help="of each process; default: the cores, shared out")
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="stop after this long; see --resume")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    arguments.threads = arguments.threads or max(1, (os.cpu_count() or 1) // arguments.jobs)
    return arguments


def chosen(everything: Sequence[Row | Peer], sections: Sequence[str], labels: Sequence[str] | None) -> list[Row | Peer]:
    """The rows of these sections (and with these labels), together with the rows that they are compared with."""
    by_label = {row.label: row for row in everything}
    if unknown := set(labels or ()) - by_label.keys():
        raise SystemExit(f"unknown rows {sorted(unknown)}; known: {', '.join(by_label)}")
    wanted = {row.label for row in everything if row.section in sections and (labels is None or row.label in labels)}
    queue = list(wanted)
    while queue:
        baseline = by_label[queue.pop()].baseline
        if baseline is not None and baseline not in wanted:
            wanted.add(baseline)
            queue.append(baseline)
    return [row for row in everything if row.label in wanted]


class Log:
    """The file of measured units, a JSON object a line."""

    def __init__(self, path: Path, settings: Settings, *, resume: bool) -> None:
        self.path, self.settings = path, settings
        self.lines: dict[str, dict[str, Any]] = {}
        self.phases: dict[str, list[float]] = {}  # seconds of all units of this run
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.write_text("")
        for text in path.read_text().splitlines() if path.is_file() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # the line that a kill cut short
                continue
            if "failed" not in line:  # what failed is tried again
                self.lines[line["key"]] = line

    def has(self, unit: Unit) -> bool:
        return unit.key(self.settings) in self.lines

    def add(self, unit: Unit, outcome: Outcome) -> None:
        """Keep the outcome of a unit; of a preparation, only say what went wrong."""
        for phase, seconds in outcome.get("phases", {}).items():
            self.phases.setdefault(phase, []).append(seconds)
        if not isinstance(unit.row, Row | Peer):
            if "failed" in outcome:
                what = "reference" if unit.row is None else "statistics"
                print(f"{unit.model}, seed {unit.seed}, {what}: {outcome['failed']}", flush=True)
            return
        key = unit.key(self.settings)
        tags = {"model": unit.model, "recipe": unit.row.label, "section": unit.row.section, "seed": unit.seed}
        where = {"device": device_name(self.settings.device), "date": datetime.date.today().isoformat()}
        self.lines[key] = {"key": key, **tags, **where, "baseline": unit.row.baseline, **outcome}
        with self.path.open("a") as file:
            file.write(json.dumps(self.lines[key]) + "\n")
        shown = {**outcome, **outcome.get("phases", {})}
        figures = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in shown.items() if k != "phases"}
        print(unit.model, unit.seed, unit.row.label, *(f"{k}={v}" for k, v in figures.items()), flush=True)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


def about(arguments: argparse.Namespace, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a reader needs to measure the same again."""
    return {
        "pictures": arguments.count,
        "steps": arguments.steps,
        "guidance_scale": Settings.guidance,
        "pictures_replayed": arguments.replayed,
        "seeds": arguments.seeds,
        "spread": "low and high are the smallest and the largest of the seeds, value is their median",
        "dtype": arguments.dtype,
        "device": ", ".join(sorted({line["device"] for line in lines})),
        "jobs": arguments.jobs,
        "peers": {peer.label: dataclasses.asdict(peer)["options"] for peer in all_peers()},
        "date": max((line["date"] for line in lines), default=""),
    }


if __name__ == "__main__":
    main()
