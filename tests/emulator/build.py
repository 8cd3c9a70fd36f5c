"""Kernels of `cuda/` as functions that run on the CPU, through `emulate.h`; and arrays that end where memory does."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qdiff.ops._cuda_sources import cuda_source_dir

HERE = Path(__file__).parent

_MAIN = """
#define QDIFF_EMULATE
{defines}
#include "emulate.h"
#include "{source}.cu"

extern "C" const char* run(const unsigned* grid, const unsigned* block, size_t shared_bytes, const void* params) {{
    Params copy;
    std::memcpy(&copy, params, sizeof(copy));
    return emulate::run({{grid[0], grid[1], grid[2]}}, {{block[0], block[1], block[2]}}, shared_bytes, {cluster},
                        [&] {{ {source}(copy); }});
}}
extern "C" size_t params_bytes() {{ return sizeof(Params); }}
extern "C" long bank_conflicts() {{ return emulate::bank_conflicts; }}
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
    if not library.exists():
        main.write_text(text)
        # The emulator's folder goes first: its cuda_fp16.h stands in for the toolkit's.
        folders = [f"-I{path}" for path in (HERE, cuda_source_dir(), cuda_source_dir() / "include")]
        options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w"]
        subprocess.run([compiler, *options, *folders, str(main), "-o", str(library)], check=True)
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
