"""`evaluate`: what quantization cost, in quality, time, memory and energy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.evaluation.assembling import Assembly
from qdiff.evaluation.drawing import draw_and_measure, free
from qdiff.evaluation.generation import Generation
from qdiff.evaluation.markdown import markdown
from qdiff.evaluation.measuring import Measurement
from qdiff.evaluation.metrics import metrics_of
from qdiff.evaluation.page import write_page
from qdiff.evaluation.pictures import written_whole
from qdiff.evaluation.plan import REFERENCE, Plan, make_plan
from qdiff.evaluation.processes import Processes, this_process
from qdiff.evaluation.prompts import Item
from qdiff.evaluation.report import Report
from qdiff.evaluation.weights import Weights

if TYPE_CHECKING:
    from qdiff.evaluation.metrics.contract import Metric

DEFAULT_METRICS = ("psnr", "ssim", "fd-efficientnet-lite0")


def evaluate(
    reference: Any,
    candidates: Mapping[str, Any],
    prompts: str | os.PathLike[str] | Sequence[str | int | Item] | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    out: str | os.PathLike[str],
    steps: int = 20,
    guidance_scale: float | None = None,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    dtype: str = "auto",
    weights: str | os.PathLike[str] | None = None,
    offline: bool = False,
    costs: bool = True,
    drift: int = 4,
    accelerator: Processes | None = None,
    progress: bool = True,
) -> Report:
    """Compare candidates with a reference, and write report.json, report.md and report.html to `out`.

        evaluate("model", {"w4a8": "model-w4a8"}, ["a red fox", "a harbour at dusk"], out="out/evaluation")

    Pictures and rows of numbers are kept in `out` under what they were made of: killed at any moment and run again, it
    goes on where it was. Launched as several processes (`accelerate launch`), each draws its share. It should be the
    case that the figures depend neither on the number of processes nor on interruptions.

    Args:
        reference: a diffusers pipeline, a pipeline's folder, a folder of pictures, or statistics (.npz): those that a
            run leaves of real pictures in `out`/statistics, or published ones of Inception.
        candidates: the same but statistics, by the names that they are shown with.
        prompts: a file (see `read_prompts`), prompts, class labels or `Item`s; None compares folders of pictures.
        metrics: names; see `qdiff.evaluation.metrics.METRICS`.
        out: the folder of everything that is made.
        steps, guidance_scale, batch_size, height, width: of drawing; None is a pipeline's own default.
        dtype: of pipelines loaded from folders; "auto" is float32 on a CPU, and else what they are stored in.
        weights: a folder of weights for metrics.
        offline: download nothing.
        costs: measure time, memory and energy.
        drift: pictures whose latents and layers are compared step by step, both pipelines in memory; 0 for none.
        accelerator: accelerate's, where the caller has one.
        progress: show progress bars.

    Raises:
        ValueError: input that cannot be compared (see `make_plan`), unknown metrics, weights that cannot be loaded.
        FileNotFoundError: a folder, or a metric's weights: the text says where to put them.
        OSError: a file could not be written; what was written before is kept.
    """
    generation = Generation(steps, guidance_scale, batch_size, height, width)
    processes, folder = accelerator or this_process(), Path(out)
    chosen = metrics_of(metrics, Weights(None if weights is None else Path(weights), offline), processes.device)
    plan = make_plan(reference, candidates, prompts, chosen, generation, folder, processes.device.type, dtype)
    prepared = False
    shown = progress and processes.is_main_process
    for name, source in plan.sources.items():
        mine = plan.pairs(name)[processes.process_index :: processes.num_processes]
        measurement = _measurement(plan, name, chosen, folder, processes.process_index)
        if not prepared and not all(measurement.is_measured(*pair) for pair in mine):
            prepared = True
            for metric in chosen:  # all of them before the first picture: one may lack its weights
                metric.prepare()
        draw_and_measure(source, mine, measurement, generation, processes.device, shown)
        free(source, processes.device)
    processes.wait_for_everyone()
    path = folder / "report.json"
    if processes.is_main_process:
        assembly = Assembly(plan, chosen, generation, folder, processes)
        _write(assembly.report(costs, drift, {"dtype": dtype, "metrics": list(metrics)}), path)
    processes.wait_for_everyone()
    return Report.from_json(path.read_text(encoding="utf-8"))


def _measurement(plan: Plan, name: str, metrics: Sequence[Metric], out: Path, process: int) -> Measurement:
    """Of the reference itself, only what is no comparison with it."""
    used = [metric for metric in metrics if not (metric.needs_reference and name == REFERENCE)]
    return Measurement(used, out, plan.sources[name].id, _reference_id(plan), process)


def _reference_id(plan: Plan) -> str | None:
    return plan.sources[REFERENCE].id if REFERENCE in plan.sources else None


def _write(report: Report, path: Path) -> None:
    with written_whole(path) as aside:
        aside.write_text(report.to_json(), encoding="utf-8")
    with written_whole(path.with_suffix(".md")) as aside:
        aside.write_text(markdown(report), encoding="utf-8")
    write_page(report, path.parent)
