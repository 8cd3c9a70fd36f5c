"""Compiling, keeping and launching, on a CuPy that only writes down what it is asked."""

import ctypes
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from qdiff.ops import _cupy


class Params(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("rows", ctypes.c_int))


class FakeNvrtc:
    """Compiles a source to its options."""

    def __init__(self):
        self.version, self.compiled, self.error, self.live = (13, 0), [], None, 0

    def getVersion(self):  # noqa: N802
        return self.version

    def createProgram(self, code, name, headers, include_names):  # noqa: N802
        self.live += 1
        return code, name

    def compileProgram(self, program, options):  # noqa: N802
        self.compiled.append((*program, options))
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
            nvrtc=FakeNvrtc(),
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


@pytest.fixture
def cuda(tmp_path, monkeypatch):
    """A folder of sources, the fake CuPy, and a current device 0 of capability 9.0."""
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
    monkeypatch.setattr(_cupy, "_driver", lambda: cupy)
    monkeypatch.setattr(_cupy, "cuda_source_dir", lambda: sources)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    forget()
    yield types.SimpleNamespace(cupy=cupy, nvrtc=cupy.cuda.nvrtc, sources=sources, headers=headers)
    forget()


def forget():
    """What a new process would not know."""
    _cupy._kernels.clear()
    for cached in (_cupy.unusable, _cupy.capability, _cupy._source_hash, _cupy.cache_folder, _cupy._headers):
        cached.cache_clear()


def test_a_source_is_compiled_for_the_device_with_its_macros_and_headers(cuda):
    _cupy.kernel("add", (("TILE", 128), ("TYPE", "float")))
    [(code, name, options)] = cuda.nvrtc.compiled
    assert (code, name) == ("code", "add.cu")
    assert {"-std=c++17", "-arch=sm_90a", "-DTILE=128", "-DTYPE=float"} < set(options)
    assert {f"-I{cuda.sources / 'include'}", f"-I{cuda.headers}"} < set(options)
    assert cuda.nvrtc.live == 0


