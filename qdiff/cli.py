"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from qdiff.evaluation.prompts import Item
    from qdiff.recipe import Recipe

# torch and diffusers take seconds to import, so each command imports what it needs, and `--help` answers at once.
app = typer.Typer(
    help="4-bit weights and 8-bit activations for diffusers pipelines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PipelineArgument = Annotated[Path, typer.Argument(help="A pipeline's folder, as `save_pretrained` writes it.")]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same bytes.")]


class Precision(str, Enum):
    """What is not quantized is stored in this."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def main() -> None:
    """Entry point of the `qdiff` command."""
    app()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("out/demo"),
    count: Annotated[int, typer.Option(help="Pictures a model.", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the first picture, and of the draw of captions.")] = 0,
    model: Annotated[Optional[list[str]], typer.Option(help="Only this model of the assets (repeatable).")] = None,  # noqa: UP045  # typer on Python 3.10
    assets: Annotated[Optional[Path], typer.Option(help="The assets folder; the checkout's own by default.")] = None,  # noqa: UP045
) -> None:
    """Quantize the two small models of the project and compare pictures, bytes and errors."""
    with plain_errors():
        from rich.console import Console

        from qdiff.demo import MODELS, DemoSettings, run_demo

        settings = DemoSettings(
            assets=assets or assets_dir(), models=tuple(model or MODELS), count=count, steps=steps, seed=seed
        )
        run_demo(settings, out, Console())


@app.command()
def quantize(
    pipeline: PipelineArgument,
    out: Annotated[Path, typer.Argument(help="Where the quantized pipeline goes.")],
    recipe: Annotated[str, typer.Option(help="A preset's name, or a recipe's JSON file.")] = "w4a8",
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Calibration prompts (or class labels), one a line; built-in ones by default."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of the calibration.", min=1)] = 10,
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option(help="Where to calibrate: cpu, cuda, cuda:1 ...")] = "cpu",
    store: Annotated[Precision, typer.Option(help="How to store what is not quantized.")] = Precision.float16,
) -> None:
    """Quantize a pipeline and save it."""
    with plain_errors():
        chosen = read_recipe(recipe)  # before the imports: a wrong name is told at once
        inputs = read_prompts(prompts) if prompts else None
        check_pipeline_folder(pipeline)

        import torch
        from diffusers import DiffusionPipeline

        import qdiff

        pipe = DiffusionPipeline.from_pretrained(str(pipeline), local_files_only=True).to(device)
        calibration = qdiff.Calibration(prompts=inputs, steps=steps, seed=seed)
        qdiff.quantize_pipeline(pipe, recipe=chosen, calibration=calibration)
        pipe.to(dtype=getattr(torch, store.value))
        qdiff.save(pipe, out)
        report = qdiff.summary(pipe)
        typer.echo(
            f"{out}: denoiser {report.bytes_before / 1e6:.2f} MB in fp16, now {report.bytes_after / 1e6:.2f} MB "
            f"({report.ratio:.3f}); `qdiff summary {out}` says what was done to each layer"
        )


@app.command()
def evaluate(
    reference: Annotated[Path, typer.Argument(help="A pipeline's folder, a folder of pictures, or statistics (.npz).")],
    candidates: Annotated[
        list[str], typer.Argument(help="Folders of pipelines or pictures to compare with it: PATH, or NAME=PATH.")
    ],
    prompts: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A .txt, .csv or .jsonl file, or a built-in set; not needed between folders of pictures."),
    ] = None,
    metrics: Annotated[str, typer.Option(help="Names, separated by commas.")] = "psnr,ssim,fd-efficientnet-lite0",
    out: Annotated[Path, typer.Option(help="Where pictures and reports go.")] = Path("out/evaluation"),
    weights: Annotated[Optional[Path], typer.Option(help="A folder of the metrics' weights.")] = None,  # noqa: UP045
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
    guidance_scale: Annotated[Optional[float], typer.Option(help="The pipeline's own by default.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(help="Pictures drawn at a time.", min=1)] = 8,
    height: Annotated[Optional[int], typer.Option(help="In pixels; the pipeline's own by default.", min=1)] = None,  # noqa: UP045
    width: Annotated[Optional[int], typer.Option(help="In pixels; the pipeline's own by default.", min=1)] = None,  # noqa: UP045
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16; see `evaluate`.")] = "auto",
    limit: Annotated[Optional[int], typer.Option(help="Only so many of the prompts, the first.", min=1)] = None,  # noqa: UP045
    costs: Annotated[bool, typer.Option(help="Measure time, memory and energy.")] = True,
    assets: Annotated[Optional[Path], typer.Option(help="The assets folder, for built-in prompts.")] = None,  # noqa: UP045
) -> None:
    """Compare pipelines (or folders of pictures) with a reference: quality, time, memory and energy.

    Killed and run again, it goes on where it was. `accelerate launch -m qdiff.cli evaluate ...` shares the work.
    """
    with plain_errors():
        named = candidate_names(candidates)

        from qdiff.evaluation import markdown
        from qdiff.evaluation.processes import this_process
        from qdiff.evaluation.run import evaluate as run

        items = prompt_items(prompts, assets or assets_dir(), limit)
        processes = this_process()
        report = run(
            reference,
            named,
            items,
            [name.strip() for name in metrics.split(",") if name.strip()],
            out=out,
            steps=steps,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            height=height,
            width=width,
            dtype=dtype,
            weights=weights,
            offline=offline,
            costs=costs,
            accelerator=processes,
        )
        if processes.is_main_process:
            typer.echo(markdown.markdown(report))
            typer.echo(f"Look at the pictures: {out / 'report.html'}")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `qdiff quantize` or `qdiff.save` wrote.")],
    device: Annotated[
        str, typer.Option(help="What the CPU reference is compared with; cpu: its integer sums with exact ones.")
    ] = "cuda",
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
) -> None:
    """Run every quantized layer on the CPU and on a GPU, and say where they differ first.

    Exit status: 0 all the same, 1 a difference or an error, 2 no such device.
    """
    with plain_errors():
        check_pipeline_folder(checkpoint)

        import torch

        import qdiff
        from qdiff.plugin.verify import report_lines, verify

        if device.startswith("cuda") and not torch.cuda.is_available():
            typer.echo("error: no CUDA device; --device cpu checks the CPU's integer sums against exact ones", err=True)
            raise typer.Exit(2)
        checks = list(verify(qdiff.load(checkpoint), device, seed))
        for line in report_lines(checks):
            typer.echo(line)
        if any(check.difference for check in checks):
            raise typer.Exit(1)


@app.command()
def summary(pipeline: PipelineArgument) -> None:
    """Say what was done to each layer of a pipeline, bytes before and after, and why a layer was kept."""
    with plain_errors():
        check_pipeline_folder(pipeline)

        import qdiff

        typer.echo(qdiff.summary(qdiff.load(pipeline)))


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what a user can put right into one line and exit status 1; anything else keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def read_recipe(text: str) -> Recipe:
    """Return the preset called `text`, or the recipe in the JSON file `text`."""
    from qdiff.recipe import Recipe

    if text.endswith(".json"):
        return Recipe.from_json(Path(text).read_text(encoding="utf-8"))
    return Recipe.preset(text)


def read_prompts(path: Path) -> list[str | int]:
    """Return the lines of a file that are not blank; a whole number is a class label."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [int(line) if line.isdecimal() else line for line in lines if line]


def candidate_names(given: list[str]) -> dict[str, Path]:
    """Return the folders by their names: NAME=PATH, or else the folder's own name."""
    named: dict[str, Path] = {}
    for text in given:
        name, separator, path = text.rpartition("=")
        folder = Path(path)
        name = name if separator else folder.resolve().name
        if name in named:
            raise ValueError(f"two candidates are called {name!r}; write NAME={text} to tell them apart")
        named[name] = folder
    return named


def prompt_items(given: str | None, assets: Path, limit: int | None) -> Sequence[Item] | None:
    """Return the items of a prompt file or of a built-in set, the first `limit` of them."""
    from qdiff.evaluation import prompts
    from qdiff.evaluation.builtin_prompts import builtin_prompts

    if given is None:
        return None
    is_file = Path(given).suffix != "" or Path(given).exists()
    return (prompts.read_prompts(given) if is_file else builtin_prompts(given, assets))[:limit]


def check_pipeline_folder(path: Path) -> None:
    """Raise FileNotFoundError unless `path` holds a pipeline."""
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"no pipeline in {path}: expected the folder that `save_pretrained` wrote")


def assets_dir() -> Path:
    """Return the checkout's assets folder: beside the package, or in the current folder."""
    beside = Path(__file__).resolve().parents[1] / "assets"
    return beside if beside.is_dir() else Path("assets")


if __name__ == "__main__":
    main()
