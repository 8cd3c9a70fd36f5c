"""Compiling, keeping and launching, on a CuPy that only writes down what it is asked."""

import struct
import sys
from pathlib import Path

import pytest
import torch

from qdiff.ops import _cupy, _launch


def made(*wanted):
    """A kernel that is loaded."""
    kernel = _cupy.kernel(*wanted)
    kernel.load()
    return kernel


def test_a_source_is_compiled_for_the_device_with_its_macros_and_headers(cuda):
    made("add", (("TILE", 128), ("TYPE", "float")))
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
    made("add")
    assert f"-arch={arch}" in cuda.nvrtc.compiled[0][2]


def test_a_kernel_is_made_once_a_process_and_compiled_once_a_machine(cuda):
    first = made("add", (("TILE", 128),))
    assert made("add", (("TILE", 128),)) is first
    cuda.forget()
    assert made("add", (("TILE", 128),)) is not first
    assert len(cuda.nvrtc.compiled) == 1


@pytest.mark.parametrize("change", ["source", "header", "macro", "compiler", "device"])
def test_whatever_changes_the_result_compiles_anew(cuda, monkeypatch, change):
    made("add")
    cuda.forget()
    if change == "source":
        (cuda.sources / "add.cu").write_text("other code")
    if change == "header":
        (cuda.sources / "include" / "tile.cuh").write_text("other header")
    if change == "compiler":
        cuda.nvrtc.version = (13, 1)
    if change == "device":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    made("add", (("TILE", 1),) if change == "macro" else ())
    assert len(cuda.nvrtc.compiled) == 2


def test_every_device_has_its_own_kernel(cuda, monkeypatch):
    first = made("add")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert made("add") is not first
    assert len(cuda.nvrtc.compiled) == 1  # the same capability: the same machine code


def test_a_source_that_does_not_compile_shows_the_compilers_words_and_leaves_no_file(cuda, tmp_path):
    cuda.nvrtc.error = "add.cu(1): error"
    with pytest.raises(RuntimeError, match=r"add\.cu does not compile with .*-arch=sm_90a.*add\.cu\(1\): error"):
        made("add")
    assert not list((tmp_path / "cache").iterdir())
    assert cuda.nvrtc.live == 0


def test_a_folder_that_cannot_be_written_is_replaced_by_one_that_can(cuda, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    kernel = made("add")
    assert Path(kernel._module.path).is_file()
    assert tmp_path not in Path(kernel._module.path).parents


def test_a_launch_hands_over_the_parameters_bytes_and_torchs_stream(cuda):
    kernel = _cupy.kernel("add")
    kernel.launch((5, 6, 7), 128, 1024, cuda.Params(1 << 40, 9))
    assert cuda.cupy.launches == [(4242, 5, 6, 7, 128, 1, 1, 1024, 77, 1 << 40, 9, [(6, 1)])]


def test_only_where_the_device_can_a_kernel_overlaps_the_one_before(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    _cupy.kernel("add").launch((1, 1, 1), 32, 0, cuda.Params())
    assert cuda.cupy.launches[0][-1] == []


def test_nothing_to_do_is_not_launched(cuda):
    _cupy.kernel("add").launch((5, 0, 1), 128, 0, cuda.Params())
    assert not cuda.cupy.launches


def test_more_shared_memory_is_asked_for_once(cuda):
    kernel = _cupy.kernel("add")
    kernel.launch((1, 1, 1), 32, 48 * 1024, cuda.Params())
    function = kernel._module.function
    assert not hasattr(function, "max_dynamic_shared_size_bytes")
    kernel.launch((1, 1, 1), 32, 200_000, cuda.Params())
    assert function.max_dynamic_shared_size_bytes == 200_000
    kernel.launch((1, 1, 1), 32, 100_000, cuda.Params())
    assert function.max_dynamic_shared_size_bytes == 200_000


def test_a_thread_without_a_context_gets_one(cuda, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    cuda.cupy.failures = [201]
    _cupy.kernel("add").launch((1, 1, 1), 32, 0, cuda.Params())
    assert chosen == [0]
    assert len(cuda.cupy.launches) == 1
    cuda.cupy.failures = [1]
    with pytest.raises(RuntimeError, match=r"CUresult 1\)"):
        _cupy.kernel("add").launch((1, 1, 1), 32, 0, cuda.Params())


def test_clusters_share_their_work_evenly():
    assert [_launch.no_more_than(132, clusters) for clusters in (1, 132, 133, 300)] == [1, 132, 67, 100]


def test_no_more_clusters_are_started_than_run_at_once(cuda):
    def occupancy(most, function, config):
        asked.append((function.value, config._obj.x, config._obj.threads, config._obj.shared_bytes))
        most._obj.value = 5
        return 0

    asked, cuda.cupy.cuOccupancyMaxActiveClusters = [], occupancy
    launcher = _cupy.kernel("add").launcher((36, 1, 1), 128, 60_000, struct.Struct("Q8x"), b"", 4)
    launcher(7), launcher(8)
    assert asked == [(4242, 4, 128, 60_000)]  # known from the first launch on
    assert [launch[1] for launch in cuda.cupy.launches] == [20, 20]  # 9 clusters: 5 with 2 tiles at most


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
