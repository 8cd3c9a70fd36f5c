"""The demo: two small trained pipelines before and after quantization, with the same seeds, in pictures and numbers."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from qdiff.demo.measure import MODELS, DemoSettings, Progress, measure_model
from qdiff.demo.present import console_table, drift_chart, make_page, make_report
from qdiff.evaluation import Report

__all__ = ["MODELS", "DemoSettings", "run_demo"]


def run_demo(settings: DemoSettings, out: Path, console: Console) -> Report:
    """Measure every model, print one table, and write report.json, report.html and latent-error-<model>.svg to `out`.

    Raises:
        FileNotFoundError: a model is missing from the assets folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    results = []
    for name in settings.models:
        results.append(measure_model(name, settings, Progress(console, started)))
    report = make_report(results, settings, time.perf_counter() - started)
    console.print(console_table(results))
    for result in results:
        (out / f"latent-error-{result.name}.svg").write_text(drift_chart(result), encoding="utf-8")
    report.write(out / "report.json")
    (out / "report.html").write_text(make_page(results, report), encoding="utf-8")
    console.print(f"{time.perf_counter() - started:.0f} s in all. Look at the pictures: {out / 'report.html'}")
    return report
