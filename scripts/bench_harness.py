"""What evaluating costs over plain drawing, and how many pictures a second several processes draw.

    python scripts/bench_harness.py --like sd15 --pictures 128 --batch 16
    accelerate launch --num_processes 2 scripts/bench_harness.py --like sd15 --pictures 128 --batch 16

Draws the same items twice from the same pipeline, in pairs of short turns so that a change of clocks hits both: once
and no more, and once through the harness, which writes each picture and measures it meanwhile. Prints the pictures a
second of all processes together, and the overhead. `--like sd15`: a pipeline of Stable Diffusion 1.5's sizes with
random weights and 512 x 512 pictures; `--pipeline` takes a folder. `--json` adds the figures to a file, those of each
number of processes beside each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

from qdiff.evaluation.drawing import draw_and_measure
from qdiff.evaluation.entries import Entry, entries_of
from qdiff.evaluation.generation import Generation, draw
from qdiff.evaluation.measuring import Measurement
from qdiff.evaluation.metrics import metrics_of
from qdiff.evaluation.processes import this_process
from qdiff.evaluation.prompts import Item
from qdiff.evaluation.sources import PipelineSource
from qdiff.evaluation.timing import median_and_range, wait_for

TURNS = 4


def main() -> None:
    arguments = parse_arguments()
    processes = this_process()
    device = processes.device
    pipe = like_sd15(arguments.assets) if arguments.pipeline is None else load(arguments.pipeline)
    pipe = pipe.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generation = Generation(arguments.steps, 7.5, arguments.batch)
    metrics = metrics_of(arguments.metrics.split(","), device=device)
    first = processes.process_index * 1_000_000
    items = [Item(index, f"a photograph of thing {index}", first + index) for index in range(arguments.pictures)]
    draw(pipe, items[: arguments.batch], generation)  # warm-up
    for each in metrics:  # as `evaluate` does before it draws
        each.prepare()
    with tempfile.TemporaryDirectory() as folder:
        out, source = Path(folder), PipelineSource("candidate", pipe)
        references = entries_of(source, items, generation, ("", ""), out / "reference")
        draw_and_measure(
            source,
            [(entry, None) for entry in references],
            Measurement([], out, source.id, None),
            generation,
            device,
            False,
        )
        plain, through = [], []
        for turn in range(TURNS + 1):
            place = out / f"turn-{turn}"
            pairs = [
                (dataclasses.replace(entry, path=place / entry.path.name), reference)
                for entry, reference in zip(references, references)
            ]
            measurement = Measurement(metrics, place, source.id, source.id, processes.process_index)
            processes.wait_for_everyone()
            plain.append(seconds(lambda: draw_all(pipe, references, generation), device))
            processes.wait_for_everyone()
            run = (source, pairs, measurement, generation, device, False)
            through.append(seconds(lambda run=run: draw_and_measure(*run), device))
        del plain[0], through[0]  # the metrics' warm-up
    if processes.is_main_process:
        total = arguments.pictures * processes.num_processes
        figures: dict[str, Any] = {"pictures": total, "batch": arguments.batch, "steps": arguments.steps}
        figures |= {"metrics": arguments.metrics, "date": datetime.date.today().isoformat(), "torch": torch.__version__}
        figures["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        for name, times in (("plain", plain), ("harness", through)):
            median, low, high = median_and_range(times)
            print(f"{name}: {total / median:.2f} pictures/s ({total / high:.2f} to {total / low:.2f})")
            figures[f"{name}_pictures_per_s"] = {"median": total / median, "low": total / high, "high": total / low}
        overhead = median_and_range([after / before - 1 for before, after in zip(plain, through)])
        print(
            f"overhead: {overhead[0]:.2%} ({overhead[1]:.2%} to {overhead[2]:.2%}), {processes.num_processes} processes"
        )
        figures["overhead"] = dict(zip(("median", "low", "high"), overhead))
        if arguments.json is not None:
            runs = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {}
            runs[str(processes.num_processes)] = figures
            arguments.json.write_text(json.dumps(runs, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--pipeline", type=Path)
    kind.add_argument("--like", choices=["sd15"])
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="for a text encoder")
    parser.add_argument("--pictures", type=int, default=128, help="a process, a turn")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="a file that the figures are added to")
    parser.add_argument("--metrics", default="psnr,ssim,fd-efficientnet-lite0")
    return parser.parse_args()


def like_sd15(assets: Path) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's UNet and VAE, weights random; the text encoder of emoji-sd."""
    small = load(assets / "emoji-sd")
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=8,
        cross_attention_dim=small.text_encoder.config.hidden_size,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return StableDiffusionPipeline(
        vae, small.text_encoder, small.tokenizer, unet.eval(), scheduler, None, None, requires_safety_checker=False
    )


def load(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)


def draw_all(pipe: Any, entries: list[Entry], generation: Generation) -> None:
    for start in range(0, len(entries), generation.batch_size):
        draw(pipe, [entry.item for entry in entries[start : start + generation.batch_size]], generation)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    wait_for(device)
    started = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
