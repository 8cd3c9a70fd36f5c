"""The demo's measurements as records, a table in the terminal, and an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich import box
from rich.table import Table as RichTable

from qdiff.demo.measure import DEFAULT, FULL, NAIVE, DemoSettings, ModelResult, Variant
from qdiff.evaluation import Record, Report
from qdiff.evaluation.chart import line_chart
from qdiff.evaluation.html import PictureGrid, Section, Table, render_page

MEGABYTE = 1e6


def make_report(results: Sequence[ModelResult], settings: DemoSettings, seconds: float) -> Report:
    """Return every measured figure with where it comes from."""
    records = [Record.exact("demo_seconds", seconds)]
    series: dict[str, Sequence[float]] = {}
    for result in results:
        records += full_records(result)
        for variant in result.variants.values():
            records += variant_records(result, variant)
            prefix = f"{result.name}/{variant.recipe}"
            series[f"{prefix}/latent_error_by_step"] = variant.drift.mean(1).tolist()
            series[f"{prefix}/denoiser_error_by_step"] = list(variant.error.steps)
            series[f"{prefix}/psnr_db_by_picture"] = variant.quality.psnr.tolist()
            series[f"{prefix}/ssim_by_picture"] = variant.quality.ssim.tolist()
    return Report("qdiff demo", tuple(records), describe(results, settings), series)


def full_records(result: ModelResult) -> list[Record]:
    tags = {"model": result.name, "recipe": FULL}
    return [
        Record.exact("denoiser_bytes", result.bytes, **tags),
        Record.exact("generate_seconds", result.full.seconds, **tags),
    ]


def variant_records(result: ModelResult, variant: Variant) -> list[Record]:
    tags = {"model": result.name, "recipe": variant.recipe}
    return [
        Record.exact("denoiser_bytes", variant.bytes, **tags),
        Record.exact("ratio_to_fp16", variant.bytes / result.bytes, **tags),
        Record.exact("denoiser_relative_error", variant.error.overall, **tags),
        Record.mean("psnr_db", variant.quality.psnr.tolist(), **tags),
        Record.mean("ssim", variant.quality.ssim.tolist(), **tags),
        Record.mean("final_latent_error", variant.drift[-1].tolist(), **tags),
        Record.exact("quantize_seconds", variant.quantize_seconds, **tags),
        Record.exact("generate_seconds", variant.run.seconds, **tags),
    ]


def describe(results: Sequence[ModelResult], settings: DemoSettings) -> dict[str, Any]:
    """Return what a reader needs to measure the same again, as plain JSON values."""
    calibration = settings.calibration
    return {
        "pictures": settings.count,
        "steps": settings.steps,
        "guidance_scale": settings.guidance,
        "first_seed": settings.seed,
        "replayed_pictures": min(settings.replayed, settings.count),
        "calibration": {
            "prompts": "built in" if calibration.prompts is None else list(calibration.prompts),
            "steps": calibration.steps,
            "seed": calibration.seed,
        },
        "threads": torch.get_num_threads(),
        "captions": {result.name: list(result.captions) for result in results},
    }


COLUMNS = ("", "denoiser, MB", "of fp16", "denoiser error", "PSNR, dB", "SSIM", "quantize, s", "generate, s")


def table_rows(result: ModelResult) -> list[list[str]]:
    """Return the rows of one model's table as they are shown, under `COLUMNS`."""
    rows = [[FULL, f"{result.bytes / MEGABYTE:.2f}", "1.000", "-", "-", "-", "-", f"{result.full.seconds:.1f}"]]
    for variant in result.variants.values():
        rows.append(
            [
                variant.recipe,
                f"{variant.bytes / MEGABYTE:.2f}",
                f"{variant.bytes / result.bytes:.3f}",
                f"{variant.error.overall:.1%}",
                f"{variant.quality.psnr.mean():.1f}",
                f"{variant.quality.ssim.mean():.3f}",
                f"{variant.quantize_seconds:.0f}",
                f"{variant.run.seconds:.1f}",
            ]
        )
    return rows


# Short enough for a terminal of 80 columns: figures must not be cut.
HEADINGS = ("", "MB", "of fp16", "error", "PSNR", "SSIM", "quantize", "draw")


