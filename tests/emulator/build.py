"""Kernels of `cuda/` as functions that run on the CPU, through `emulate.h`; and arrays that end where memory does.

What does the emulating is compiled once a session and linked to every variant of a kernel, which takes a tenth of the
time that it takes to compile both together. Processes that share a folder compile nothing twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import mmap
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qdiff.ops._cuda_sources import cuda_source_dir
from qdiff.ops._launch import no_more_than

HERE = Path(__file__).parent

_MACHINE = ("machine", "emulate", "emulate_sm90")
_MAIN = """
{defines}
#include "emulate.h"
#include "{source}.cu"

static Params params;
static void kernel() {{ {source}(params); }}

extern "C" const char* run(const unsigned* grid, const unsigned* block, size_t shared_bytes, const void* from) {{
    std::memcpy(&params, from, sizeof(params));
    const dim3 blocks = {{grid[0], grid[1], grid[2]}}, threads = {{block[0], block[1], block[2]}};
    return emulate::run(blocks, threads, shared_bytes, {cluster}, kernel);
}}
extern "C" size_t params_bytes() {{ return sizeof(Params); }}
"""

Launch = Callable[[tuple[int, int, int], tuple[int, int, int], int, ctypes.Structure], None]


def load(source: str, defines: tuple[tuple[str, int | str], ...], folder: Path) -> Launch:
    """Compile cuda/<source>.cu into `folder`, and return `launch(grid, block, shared_bytes, params)`.

    `launch` raises a RuntimeError for what the emulator finds wrong: a deadlock, a stray or misaligned address, bank
    conflicts of ldmatrix, a `params` that is not laid out as the kernel's. Skips the test where there is no g++.
    A macro SPLIT says how many blocks make a cluster.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the CPU emulator of CUDA kernels needs g++")
    text = _MAIN.format(
        source=source,
        defines="\n".join(f"#define {name} {value}" for name, value in defines),
        cluster=dict(defines).get("SPLIT", 1),
    )
    stem = folder / f"{source}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    main, library = stem.with_suffix(".cpp"), stem.with_suffix(".so")
    with _alone(folder / "machine"):
        machine = [folder / f"{part}.o" for part in _MACHINE]
        for part in machine:
            if not part.exists():
                _compile(compiler, "-c", HERE / f"{part.stem}.cpp", part)
    with _alone(stem):
        if not library.exists():
            main.write_text(text)
            _compile(compiler, "-shared", main, *machine, library)
    code = ctypes.CDLL(str(library))
    code.run.restype = ctypes.c_char_p
    code.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    code.params_bytes.restype = ctypes.c_size_t
    code.bank_conflicts.restype = ctypes.c_long

    def launch(
        grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int, params: ctypes.Structure
    ) -> None:
        if ctypes.sizeof(params) != code.params_bytes():
            raise RuntimeError(f"params: got {ctypes.sizeof(params)} bytes, the kernel's have {code.params_bytes()}")
        three = ctypes.c_uint * 3
        error = code.run(three(*grid), three(*block), shared_bytes, ctypes.byref(params))
        if error is None and code.bank_conflicts():
            error = f"{code.bank_conflicts()} bank conflicts of ldmatrix".encode()
        if error is not None:
            raise RuntimeError(error.decode() + _whose(error.decode()))

    return launch


def _compile(compiler: str, *arguments: str | Path) -> None:
    """Run g++ on all but the last of the arguments, which is the file to make."""
    *rest, result = arguments
    # The emulator's folder goes first: its cuda_fp16.h stands in for the toolkit's.
    folders = [f"-I{path}" for path in (HERE, cuda_source_dir(), cuda_source_dir() / "include")]
    # Without -fno-gnu-unique a __shared__ array of an inline function would be one for all variants in the process,
    # with the size of the first.
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique", "-fPIC", "-w"]
    made = result.with_suffix(".part")
    subprocess.run([compiler, "-DQDIFF_EMULATE", *options, *folders, *map(str, rest), "-o", str(made)], check=True)
    made.rename(result)


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Where one process at a time is, of those that share a folder."""
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class EmulatedKernel:
    """`_launch.Kernel` over a function that `load` made."""

    def __init__(self, run: Launch) -> None:
        self.run = run

    def launch(self, grid: tuple[int, int, int], threads: int, shared_bytes: int, params: ctypes.Structure) -> None:
        """Start it once."""
        self.run(grid, (threads, 1, 1), shared_bytes, params)

    def launcher(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        layout: struct.Struct,
        rest: bytes,
        cluster: int = 0,
    ) -> Callable[..., None]:
        """What starts it with these values, and the rest."""
        if cluster:  # so few that some of them have several tiles
            grid = (no_more_than(2, grid[0] // cluster) * cluster, 1, 1)

        def start(*values: Any) -> None:
            params = layout.pack(*values) + rest
            self.launch(grid, threads, shared_bytes, ctypes.create_string_buffer(params, len(params)))

        return start


_guards: dict[int, str] = {}


def guarded(tensor: torch.Tensor, alignment: int | None = None) -> torch.Tensor:
    """A copy of `tensor` with its strides, after which the process has no memory: a kernel's read there is an error.

    Between its end and the void are as few bytes as let it start at a multiple of `alignment`; by default as far from
    a multiple of 16 as `tensor` starts.
    """
    if tensor.numel() == 0:
        return tensor
    start = 0 if alignment else tensor.data_ptr() % 16
    alignment = alignment or 16
    size = tensor.element_size()
    count = 1 + sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride()))
    room = -(-(start + count * size) // alignment) * alignment - start
    data = -(-room // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, data + mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + data), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
        raise OSError("mprotect failed")
    _guards[base + data] = f"{tensor.dtype} {tuple(tensor.shape)}"
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=data - room)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def _whose(error: str) -> str:
    found = re.search(r"0x[0-9a-f]+", error)
    page = int(found[0], 16) // mmap.PAGESIZE * mmap.PAGESIZE if found else 0
    return f", just after an array of {_guards[page]}" if page in _guards else ""
