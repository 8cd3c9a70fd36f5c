"""What judging many pictures takes: memory and seconds from rows on disk to a report, with 50,000 pictures by default.

    python scripts/bench_statistics.py
    python scripts/bench_statistics.py --pictures 12500 --pictures 50000 --features 2048

For each number of pictures, one after another in a process of its own: writes synthetic rows of a reference and of a
candidate as four processes would (features of `--features` numbers, class scores of 1,008, and a value of each pair in
four groups), and reduces them to records with intervals, worst groups and permutation tests, and these to report.json,
report.md and report.html. Prints the peak of the process's own memory (RssAnon of /proc, sampled) beyond what it had
before, the peak of all resident memory with the files that are mapped (VmHWM), and the seconds of each part.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from qdiff.evaluation.entries import Entry
from qdiff.evaluation.markdown import markdown
from qdiff.evaluation.measuring import flaw_folder, row_folder, row_key
from qdiff.evaluation.metrics.contract import Metric
from qdiff.evaluation.metrics.features import Features
from qdiff.evaluation.metrics.frechet import FrechetDistance
from qdiff.evaluation.metrics.inception import Inception
from qdiff.evaluation.metrics.inception_score import InceptionScore
from qdiff.evaluation.metrics.kernel import KernelDistance
from qdiff.evaluation.metrics.pixels import Psnr
from qdiff.evaluation.page import write_page
from qdiff.evaluation.prompts import Item
from qdiff.evaluation.reducing import PictureSet, Reduction
from qdiff.evaluation.report import Record, Report
from qdiff.evaluation.rows import RowWriter
from qdiff.evaluation.weights import Found

CPU = torch.device("cpu")
NOTHING = Found(Path("synthetic"), "0" * 64)
PROCESSES, AT_ONCE = 4, 500
GROUPS = ("noto", "twemoji", "fluent", "flat")


class Synthetic(Features):
    """Features that come from rows, not from pictures."""

    name, resize = "synthetic", "none"
    width = 2048

    def provenance(self) -> dict[str, str]:
        return {"package": "none"}

    def load(self) -> None:
        raise NotImplementedError

    def extract(self, pictures: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def main() -> None:
    arguments = parse_arguments()
    counts = arguments.pictures or [50_000]
    if len(counts) > 1:
        for count in counts:
            command = [sys.executable, __file__, "--pictures", str(count), "--features", str(arguments.features)]
            subprocess.run(command, check=True)
        return
    Synthetic.width = arguments.features
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        measure(counts[0], Path(folder))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, action="append", help="how many (repeatable)")
    parser.add_argument("--features", type=int, default=2048, help="numbers a picture; 2048 are Inception's")
    parser.add_argument("--scratch", type=Path, help="a folder with room for the rows; by default that for such files")
    return parser.parse_args()


def measure(count: int, out: Path) -> None:
    features = Synthetic(NOTHING, CPU)
    scores = Inception(NOTHING, CPU, "legacy_tensorflow", "logits_unbiased", "random")
    metrics = [Psnr(CPU), FrechetDistance(features), KernelDistance(features), InceptionScore(scores)]
    sources = {name: entries(name, count) for name in ("reference", "candidate")}
    started = time.perf_counter()
    for number, name in enumerate(sources):
        write_rows(metrics, sources, name, number, out)
    print(f"{count:,} pictures, {Synthetic.width} features: rows written in {time.perf_counter() - started:.0f} s")
    with Watch() as whole:
        sets = {name: PictureSet.read(out, name, of) for name, of in sources.items()}
        reduction = Reduction(out, sets["reference"], paired=True)
        records: list[Record] = []
        for metric in metrics:
            reduce = watched(metric.name, lambda metric=metric: reduction.records(metric, sets["candidate"], TAGS))
            records += reduce()
        watched("report", lambda: write_report(records, out))()
    print(f"  in all: {whole.text()}; all resident memory at most {status('VmHWM') / 2**20:.0f} MiB")


TAGS = {"candidate": "candidate"}


def entries(name: str, count: int) -> list[Entry]:
    return [
        Entry(Item(index, f"thing {index}", index, GROUPS[index % len(GROUPS)]), f"{name}-{index:09}", Path(name))
        for index in range(count)
    ]


def write_rows(metrics: Sequence[Metric], sources: dict[str, list[Entry]], name: str, number: int, out: Path) -> None:
    """Of one source, by processes that take every fourth picture, some hundreds at a time."""
    rng = np.random.default_rng(number)
    mix = np.random.default_rng(99).normal(size=(64, Synthetic.width)).astype(np.float32)
    widths = {metric.feature_key: rows_of(metric, rng, mix, 0.05 * number) for metric in metrics}
    for process in range(PROCESSES):
        mine = list(zip(sources[name], sources["reference"]))[process::PROCESSES]
        with RowWriter(flaw_folder(out, name), process) as flaws:
            for start in range(0, len(mine), AT_ONCE):
                part = mine[start : start + AT_ONCE]
                flaws.append([entry.key for entry, _ in part], np.zeros((len(part), 1)))
        for metric in {metric.feature_key: metric for metric in metrics}.values():
            if metric.needs_reference and name == "reference":
                continue
            with RowWriter(row_folder(out, metric, name, "reference"), process) as writer:
                for start in range(0, len(mine), AT_ONCE):
                    part = mine[start : start + AT_ONCE]
                    writer.append([row_key(metric, *pair) for pair in part], widths[metric.feature_key](len(part)))


def rows_of(metric: Metric, rng: np.random.Generator, mix: np.ndarray, shift: float) -> Callable[[int], np.ndarray]:
    """Correlated, skewed rows for features; decibels; scores of classes."""
    if isinstance(metric, Psnr):
        return lambda count: rng.normal(30, 3, size=(count, 1))
    if isinstance(metric, InceptionScore):
        return lambda count: rng.normal(0, 3, size=(count, 1008))
    return lambda count: (
        rng.gamma(2, 1 + shift, size=(count, len(mix))) @ mix + rng.normal(size=(count, mix.shape[1]))
    ).astype(np.float32)


def write_report(records: list[Record], out: Path) -> None:
    report = Report("synthetic", tuple(records), {"reference": "reference"})
    report.write(out / "report.json")
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    write_page(report, out)


def watched(what: str, function: Callable[[], object]) -> Callable[[], list[Record]]:
    def run() -> list[Record]:
        with Watch() as watch:
            found = function()
        print(f"  {what}: {watch.text()}", flush=True)
        return found if isinstance(found, list) else []

    return run


class Watch:
    """Seconds, and the most memory of its own that the process had beyond what it had at first."""

    def __enter__(self) -> Watch:
        self.started, self.before, self.peak, self.over = time.perf_counter(), status("RssAnon"), 0.0, threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.over.wait(0.01):
            self.peak = max(self.peak, status("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.seconds = time.perf_counter() - self.started

    def text(self) -> str:
        return f"{self.seconds:.1f} s, {max(0.0, self.peak - self.before) / 2**20:.0f} MiB"


def status(field: str) -> float:
    """Of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


if __name__ == "__main__":
    main()
