"""How long a step of Stable Diffusion XL takes, in float16 and quantized: `assets/benchmarks/step.json`.

    python scripts/bench_step.py

Random weights in the shapes of the real model (scripts/quantize_sdxl.py), two latents of 128 x 128 as guidance wants
them, the default recipe with as little calibration as there can be: times do not depend on the values. Each denoiser
runs as Python calls it and as a CUDA graph, channels last, the median of 20 calls after 3. So does the float16 one in
torch's own order of dimensions, and compiled by `torch.compile`, which takes minutes. `first_call_s` is that of a new
machine where CUPY_CACHE_DIR and CUDA_CACHE_PATH name empty folders.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from quantize_sdxl import build
from torch import Tensor, nn

import qdiff
from qdiff import Calibration, quantize_pipeline
from qdiff.layers import stored_bytes

WARM, TIMED = 3, 20
FLOAT = ["float16", "float16 contiguous", "float16 compiled"]
ALL = ["float16", "float16 contiguous", "w4a8", "float16 compiled"]


def inputs(unet: nn.Module, size: int) -> dict[str, object]:
    """What a pipeline with guidance hands the denoiser for one picture."""
    generator = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float16)

    return {
        "sample": noise(2, 4, size, size),
        "timestep": torch.tensor(500.0, device="cuda"),
        "encoder_hidden_states": noise(2, 77, 2048),
        "added_cond_kwargs": {
            "text_embeds": noise(2, 1280),
            "time_ids": torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * 2, device="cuda", dtype=torch.float16),
        },
        "return_dict": False,
    }


def milliseconds(call: Callable[[], object]) -> float:
    for _ in range(WARM):
        call()
    times = []
    for _ in range(TIMED):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 2)


@torch.no_grad()
def measure(unet: nn.Module, size: int) -> dict[str, float]:
    """Milliseconds of a call by Python and by a graph; GiB of what the denoiser stores, and at the peak of a call; the
    seconds that the first call takes."""
    values = inputs(unet, size)
    begin = time.perf_counter()
    unet(**values)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    python = milliseconds(lambda: unet(**values))
    peak = torch.cuda.max_memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        unet(**values)
    return {
        "python_ms": python,
        "graph_ms": milliseconds(graph.replay),
        "stored_gib": round(stored_bytes(unet) / 2**30, 2),
        "peak_gib": round(peak / 2**30, 2),
        "first_call_s": round(first, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--of", nargs="+", default=ALL, help="float16, or names of recipes")
    parser.add_argument("--small", action="store_true", help="a narrow model of the same kind")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks/step.json"))
    args = parser.parse_args()
    shape = ((64, 128, 256), 1, 32) if args.small else ((320, 640, 1280), 10, 128)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "qdiff": qdiff.__version__,
        "date": datetime.date.today().isoformat(),
    }
    for name in args.of:
        pipe = build(args.assets, "cuda", *shape)
        unet: nn.Module = pipe.unet
        unet.to(memory_format=torch.contiguous_format if name == "float16 contiguous" else torch.channels_last)
        if name not in FLOAT:
            quantize_pipeline(pipe, recipe=name, calibration=Calibration(prompts=["a red fox"], steps=2))
        if name == "float16 compiled":
            unet = torch.compile(unet, fullgraph=True)  # type: ignore[assignment]
        result[name] = measure(unet, shape[2])
        print(name, result[name], flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        del pipe, unet


if __name__ == "__main__":
    main()
