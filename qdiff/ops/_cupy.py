"""Kernels of `cuda/`: compiled on this machine when they are first needed, kept on disk, launched on torch's stream.

CuPy brings NVRTC and the driver's launch call. Its own compile path appends an -arch to every compilation, which rules
out the targets with an "a" that Hopper's instructions need (NVRTC before 13 refuses a second -arch), so sources are
compiled by NVRTC directly and loaded as a file.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shutil
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qdiff.ops._cuda_sources import cuda_source_dir

Defines = tuple[tuple[str, int | str], ...]

_OLDEST = (7, 5)
# Capabilities with instructions that a target must ask for by an "a", and the first NVRTC that knows the target.
_ARCH_SPECIFIC = {(9, 0): (12, 0), (10, 0): (12, 8), (12, 0): (12, 8)}
_INSTALL = (
    "install CuPy for the driver's CUDA with its headers, `pip install 'cupy-cuda13x[ctk]'` or 'cupy-cuda12x[ctk]'"
)
_Pointers = ctypes.c_void_p * 1
_MOST_STREAMS = 256  # that a launcher keeps a configuration for


class _Attribute(ctypes.Structure):
    """The driver's CUlaunchAttribute: programmatic stream serialization, on; or a cluster's blocks in x, y, z."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15)]


class _Config(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "threads", "threads_y", "threads_z", "shared_bytes")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_NOT_SET_UP = 201  # CUDA_ERROR_INVALID_CONTEXT


class Kernel:
    """One compiled kernel, loaded on one device.

    Args:
        module: a cupy.RawModule that is loaded on the device; kept alive.
        name: of the entry point.
        device: its index.
        overlaps: the kernel may be set up while the one before it on the stream runs: it waits itself
            (cuda/include/dependent.cuh).
    """

    def __init__(self, module: Any, name: str, device: int, overlaps: bool) -> None:
        self.name, self.device = name, device
        self._module, self._function = module, module.get_function(name)
        self.pointer = ctypes.c_void_p(self._function.kernel.ptr)
        self._shared_bytes = 48 * 1024  # what a block may have without asking
        self._lock = threading.Lock()
        self._attribute = _Attribute(_SERIALIZATION, 0, 1)
        self.attributes = (ctypes.pointer(self._attribute), 1) if overlaps else (None, 0)

    def launcher(
        self, grid: tuple[int, int, int], threads: int, shared_bytes: int, layout: struct.Struct, rest: bytes = b""
    ) -> Launcher:
        """What starts the kernel, again and again.

        Args:
            grid: blocks in x, y, z; nothing is started when one of them is 0.
            threads: of a block.
            shared_bytes: dynamic shared memory of a block.
            layout: of what changes from one launch to the next, the beginning of the kernel's only parameter.
            rest: of the parameter.
        """
        self._allow(shared_bytes)
        return Launcher(self, grid, threads, shared_bytes, layout, rest)

    def launch(self, grid: tuple[int, int, int], threads: int, shared_bytes: int, params: ctypes.Structure) -> None:
        """Start the kernel once: `launcher` with all of the parameter's bytes, which are copied before this returns."""
        self.launcher(grid, threads, shared_bytes, struct.Struct(""), bytes(params))()

    def clusters(self, size: int, threads: int, shared_bytes: int) -> int:
        """How many clusters of `size` such blocks the device runs at once."""
        self._allow(shared_bytes)
        cluster = _Attribute(_CLUSTER, 0, size, (ctypes.c_int * 15)(1, 1))
        config = _Config(size, 1, 1, threads, 1, 1, shared_bytes, None, ctypes.pointer(cluster), 1)
        most = ctypes.c_int()
        result = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(most), self.pointer, ctypes.byref(config))
        if result or most.value < 1:
            raise RuntimeError(
                f"{self.name}: the driver knows of no {size} blocks of {threads} threads with {shared_bytes} bytes of "
                f"shared memory that the device could run (CUresult {result})"
            )
        return most.value

    def _allow(self, shared_bytes: int) -> None:
        with self._lock:
            if shared_bytes > self._shared_bytes:
                self._function.max_dynamic_shared_size_bytes = shared_bytes
                self._shared_bytes = shared_bytes


