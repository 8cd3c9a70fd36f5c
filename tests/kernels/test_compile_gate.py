"""Every CUDA kernel compiles to machine code for every architecture, as it should: no GPU and no driver needed.

What is compiled is what the host side can ask for: its modules list their kernels in `VARIANTS`, as pairs of a source's
name and its defines. Building takes the time; so all of them are built for gemm_wgmma alone, and of the others as many
as it takes to have every value of every macro for every architecture, and every two values of two macros together: for
each architecture of `PAIRS`, and for one of those of `TOGETHER`. Machine code and not PTX, because the PTX of a faulty
wgmma sequence looks well. The options are those of `qdiff/ops/_cupy.py`.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cuda.core import Program, ProgramOptions
from cuda.pathfinder import find_nvidia_binary_utility, find_nvidia_header_directory

from qdiff.ops import _gemm_mma, _gemm_wgmma, _gptq_cuda, _group_norm_cuda, _quantize_cuda, _w4a16_cuda
from qdiff.ops._cuda_sources import cuda_source_dir

SOURCES = cuda_source_dir()
HOST_MODULES = (_gemm_mma, _gemm_wgmma, _gptq_cuda, _group_norm_cuda, _quantize_cuda, _w4a16_cuda)
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
PAIRS = ("sm_80", "sm_90a")
TOGETHER = ("sm_100a", "sm_120a")  # they run what was written for the two before them
# Sources that use what one architecture alone has: for it, all of their variants are built.
ONLY = {"gemm_wgmma": ("sm_90a",)}

# Registers a thread: some more than the largest that was seen (gemm_mma 255, gptq_descent 128, gptq_feedback 122,
# group_norm_sums 87, quantize_group_norm 95, quantize_per_sample 99, quantize_per_token 128, w4a16_linear 122,
# quantize_per_token_down 251), up to what their blocks can have. gemm_wgmma has what 384 threads can have.
REGISTERS = {
    "gemm_mma": 255,
    "gemm_wgmma": 168,
    "gptq_descent": 128,
    "gptq_feedback": 128,
    "group_norm_sums": 128,
    "quantize_group_norm": 112,
    "quantize_per_sample": 112,
    "quantize_per_token": 128,
    "quantize_per_token_down": 255,
    "w4a16_linear": 128,
}
# Tensor-core instructions that must be in the machine code: integer ones of a warp, or of a warp group.
TENSOR_CORE = {"gemm_mma": "IMMA", "gemm_wgmma": "IGMMA"}

# What ptxas says where it serializes wgmma instructions: the result is right and several times slower.
SERIALIZED = ("C7510", "C7512", "C7513", "C7520", "serialized")

Defines = tuple[tuple[str, int | str], ...]


class Job(NamedTuple):
    source: str
    defines: Defines
    arch: str

    def __str__(self) -> str:
        return "-".join([self.source, self.arch, *(f"{name}={value}" for name, value in self.defines)])


class Build(NamedTuple):
    log: str
    code: bytes


def variants() -> list[tuple[str, Defines]]:
    return list(dict.fromkeys(variant for module in HOST_MODULES for variant in module.VARIANTS))


def covering(variants: list[Defines], size: int, first: Sequence[Defines] = ()) -> list[Defines]:
    """Some of the variants, such that every combination of `size` macros' values in any of them is in one of these.

    Those that are `first` are among them.
    """
    combinations = {variant: set(itertools.combinations(variant, size)) for variant in variants}
    chosen = list(first) or variants[:1]  # where there are no macros, there is one variant
    missing = set().union(*combinations.values()).difference(*(combinations[variant] for variant in chosen))
    while missing:
        chosen.append(max(variants, key=lambda variant: len(combinations[variant] & missing)))
        missing -= combinations[chosen[-1]]
    return chosen


def all_jobs() -> list[Job]:
    by_source: dict[str, list[Defines]] = {}
    for source, defines in variants():
        by_source.setdefault(source, []).append(defines)
    return [
        Job(source, defines, arch)
        for source, group in by_source.items()
        for arch in ONLY.get(source, ARCHITECTURES)
        for defines in selection(source, group, arch)
    ]


def on_turing(source: str, defines: Defines) -> Defines | None:
    """The host side's choice there: fewer stages, and of the types that the tensor cores multiply, only float16."""
    asked = dict(defines)
    if source == "gemm_mma":
        asked["STAGES"] = 2
    elif (
        source in ("quantize_per_token_down", "w4a16_linear") and asked["TYPE"] != _quantize_cuda._TYPES[torch.float16]
    ):
        return None
    return tuple(asked.items())


