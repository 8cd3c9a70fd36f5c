"""Time the CUDA kernels at the shapes of four denoisers against cuBLAS and cuDNN: the README's table.

    python scripts/bench_kernels.py --json assets/benchmarks/kernels.json

Every distinct linear layer and convolution of SDXL, SD 1.5, PixArt-XL and FLUX (`scripts/kernel_shapes.py`). Ours is
what a layer runs: the input's quantization, with smoothing, and the product, with bias. fp16 is `F.linear` and
`F.conv2d` (channels-last, cuDNN's benchmark mode; once more without bias, which torch adds in a pass of its own). fp8
is `torch._scaled_mm` with its input's quantization, in the fastest of three ways. All in one process, competitors in
turn: `kernel_bench/timing.py` says how. Before a shape is timed, its integers are compared with `torch._int_mm`.

    python scripts/bench_kernels.py --tile-sweep [--path mma]

makes the table of tiles that the package ships for this GPU, `qdiff/ops/tiles/sm_<capability>.json`: every tile of one
matrix kernel at every shape, without quantization. What the table says about other shapes, and about the other kernel,
stays as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_bench import sections, table
from kernel_bench.fused import fused
from kernel_bench.problems import ConvShape, LinearShape, merged
from kernel_bench.shapes import read_shapes

import qdiff
from qdiff.ops import _gemm, backend

SECTIONS = ("linear", "small", "conv", "quantize", "fused", "peak", "overhead", "first-call")
QUICK_STEP = 6


def main() -> None:
    arguments = parse_arguments()
    shapes = read_shapes()
    models = arguments.models or list(shapes["models"])
    step = QUICK_STEP if arguments.quick else 1
    linears = merged(shapes["linear"], LinearShape, models)[::step]
    convs = merged(shapes["conv2d"], ConvShape, models)[::step]
    measures: dict[str, Callable[[], Iterator[sections.Row]]] = {
        "linear": lambda: sections.linear(linears),
        "small": lambda: sections.small(linears),
        "conv": lambda: sections.conv(convs),
        "quantize": sections.quantize,
        "fused": fused,
        "peak": sections.peak,
        "overhead": sections.overhead,
        "first-call": sections.first_call,
    }
    if arguments.tile_sweep:
        chosen: dict[str, Any] = {"tile_sweep": lambda: sections.tile_sweep(linears, convs)}
    else:
        chosen = {name.replace("-", "_"): measures[name] for name in arguments.only or SECTIONS}
    found: table.Sections = {name: [] for name in chosen}
    start = time.perf_counter()
    backend.set_backend("cuda")
    path = contextlib.nullcontext() if arguments.path == "auto" else _gemm.forced_path(arguments.path)
    try:
        with path, torch.no_grad():
            for name, measure in chosen.items():
                for row in measure():
                    found[name].append(row)
    finally:  # a device that breaks half way leaves what was measured
        about = describe(arguments, time.perf_counter() - start)
        print("\n".join([*table.lines(found), "", ", ".join(f"{key} {value}" for key, value in about.items())]))
        if arguments.json:
            summary = table.summary(found)
            text = json.dumps({**about, "shapes": shapes["models"], "summary": summary, "sections": found}, indent=1)
            arguments.json.write_text(text + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(read_shapes()["models"]), help="default: all")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections; default: all")
    parser.add_argument("--quick", action="store_true", help=f"every {QUICK_STEP}th shape")
    parser.add_argument("--path", choices=("auto", "wgmma", "mma"), default="auto", help="which matrix kernel")
    parser.add_argument("--tile-sweep", action="store_true", help="instead: make the table of tiles")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    return parser.parse_args()


def describe(arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    import cupy

    return {
        "device": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds),
        "path": arguments.path,
        "qdiff": qdiff.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "cupy": cupy.__version__,
        "triton": triton.__version__,
    }


if __name__ == "__main__":
    main()