class Launcher:
    """Starts a kernel on torch's current stream of its device, which must be the current one; see `Kernel.launcher`.

    Threads share it: a launch takes a parameter block, and the configuration of a stream never changes.
    """

    __slots__ = (
        "_configs",
        "_device",
        "_free",
        "_kernel",
        "_launch",
        "_layout",
        "_pack",
        "_pointer",
        "_rest",
        "_shape",
    )

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        layout: struct.Struct,
        rest: bytes,
    ) -> None:
        self._kernel, self._device, self._pointer = kernel, kernel.device, kernel.pointer
        self._shape, self._layout, self._rest = (grid, threads, shared_bytes), layout, rest
        self._pack = layout.pack_into
        self._launch = _driver().cuLaunchKernelEx  # CuPy's own call takes no attributes
        self._configs: dict[int, Any] = {}
        self._free: list[tuple[Any, Any]] = []  # parameter blocks that no launch is filling

    @property
    def name(self) -> str:
        """The kernel's."""
        return self._kernel.name

    def __call__(self, *values: Any) -> None:
        """Start the kernel with these values in the layout; they are copied before this returns."""
        try:
            block = self._free.pop()
        except IndexError:
            block = self._block()
        params, pointers = block
        self._pack(params, 0, *values)
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        config = self._configs.get(stream)
        if config is None:
            if not all(self._shape[0]):
                return
            config = self._configure(stream)
        result = self._launch(config, self._pointer, pointers, None)
        if result:
            self._again(result, config, pointers)
        self._free.append(block)

    def _block(self) -> tuple[Any, Any]:
        """A parameter block, and the driver's pointer to it."""
        params = ctypes.create_string_buffer(bytes(self._layout.size) + self._rest, self._layout.size + len(self._rest))
        return params, _Pointers(ctypes.addressof(params))

    def _configure(self, stream: int) -> Any:
        """The launch's configuration by reference, which is kept."""
        grid, threads, shared_bytes = self._shape
        config = ctypes.byref(_Config(*grid, threads, 1, 1, shared_bytes, stream, *self._kernel.attributes))
        if len(self._configs) >= _MOST_STREAMS:
            self._configs.clear()
        self._configs[stream] = config
        return config

    def _again(self, result: int, config: Any, pointers: Any) -> None:
        if result == _NOT_SET_UP:
            torch.cuda.set_device(self._device)  # a thread that has not used the device yet has no context
            result = self._launch(config, self._pointer, pointers, None)
        if result:
            grid, threads, shared_bytes = self._shape
            raise RuntimeError(
                f"{self.name}: the driver refused to launch {grid} blocks of {threads} threads with "
                f"{shared_bytes} bytes of shared memory (CUresult {result})"
            )


_kernels: dict[tuple[int, str, Defines], Kernel] = {}


def kernel(source: str, defines: Defines = ()) -> Kernel:
    """The kernel `source` of `cuda/<source>.cu` for the current device; compiled once for each machine.

    Args:
        source: names the file and its entry point, `extern "C" __global__ void <source>(const __grid_constant__ P p)`.
        defines: (name, value) pairs of preprocessor macros.

    Raises:
        RuntimeError: the source does not compile; the message has the compiler's.
    """
    key = (torch.cuda.current_device(), source, defines)
    found = _kernels.get(key)
    # Two threads may both get here: they then compile the same thing, and one of them is kept.
    return found if found is not None else _kernels.setdefault(key, _load(*key))


def compile_all(wanted: Iterable[tuple[str, Defines]], threads: int = 8) -> None:
    """Make these (source, defines) for the current device at once, in parallel: first calls then do not wait."""
    device = torch.cuda.current_device()

    def make(item: tuple[str, Defines]) -> None:
        with torch.cuda.device(device):
            kernel(*item)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(make, wanted))


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
    encode: Callable[..., int] = getattr(_driver(), f"cuTensorMapEncode{mode}")
    return encode


@lru_cache(maxsize=1)
def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _load(device: int, source: str, defines: Defines) -> Kernel:
    cupy = _import_cupy()
    path = _compiled(cupy.cuda.nvrtc, source, defines, capability(torch.device("cuda", device)))
    overlaps = capability(torch.device("cuda", device)) >= (9, 0)
    return Kernel(cupy.RawModule(path=str(path)), source, device, overlaps)


def _compiled(nvrtc: Any, source: str, defines: Defines, arch: tuple[int, int]) -> Path:
    """The file of the machine code, made unless an earlier process has."""
    folder, version = cuda_source_dir(), nvrtc.getVersion()
    specific = "a" if arch in _ARCH_SPECIFIC and version >= _ARCH_SPECIFIC[arch] else ""
    target = f"-arch=sm_{arch[0]}{arch[1]}{specific}"
    options = ("-std=c++17", "-default-device", target, *(f"-D{name}={value}" for name, value in defines))
    # The folder's hash stands for the headers that the source includes.
    key = hashlib.sha256(repr((source, options, version, _source_hash(folder))).encode()).hexdigest()[:32]
    path = cache_folder() / f"qdiff_{source}_{key}.cubin"
    if not path.is_file():
        code = (folder / f"{source}.cu").read_text(encoding="utf-8")
        write(path, _compile(nvrtc, f"{source}.cu", code, (*options, f"-I{folder / 'include'}", f"-I{_headers()}")))
    return path


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