def selection(source: str, group: list[Defines], arch: str) -> list[Defines]:
    if source in ONLY:
        return group
    if arch == "sm_75":
        turned = (on_turing(source, defines) for defines in group)
        group = list(dict.fromkeys(asked for asked in turned if asked is not None))
    if arch in TOGETHER:
        return covering(group, 1, covering(group, 2)[TOGETHER.index(arch) :: len(TOGETHER)])
    return covering(group, 2 if arch in PAIRS else 1)


@functools.cache
def first_of_each() -> frozenset[Job]:
    """One job for each source with a promise in `TENSOR_CORE`, and each architecture."""
    return frozenset({(j.source, j.arch): j for j in reversed(all_jobs()) if j.source in TENSOR_CORE}.values())


def build(job: Job) -> Build:
    path, log = SOURCES / f"{job.source}.cu", io.StringIO()
    options = ProgramOptions(
        name=path.name,
        arch=job.arch,
        std="c++17",
        device_as_default_execution_space=True,
        define_macro=[(name, str(value)) for name, value in job.defines] or None,
        include_path=[str(SOURCES / "include"), find_nvidia_header_directory("cudart")],
        ptxas_options=["-v"],
    )
    try:
        code = Program(path.read_text(encoding="utf-8"), "c++", options).compile("cubin", logs=log).code
    except Exception as error:  # noqa: BLE001  the compiler's own text is what a reader needs
        pytest.fail(f"{job}: {error}\n{log.getvalue()}")
    return Build(log.getvalue(), bytes(code))


def test_the_host_side_names_every_source():
    sources = {path.stem for path in SOURCES.glob("*.cu")}
    assert sources == {source for source, _ in variants()}


@pytest.mark.parametrize("job", all_jobs(), ids=str)
def test_compiles_without_spills_and_serialization(job, tmp_path):
    """And on tensor cores, where the source promises it."""
    log, code = build(job)
    used = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spill", log)]
    assert used, log
    assert spilled, log
    assert not any(spilled), log
    assert not any(text in log for text in SERIALIZED), log
    assert job.source in REGISTERS, f"set a bound for {job.source}: it uses {max(used)} registers"
    assert max(used) <= REGISTERS[job.source], log
    if job in first_of_each():
        assert re.search(rf"\b{TENSOR_CORE[job.source]}\.", disassembled(code, tmp_path / "kernel.cubin"))


def disassembled(code: bytes, cubin: Path) -> str:
    nvdisasm = find_nvidia_binary_utility("nvdisasm")
    assert nvdisasm is not None, "no nvdisasm: install nvidia-cuda-nvdisasm"
    cubin.write_bytes(code)
    return subprocess.run([nvdisasm, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout


def test_every_architecture_has_its_tensor_core_instructions_looked_for():
    looked_at = {(job.source, job.arch) for job in first_of_each()}
    assert looked_at == {(job.source, job.arch) for job in all_jobs() if job.source in TENSOR_CORE}
    assert {source for source, _ in looked_at} == set(TENSOR_CORE)


def test_covering():
    variants = [tuple(zip("ABC", values)) for values in itertools.product((0, 1, 2), (0, 1), (0, 1))]
    for size, fewest in ((1, 3), (2, 6)):
        chosen = covering(variants, size)
        assert {c for v in chosen for c in itertools.combinations(v, size)} == {
            c for v in variants for c in itertools.combinations(v, size)
        }
        assert fewest <= len(chosen) < len(variants)
    assert covering(variants, 1, variants[-2:])[:2] == variants[-2:]


def test_every_value_is_built_for_every_architecture_and_every_pair_for_those_that_promise_it():
    built: dict[tuple[str, str], list[Defines]] = {}
    for job in all_jobs():
        built.setdefault((job.source, job.arch), []).append(job.defines)
    for source in {source for source, _ in variants()} - ONLY.keys():
        asked = [defines for name, defines in variants() if name == source]
        for arch in set(ARCHITECTURES) - {"sm_75"}:
            assert combined(built[source, arch], 1) == combined(asked, 1)
        for arches in (*((arch,) for arch in PAIRS), TOGETHER):
            assert combined([defines for arch in arches for defines in built[source, arch]], 2) == combined(asked, 2)


def combined(variants: list[Defines], size: int) -> set[tuple[tuple[str, int | str], ...]]:
    return {c for variant in variants for c in itertools.combinations(variant, size)}
