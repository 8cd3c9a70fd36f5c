"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
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
    steps: Annotated[int, typer.Option(help="Denoising steps of the calibration.", min=1)] = 20,
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


def check_pipeline_folder(path: Path) -> None:
    """Raise FileNotFoundError unless `path` holds a pipeline."""
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"no pipeline in {path}: expected the folder that `save_pretrained` wrote")


def assets_dir() -> Path:
    """Return the checkout's assets folder: beside the package, or in the current folder."""
    beside = Path(__file__).resolve().parents[1] / "assets"
    return beside if beside.is_dir() else Path("assets")
