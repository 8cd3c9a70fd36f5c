"""How long it takes to quantize a denoiser of SDXL's size, and how much memory: `assets/benchmarks/quantize_sdxl.json`.

    python scripts/quantize_sdxl.py --device cuda

Random weights in the shapes of the real model (UNet2DConditionModel of Stable Diffusion XL, 2.6 billion parameters,
float16), driven by a StableDiffusionXLPipeline with the real widths of its text embeddings, 1024x1024 pictures and the
default calibration. Times and memory do not depend on the values of weights; pictures would, and none are judged here.
Calibration and layers are timed apart. By kind, bits and inputs of a weight row (with a convolution's taps), layers are
timed once more, one by one, when all is done: without packing, and with every kernel loaded.
`--small` takes a narrow model of the same kind, to try the script without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from qdiff import Calibration, Recipe, calibrate, quantize_pipeline, summary
from qdiff.calibration import Statistics
from qdiff.layers import stored_bytes
from qdiff.methods import quantize_layer
from qdiff.plugin.calibrate import plans_of
from qdiff.recipe import LayerPlan


def text_config(width: int, projection: int) -> CLIPTextConfig:
    """One layer of the real width: the denoiser sees embeddings of the right shape, and nothing else is asked of it."""
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        projection_dim=projection,
        bos_token_id=49406,
        eos_token_id=49407,
    )


def build(
    assets: Path, device: str, channels: tuple[int, int, int], depth: int, size: int
) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    tokenizer = CLIPTokenizer.from_pretrained(str(assets / "emoji-sd" / "tokenizer"))
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=size,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, min(2, depth), depth),
            attention_head_dim=tuple(width // 64 for width in channels),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ).to(dtype)
        first = CLIPTextModel(text_config(768, 768)).to(dtype)
        second = CLIPTextModelWithProjection(text_config(1280, 1280)).to(dtype)
        vae = AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4).to(dtype)  # fmt: skip
    pipe = StableDiffusionXLPipeline(vae, first, second, tokenizer, tokenizer, unet, EulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


class LayerTime(NamedTuple):
    """What one layer took: transforms, rounding and activation scales."""

    plan: LayerPlan
    inputs: int
    seconds: float


class Clock:
    """Seconds and peak memory of the parts of the work, once the device has done all of it."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_gib(self) -> float | None:
        """Since the last time it was asked for; None on a CPU."""
        if not self.on_gpu:
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 1)


def one_by_one(
    plans: Mapping[str, LayerPlan], layers: Mapping[str, nn.Module], statistics: Statistics, clock: Clock
) -> list[LayerTime]:
    """The layers that ran in calibration, each quantized alone; none of them is changed."""
    times = []
    for name in statistics.layers:
        started = clock.now()
        codes = quantize_layer(plans[name], layers[name], statistics).codes_q
        times.append(LayerTime(plans[name], codes.shape[1], clock.now() - started))
    return times


def by_kind(times: list[LayerTime]) -> list[dict[str, object]]:
    """Layers of one kind, number of bits and inputs of a weight row; those that took longest first."""
    groups: dict[tuple[str, int, int], list[float]] = {}
    for plan, inputs, seconds in times:
        groups.setdefault((plan.kind, plan.weight_bits, inputs), []).append(seconds)
    return [
        {"kind": kind, "bits": bits, "inputs": inputs, "layers": len(seconds), "seconds": round(sum(seconds), 2)}
        for (kind, bits, inputs), seconds in sorted(groups.items(), key=lambda item: -sum(item[1]))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipe", default="w4a8")
    parser.add_argument("--small", action="store_true", help="a narrow model of the same kind and a short calibration")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks/quantize_sdxl.json"))
    args = parser.parse_args()
    shape = ((64, 128, 256), 1, 32) if args.small else ((320, 640, 1280), 10, 128)
    pipe = build(args.assets, args.device, *shape)
    before = stored_bytes(pipe.unet)
    calibration = Calibration(prompts=["a red fox"], steps=2) if args.small else Calibration()
    clock = Clock(args.device)
    clock.peak_gib()
    started = clock.now()
    statistics = calibrate(pipe, args.recipe, calibration)
    calibrated, calibration_gib = clock.now(), clock.peak_gib()
    plans = plans_of(Recipe.preset(args.recipe), pipe.unet)
    layers = {name: pipe.unet.get_submodule(name) for name in plans}
    quantize_pipeline(pipe, recipe=args.recipe, statistics=statistics)
    ended, layers_gib = clock.now(), clock.peak_gib()
    times = one_by_one(plans, layers, statistics.of(plans), clock)
    result = {
        "recipe": args.recipe,
        "parameters": before // 2 if clock.on_gpu else before // 4,
        "seconds": round(ended - started, 1),
        "calibration": {"seconds": round(calibrated - started, 1), "peak_gib": calibration_gib},
        "layers": {
            "seconds": round(ended - calibrated, 1),
            "peak_gib": layers_gib,
            "count": len(times),
            "kinds": by_kind(times),
        },
        "statistics_gib": round(statistics.observed.memory_bytes / 2**30, 2),
        "model_gib": round(before / 2**30, 2),
        "ratio": round(summary(pipe).ratio, 4),
        "device": torch.cuda.get_device_name() if clock.on_gpu else platform.machine(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(result, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
