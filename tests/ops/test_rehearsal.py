"""What a rehearsed call needs is compiled together, ahead of it; on a CuPy that only writes down what it is asked."""

import struct
import threading

import pytest
import torch

from qdiff.ops import _cupy, _settled, rehearsal


@pytest.fixture(autouse=True)
def nothing_expected(monkeypatch):
    monkeypatch.delenv("QDIFF_TUNE", raising=False)
    yield
    rehearsal.expect(None)


def launcher(size, grid=(1, 1, 1)):
    return _cupy.kernel("add", (("TILE", size),)).launcher(grid, 32, 0, struct.Struct("Q8x"))


def launch_all(*sizes):
    for size in sizes:
        launcher(size)(size)


def values(cuda):
    return [launch[9] for launch in cuda.cupy.launches]


def test_nothing_is_launched_and_all_is_compiled_once_by_others(cuda):
    again = launcher(16)
    with rehearsal.rehearsal():
        again(16)
        launch_all(32, 16, 64)
        launcher(128, grid=(5, 0, 1))(128)
        assert not cuda.nvrtc.compiled
    assert not cuda.cupy.launches
    assert len(cuda.nvrtc.compiled) == 3  # an empty launch needs no kernel
    assert threading.current_thread() not in cuda.nvrtc.by
    again(7)
    launch_all(32, 64)
    assert values(cuda) == [7, 32, 64]
    assert len(cuda.nvrtc.compiled) == 3


def test_an_expected_call_is_rehearsed_when_it_misses_a_kernel(cuda):
    launch_all(8)  # nobody expects that: it is compiled here
    rehearsal.expect(lambda: launch_all(8, 16, 32, 64))
    launch_all(8, 16, 32, 64)
    assert values(cuda) == [8, 8, 16, 32, 64]
    assert cuda.nvrtc.before == [0, 2, 2, 2]  # at the first that is missing, before any of them is launched
    assert cuda.nvrtc.by[0] is threading.current_thread()
    assert threading.current_thread() not in cuda.nvrtc.by[1:]


def test_a_call_is_rehearsed_once(cuda):
    calls = []
    rehearsal.expect(lambda: calls.append(1))
    launch_all(16, 32)
    assert calls == [1]
    assert len(cuda.nvrtc.compiled) == 2  # what it did not name is compiled where it is launched


@pytest.mark.parametrize("reason", ["on disk", "ended", "captured", "tuned", "of another thread"])
def test_other_calls_are_not_rehearsed(cuda, monkeypatch, reason):
    calls = []
    expect = rehearsal.expect
    if reason == "of another thread":
        thread = threading.Thread(target=expect, args=[lambda: calls.append(1)])
        thread.start()
        thread.join()
    else:
        expect(lambda: calls.append(1))
    if reason == "on disk":
        expect(None)
        launch_all(16)
        expect(lambda: calls.append(1))
        cuda.forget()
    if reason == "ended":
        expect(None)
    if reason == "captured":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if reason == "tuned":
        monkeypatch.setenv("QDIFF_TUNE", "1")
    launch_all(16)
    assert not calls
    assert len(cuda.nvrtc.compiled) == 1


def test_a_rehearsal_that_fails_says_so_and_leaves_the_call_alone(cuda):
    def fail():
        launch_all(16, 32)
        raise torch.OutOfMemoryError("out of memory")

    rehearsal.expect(fail)
    with pytest.warns(RuntimeWarning, match="compiled one by one, which takes longer: out of memory"):
        launch_all(16, 32, 64)
    assert values(cuda) == [16, 32, 64]
    assert cuda.nvrtc.before == [0, 0, 2]  # what was reached is there


def test_what_does_not_compile_is_an_error_where_it_is_launched(cuda):
    cuda.nvrtc.error = "add.cu(1): error"
    with rehearsal.rehearsal():
        launch_all(16)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"add\.cu does not compile"):
            launch_all(16)


def test_a_rehearsal_reads_no_weights(cuda):
    weights = (torch.zeros(4), torch.zeros(4))
    assert not _settled.settled(weights)
    assert _settled.settled(weights)
    with rehearsal.rehearsal():
        other = (torch.zeros(4),)
        _settled.note_read(other)
    assert not _settled.settled(other)  # the first launch that reads them waits for them


def test_other_threads_launch_meanwhile(cuda):
    with rehearsal.rehearsal():
        thread = threading.Thread(target=launch_all, args=[16])
        thread.start()
        thread.join()
        launch_all(32)
    assert values(cuda) == [16]
    launch_all(32)
    assert values(cuda) == [16, 32]


def test_an_error_inside_ends_the_rehearsal(cuda):
    def fail():
        with rehearsal.rehearsal():
            launch_all(16)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    launch_all(16)
    assert values(cuda) == [16]