def console_table(results: Sequence[ModelResult]) -> RichTable:
    """Return the one table of all models."""
    table = RichTable(caption="\n".join(TABLE_NOTES), caption_justify="left", box=box.SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for result in results:
        table.add_section()
        table.add_row(f"[bold]{result.name}[/bold]")
        for row in table_rows(result):
            table.add_row(*row, style="bold green" if row[0] == DEFAULT else None)
    return table


TABLE_NOTES = (
    "MB: all that is stored for the denoiser; what is not quantized counts as fp16.",
    "Error: the denoiser's, relative, on the inputs of the full-precision run.",
    "PSNR (dB) and SSIM: paired, same seeds. Quantize, draw: seconds.",
)


def drift_chart(result: ModelResult) -> str:
    """Return the SVG of the latents' relative error after each step, mean over the pictures, in percent."""
    series = {name: (100 * variant.drift.mean(1)).tolist() for name, variant in result.variants.items()}
    return line_chart(
        series,
        title=f"{result.name}: latents against full precision",
        x_label="denoising step",
        y_label="relative error, %",
    )


def error_chart(result: ModelResult) -> str:
    """Return the SVG of the denoiser's own relative error at each step, on the full-precision inputs, in percent."""
    series = {name: [100 * error for error in variant.error.steps] for name, variant in result.variants.items()}
    return line_chart(
        series,
        title=f"{result.name}: the denoiser alone, same inputs",
        x_label="denoising step",
        y_label="relative error, %",
    )


def make_page(results: Sequence[ModelResult], report: Report) -> str:
    """Return the HTML page of the report."""
    settings = report.settings
    seeds = f"seeds {settings['first_seed']} to {settings['first_seed'] + settings['pictures'] - 1}"
    versions = ", ".join(f"{name} {version}" for name, version in report.environment.items())
    return render_page(
        "qdiff demo: 4-bit weights, 8-bit activations",
        "The same captions and seeds through two small trained diffusion models: in full precision, quantized naively "
        "(one scale a weight tensor, one fixed range a layer), and by the default recipe.",
        [page_section(result) for result in results],
        [
            "Bytes count all that is stored for the denoiser: codes, scales, smoothing, low-rank branches, range "
            "tables, and every layer that was kept. Floating point that was not quantized counts as 16 bits on both "
            "sides; full precision computes in float32.",
            "Denoiser error: ||quantized - full|| / ||full|| of the denoiser's output, on the inputs it had in the "
            f"full-precision run ({settings['replayed_pictures']} pictures, every step). PSNR and SSIM by "
            "torchmetrics, each picture against its own full-precision one, mean of all. A picture that took another "
            "turn along the way can score low and look as good.",
            f"{settings['pictures']} pictures a model, captions and classes drawn at random; {settings['steps']} "
            f"steps, guidance {settings['guidance_scale']:g}, {seeds}; calibrated on built-in prompts, "
            f"{settings['calibration']['steps']} steps; {settings['threads']} CPU threads. Seconds are of one run: "
            "what else the machine was doing is in them. Every figure, and each picture's, is in report.json.",
            f"Measured with {versions}.",
        ],
    )


def page_section(result: ModelResult) -> Section:
    naive, best = result.variants[NAIVE], result.variants[DEFAULT]
    before, after = result.bytes / MEGABYTE, best.bytes / MEGABYTE
    columns = {FULL: result.full.pictures} | {name: variant.run.pictures for name, variant in result.variants.items()}
    notes = {
        name: [f"{psnr:.1f} dB" for psnr in variant.quality.psnr.tolist()] for name, variant in result.variants.items()
    }
    return Section(
        title=result.name,
        lead=f"{result.denoiser}: {before:.1f} MB in fp16, {after:.1f} MB by {DEFAULT}.",
        figures=[
            (f"{best.bytes / result.bytes:.0%}", "of the fp16 bytes"),
            (f"{best.error.overall:.1%}", f"denoiser error (naive: {naive.error.overall:.1%})"),
            (f"{best.quality.psnr.mean():.1f} dB", f"PSNR (naive: {naive.quality.psnr.mean():.1f} dB)"),
            (f"{result.full.seconds / best.run.seconds:.2f}x", "the speed of float32 on this CPU"),
        ],
        table=Table(COLUMNS, table_rows(result), strong=1 + list(result.variants).index(DEFAULT)),
        charts=[drift_chart(result), error_chart(result)],
        pictures=PictureGrid(result.captions, columns, notes),
    )
