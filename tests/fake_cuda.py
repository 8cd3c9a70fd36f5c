"""A CuPy, a compiler and a driver that only write down what they are asked."""

import contextlib
import ctypes
import sys
import threading
import types

import torch

from qdiff.ops import _cupy, _launch


class Params(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("rows", ctypes.c_int))


class FakeNvrtc:
    """Compiles a source to its options.

    by, before: of every compilation, the thread, and how many launches there had been.
    """

    def __init__(self, launches):
        self.version, self.compiled, self.error, self.live = (13, 0), [], None, 0
        self.by, self.before, self.launches = [], [], launches

    def getVersion(self):  # noqa: N802
        return self.version

    def createProgram(self, code, name, headers, include_names):  # noqa: N802
        self.live += 1
        return code, name

    def compileProgram(self, program, options):  # noqa: N802
        self.compiled.append((*program, options))
        self.by.append(threading.current_thread())
        self.before.append(len(self.launches))
        if self.error:
            raise RuntimeError("NVRTC_ERROR_COMPILATION")

    def getCUBIN(self, program):  # noqa: N802
        return repr(program).encode()

    def getProgramLog(self, program):  # noqa: N802
        return self.error

    def destroyProgram(self, program):  # noqa: N802
        self.live -= 1


class FakeModule:
    def __init__(self, path):
        self.path, self.function = path, types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=4242))

    def get_function(self, name):
        self.name = name
        return self.function


class FakeCupy(types.ModuleType):
    def __init__(self):
        super().__init__("cupy")
        self.launches, self.failures, self.RawModule = [], [], lambda *, path: FakeModule(path)
        self.cuda = types.SimpleNamespace(
            nvrtc=FakeNvrtc(self.launches),
            runtime=types.SimpleNamespace(getDeviceCount=lambda: 1),
            get_cuda_path=lambda: None,
        )

    def cuLaunchKernelEx(self, config, function, pointers, extra):  # noqa: N802
        """The driver's launch, which CuPy does not have."""
        if self.failures:
            return self.failures.pop()
        c = config._obj
        params = ctypes.cast(pointers[0], ctypes.POINTER(Params)).contents
        shape = (c.x, c.y, c.z, c.threads, c.threads_y, c.threads_z, c.shared_bytes, c.stream)
        attributes = [(c.attributes[i].id, c.attributes[i].value) for i in range(c.count)]
        self.launches.append((function.value, *shape, params.pointer, params.rows, attributes))
        return 0


@contextlib.contextmanager
def installed(tmp_path, monkeypatch):
    """A folder of sources, the fake CuPy, and a current device 0 of capability 9.0."""
    forget()
    yield _install(tmp_path, monkeypatch)
    forget()


def _install(tmp_path, monkeypatch):
    sources, headers = tmp_path / "cuda", tmp_path / "toolkit" / "include"
    (sources / "include").mkdir(parents=True)
    headers.mkdir(parents=True)
    (headers / "cuda_fp16.h").touch()
    (sources / "add.cu").write_text("code")
    (sources / "include" / "tile.cuh").write_text("header")
    cupy = FakeCupy()
    cupy.cuda.get_cuda_path = lambda: str(headers.parent)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    for module in (_cupy, _launch):
        monkeypatch.setattr(module, "driver", lambda: cupy)
    monkeypatch.setattr(_cupy, "cuda_source_dir", lambda: sources)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    return types.SimpleNamespace(
        cupy=cupy, nvrtc=cupy.cuda.nvrtc, sources=sources, headers=headers, Params=Params, forget=forget
    )


def forget():
    """What a new process would not know."""
    _cupy._kernels.clear()
    for cached in (_cupy.unusable, _cupy.capability, _cupy._source_hash, _cupy.cache_folder, _cupy._headers):
        cached.cache_clear()
