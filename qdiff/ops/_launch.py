"""Launching kernels by the driver's own call, on torch's stream, the quick way."""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from qdiff.ops import rehearsal

_Pointers = ctypes.c_void_p * 1
_MOST_STREAMS = 256  # that a launcher keeps a configuration for


@lru_cache(maxsize=1)
def driver() -> Any:
    """The driver's library."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


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
    """One kernel on one device, loaded when it is first launched.

    Args:
        name: of the entry point.
        device: its index.
        overlaps: the kernel may be set up while the one before it on the stream runs: it waits itself
            (cuda/include/dependent.cuh).
        is_compiled: whether its machine code is there.
        load: makes the cupy.RawModule that is loaded on the device, which is the current one; compiles it if need be.
    """

    def __init__(
        self, name: str, device: int, overlaps: bool, is_compiled: Callable[[], bool], load: Callable[[], Any]
    ) -> None:
        self.name, self.device = name, device
        self._is_compiled, self._load = is_compiled, load
        self._module: Any = None
        self._function: Any = None
        self._shared_bytes = 48 * 1024  # what a block may have without asking
        self._lock = threading.Lock()
        self._attribute = _Attribute(_SERIALIZATION, 0, 1)
        self.attributes = (ctypes.pointer(self._attribute), 1) if overlaps else (None, 0)

    def launcher(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        layout: struct.Struct,
        rest: bytes = b"",
        cluster: int = 0,
    ) -> Launcher:
        """What starts the kernel, again and again.

        Args:
            grid: blocks in x, y, z; nothing is started when one of them is 0.
            threads: of a block.
            shared_bytes: dynamic shared memory of a block.
            layout: of what changes from one launch to the next, the beginning of the kernel's only parameter.
            rest: of the parameter.
            cluster: blocks of a cluster, where clusters do the work of several if not all of them fit the device at
                once: then fewer are started.
        """
        return Launcher(self, grid, threads, shared_bytes, layout, rest, cluster)

    def launch(self, grid: tuple[int, int, int], threads: int, shared_bytes: int, params: ctypes.Structure) -> None:
        """Start the kernel once: `launcher` with all of the parameter's bytes, which are copied before this returns."""
        self.launcher(grid, threads, shared_bytes, struct.Struct(""), bytes(params))()

    def load(self) -> None:
        """Have it on its device, which is the current one; compiled if need be.

        Raises:
            RuntimeError: the source does not compile; the message has the compiler's.
        """
        with self._lock:
            if self._function is None:
                self._module = self._load()  # which has to live as long as the function
                self._function = self._module.get_function(self.name)

    def pointer(self, shared_bytes: int) -> ctypes.c_void_p:
        """The driver's handle of the kernel, blocks of which may have so much dynamic shared memory; loads it."""
        if self._function is None and not self._is_compiled():
            rehearsal.rehearse_expected()
        self.load()
        with self._lock:
            if shared_bytes > self._shared_bytes:
                self._function.max_dynamic_shared_size_bytes = shared_bytes
                self._shared_bytes = shared_bytes
        return ctypes.c_void_p(self._function.kernel.ptr)

    def clusters(self, size: int, threads: int, shared_bytes: int) -> int:
        """How many clusters of `size` such blocks the device runs at once."""
        cluster = _Attribute(_CLUSTER, 0, size, (ctypes.c_int * 15)(1, 1))
        config = _Config(size, 1, 1, threads, 1, 1, shared_bytes, None, ctypes.pointer(cluster), 1)
        most, function = ctypes.c_int(), self.pointer(shared_bytes)
        result = driver().cuOccupancyMaxActiveClusters(ctypes.byref(most), function, ctypes.byref(config))
        if result or most.value < 1:
            raise RuntimeError(
                f"{self.name}: the driver knows of no {size} blocks of {threads} threads with {shared_bytes} bytes of "
                f"shared memory that the device could run (CUresult {result})"
            )
        return most.value


def no_more_than(most: int, clusters: int) -> int:
    """How many clusters share the work of so many evenly."""
    return -(-clusters // max(1, -(-clusters // most)))


class Launcher:
    """Starts a kernel on torch's current stream of its device, which must be the current one; see `Kernel.launcher`.

    Threads share it: a launch takes a parameter block, and the configuration of a stream never changes.
    """

    __slots__ = (
        "_cluster",
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
        cluster: int,
    ) -> None:
        self._kernel, self._device = kernel, kernel.device
        self._shape, self._layout, self._rest, self._cluster = (grid, threads, shared_bytes), layout, rest, cluster
        self._pack = layout.pack_into
        self._launch = driver().cuLaunchKernelEx  # CuPy's own call takes no attributes
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
            if not all(self._shape[0]) or rehearsal.wants(self._kernel):
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
        self._pointer = self._kernel.pointer(shared_bytes)
        if self._cluster:
            most = self._kernel.clusters(self._cluster, threads, shared_bytes)
            grid = (no_more_than(most, grid[0] // self._cluster) * self._cluster, 1, 1)
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
