"""Run every quantized layer of SDXL once in a process of its own, as the first call of a denoiser does, and print how
long that took."""

from __future__ import annotations

import json
import time

import torch

from kernel_bench.problems import ConvProblem, ConvShape, LinearProblem, LinearShape, merged
from kernel_bench.shapes import read_shapes
from qdiff.ops import _cupy, backend
from qdiff.ops.rehearsal import rehearsal


def run(problems: list[LinearProblem | ConvProblem]) -> None:
    """Each in every way that the default recipe has."""
    for problem in problems:
        problem.w4a8(0), problem.w8a8(0)
        if isinstance(problem, LinearProblem) and len(problem.x[0]) <= 16:
            problem.w4a16(0)


def main() -> None:
    shapes = read_shapes()
    linears = [LinearProblem(shape, 1) for shape in merged(shapes["linear"], LinearShape, ["sdxl"])]
    convs = [ConvProblem(shape, 1) for shape in merged(shapes["conv2d"], ConvShape, ["sdxl"])]
    backend.set_backend("cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    _cupy.cuda_ready(torch.device("cuda", 0))
    imported = time.perf_counter() - start
    with rehearsal():
        run([*linears, *convs])
    compiled = time.perf_counter() - start
    run([*linears, *convs])
    torch.cuda.synchronize()
    parts = {"of_which_import_of_cupy": imported, "of_which_compiling": compiled - imported}
    print(json.dumps({"seconds": time.perf_counter() - start} | parts))


if __name__ == "__main__":
    with torch.no_grad():
        main()