@pytest.mark.parametrize(
    ("capability", "version", "arch"),
    [
        ((7, 5), (12, 4), "sm_75"),
        ((8, 9), (13, 0), "sm_89"),
        ((9, 0), (12, 4), "sm_90a"),
        ((10, 0), (12, 8), "sm_100a"),
        ((12, 0), (12, 8), "sm_120a"),
        ((12, 0), (12, 4), "sm_120"),
    ],
)
def test_targets(cuda, monkeypatch, capability, version, arch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda.nvrtc.version = version
    _cupy.kernel("add")
    assert f"-arch={arch}" in cuda.nvrtc.compiled[0][2]


def test_a_kernel_is_made_once_a_process_and_compiled_once_a_machine(cuda):
    first = _cupy.kernel("add", (("TILE", 128),))
    assert _cupy.kernel("add", (("TILE", 128),)) is first
    forget()
    assert _cupy.kernel("add", (("TILE", 128),)) is not first
    assert len(cuda.nvrtc.compiled) == 1


@pytest.mark.parametrize("change", ["source", "header", "macro", "compiler", "device"])
def test_whatever_changes_the_result_compiles_anew(cuda, monkeypatch, change):
    _cupy.kernel("add")
    forget()
    if change == "source":
        (cuda.sources / "add.cu").write_text("other code")
    if change == "header":
        (cuda.sources / "include" / "tile.cuh").write_text("other header")
    if change == "compiler":
        cuda.nvrtc.version = (13, 1)
    if change == "device":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    _cupy.kernel("add", (("TILE", 1),) if change == "macro" else ())
    assert len(cuda.nvrtc.compiled) == 2


def test_every_device_has_its_own_kernel(cuda, monkeypatch):
    first = _cupy.kernel("add")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert _cupy.kernel("add") is not first
    assert len(cuda.nvrtc.compiled) == 1  # the same capability: the same machine code


def test_a_source_that_does_not_compile_shows_the_compilers_words_and_leaves_no_file(cuda, tmp_path):
    cuda.nvrtc.error = "add.cu(1): error"
    with pytest.raises(RuntimeError, match=r"add\.cu does not compile with .*-arch=sm_90a.*add\.cu\(1\): error"):
        _cupy.kernel("add")
    assert not list((tmp_path / "cache").iterdir())
    assert cuda.nvrtc.live == 0


def test_a_folder_that_cannot_be_written_is_replaced_by_one_that_can(cuda, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    kernel = _cupy.kernel("add")
    assert Path(kernel._module.path).is_file()
    assert tmp_path not in Path(kernel._module.path).parents


def test_a_launch_hands_over_the_parameters_bytes_and_torchs_stream(cuda):
    kernel = _cupy.kernel("add")
    kernel.launch((5, 6, 7), 128, 1024, Params(1 << 40, 9))
    assert cuda.cupy.launches == [(4242, 5, 6, 7, 128, 1, 1, 1024, 77, 1 << 40, 9, [(6, 1)])]


def test_only_where_the_device_can_a_kernel_overlaps_the_one_before(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    _cupy.kernel("add").launch((1, 1, 1), 32, 0, Params())
    assert cuda.cupy.launches[0][-1] == []


def test_nothing_to_do_is_not_launched(cuda):
    _cupy.kernel("add").launch((5, 0, 1), 128, 0, Params())
    assert not cuda.cupy.launches


def test_more_shared_memory_is_asked_for_once(cuda):
    kernel = _cupy.kernel("add")
    function = kernel._module.function
    kernel.launch((1, 1, 1), 32, 48 * 1024, Params())
    assert not hasattr(function, "max_dynamic_shared_size_bytes")
    kernel.launch((1, 1, 1), 32, 200_000, Params())
    assert function.max_dynamic_shared_size_bytes == 200_000
    kernel.launch((1, 1, 1), 32, 100_000, Params())
    assert function.max_dynamic_shared_size_bytes == 200_000


def test_a_thread_without_a_context_gets_one(cuda, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    cuda.cupy.failures = [201]
    _cupy.kernel("add").launch((1, 1, 1), 32, 0, Params())
    assert chosen == [0]
    assert len(cuda.cupy.launches) == 1
    cuda.cupy.failures = [1]
    with pytest.raises(RuntimeError, match=r"CUresult 1\)"):
        _cupy.kernel("add").launch((1, 1, 1), 32, 0, Params())


def test_several_are_made_at_once_and_a_failure_is_seen(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda index: threading.Lock())
    wanted = [("add", (("TILE", size),)) for size in (16, 32, 64)]
    _cupy.compile_all(wanted)
    assert len(cuda.nvrtc.compiled) == 3
    for item in wanted:
        _cupy.kernel(*item)
    assert len(cuda.nvrtc.compiled) == 3
    with pytest.raises(FileNotFoundError):
        _cupy.compile_all([("missing", ())])


def test_a_device_is_usable_with_cupy_a_driver_and_headers(cuda):
    assert _cupy.unusable(0) is None
    assert _cupy.cuda_ready(torch.device("cuda"))


def test_without_cupy_the_reason_says_what_to_install(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "pip install 'cupy-cuda13x[ctk]'" in _cupy.unusable(0)


def test_without_a_driver_the_reason_is_cupys(cuda):
    def fail():
        raise RuntimeError("cudaErrorInsufficientDriver")

    cuda.cupy.cuda.runtime.getDeviceCount = fail
    assert "cudaErrorInsufficientDriver" in _cupy.unusable(0)


def test_an_old_device_is_not_usable(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert "compute capability 7.0" in _cupy.unusable(0)


def test_without_headers_the_reason_names_them(cuda, monkeypatch):
    (cuda.headers / "cuda_fp16.h").unlink()
    monkeypatch.setattr(_cupy, "_pathfinder", lambda: None)
    assert "cuda_fp16.h" in _cupy.unusable(0)
