"""Kernels of `cuda/`: compiled on this machine when they are first needed, and kept on disk.

CuPy brings NVRTC and the driver's launch call. Its own compile path appends an -arch to every compilation, which rules
out the targets with an "a" that Hopper's instructions need (NVRTC before 13 refuses a second -arch), so sources are
compiled by NVRTC directly and loaded as a file.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qdiff.ops._cuda_sources import cuda_source_dir
from qdiff.ops._launch import Kernel, driver

Defines = tuple[tuple[str, int | str], ...]

_OLDEST = (7, 5)
# Capabilities with instructions that a target must ask for by an "a", and the first NVRTC that knows the target.
_ARCH_SPECIFIC = {(9, 0): (12, 0), (10, 0): (12, 8), (12, 0): (12, 8)}
_INSTALL = (
    "install CuPy for the driver's CUDA with its headers, `pip install 'cupy-cuda13x[ctk]'` or 'cupy-cuda12x[ctk]'"
)

_kernels: dict[tuple[int, str, Defines], Kernel] = {}


def kernel(source: str, defines: Defines = ()) -> Kernel:
    """The kernel `source` of `cuda/<source>.cu` for the current device; compiled once for each machine, when it is
    first launched.

    Args:
        source: names the file and its entry point, `extern "C" __global__ void <source>(const __grid_constant__ P p)`.
        defines: (name, value) pairs of preprocessor macros.
    """
    key = (torch.cuda.current_device(), source, defines)
    found = _kernels.get(key)
    return found if found is not None else _kernels.setdefault(key, _kernel(*key))


@lru_cache
def unusable(index: int) -> str | None:
    """Why kernels cannot run on the CUDA device of this index, or None when they can."""
    device = torch.device("cuda", index)
    try:
        cupy = _import_cupy()
        cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        return f"CuPy does not load ({error}); {_INSTALL}"
    except RuntimeError as error:
        return f"CuPy finds no usable driver ({error}); {_INSTALL}"
    if capability(device) < _OLDEST:
        major, minor = capability(device)
        return f"compute capability {major}.{minor}, expected {_OLDEST[0]}.{_OLDEST[1]} or later"
    if _headers() is None:
        return f"cuda_fp16.h is not found; {_INSTALL}, or set CUDA_PATH to a CUDA toolkit"
    return None


def cuda_ready(device: torch.device) -> bool:
    """Whether kernels can run on this CUDA device."""
    return unusable(torch.cuda.current_device() if device.index is None else device.index) is None


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability, (9, 0) for an H100."""
    return torch.cuda.get_device_capability(device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tensor_map_encoder(mode: str) -> Callable[..., int]:
    """The driver's cuTensorMapEncodeTiled or -Im2col (CUDA 12 and later), for ctypes values; returns a CUresult."""
    encode: Callable[..., int] = getattr(driver(), f"cuTensorMapEncode{mode}")
    return encode


def _kernel(device: int, source: str, defines: Defines) -> Kernel:
    arch = capability(torch.device("cuda", device))
    binary = _Binary(source, defines, arch)
    return Kernel(source, device, arch >= (9, 0), binary.path.is_file, binary.load)


class _Binary:
    """A kernel's machine code for GPUs of a capability.

    Attributes:
        path: of the file, which is there if an earlier process has made it.
    """

    def __init__(self, source: str, defines: Defines, arch: tuple[int, int]) -> None:
        self._source, self._folder, version = source, cuda_source_dir(), _import_cupy().cuda.nvrtc.getVersion()
        specific = "a" if arch in _ARCH_SPECIFIC and version >= _ARCH_SPECIFIC[arch] else ""
        target = f"-arch=sm_{arch[0]}{arch[1]}{specific}"
        self._options = ("-std=c++17", "-default-device", target, *(f"-D{name}={value}" for name, value in defines))
        # The folder's hash stands for the headers that the source includes.
        key = repr((source, self._options, version, _source_hash(self._folder)))
        self.path = cache_folder() / f"qdiff_{source}_{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"

    def load(self) -> Any:
        """A cupy.RawModule on the current device, made first if need be."""
        cupy = _import_cupy()
        if not self.path.is_file():
            name = f"{self._source}.cu"
            code = (self._folder / name).read_text(encoding="utf-8")
            options = (*self._options, f"-I{self._folder / 'include'}", f"-I{_headers()}")
            write(self.path, _compile(cupy.cuda.nvrtc, name, code, options))
        return cupy.RawModule(path=str(self.path))


def _compile(nvrtc: Any, name: str, code: str, options: tuple[str, ...]) -> bytes:
    program = nvrtc.createProgram(code, name, (), ())
    try:
        nvrtc.compileProgram(program, options)
        machine_code: bytes = nvrtc.getCUBIN(program)
    except RuntimeError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(
            f"{name} does not compile with {' '.join(options)}; qdiff.ops.set_backend('reference') does without: {log}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)
    return machine_code


def write(path: Path, content: bytes) -> None:
    # Another process may do the same at the same time: each writes a file of its own, and the last one stays.
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)


@lru_cache(maxsize=1)
def _source_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.cu*")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _import_cupy() -> Any:
    if "cupy" not in sys.modules:
        os.environ["CUPY_CACHE_DIR"] = str(cache_folder())  # CuPy makes it on import, and fails where it cannot
    import cupy

    return cupy


@lru_cache(maxsize=1)
def cache_folder() -> Path:
    """CuPy's folder for compiled kernels; where it cannot be written, one that is gone when this process ends."""
    folder = Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="qdiff-kernels-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder


@lru_cache(maxsize=1)
def _headers() -> Path | None:
    """The folder of cuda_fp16.h: of NVIDIA's wheels, or of a CUDA toolkit."""
    for find in (_beside_nvrtc, _pathfinder):
        root = find()
        for folder in () if root is None else (Path(root), Path(root) / "include"):
            if (folder / "cuda_fp16.h").is_file():
                return folder
    return None


def _pathfinder() -> str | None:
    try:
        from cuda import pathfinder  # type: ignore[attr-defined]  # of a namespace package
    except ImportError:
        return None
    root: str | None = pathfinder.find_nvidia_header_directory("cudart")
    return root


def _beside_nvrtc() -> str | None:
    root: str | None = _import_cupy().cuda.get_cuda_path()
    return root
