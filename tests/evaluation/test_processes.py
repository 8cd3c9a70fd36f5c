"""Real processes that join each other: one that is killed does not leave the others waiting, and GPUs may be shared."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from qdiff.evaluation import Report, drawing, evaluate
from qdiff.evaluation.processes import Joined, this_process

FORK = multiprocessing.get_context("fork")
PROMPTS = ["red cat", "house", "apple", "green cat"]
QUICK = {"steps": 1, "batch_size": 1, "costs": False, "drift": 0, "progress": False}


def launched(function, count, folder):
    """Run `function(processes)` in as many processes as a launcher would, and return their exit codes.

    What a process raises is in the folder, in a file by its index.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def child(index):
        torch.set_num_threads(1)  # a forked child has no threads of its parent's
        rank = str(index)
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        PartialState._reset_state()
        try:
            function(this_process())
        except BaseException:
            (folder / f"{index}.txt").write_text(traceback.format_exc())
            raise

    children = [FORK.Process(target=child, args=(index,)) for index in range(count)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
    alive = [process for process in children if process.exitcode is None]
    for process in alive:
        process.kill()
    assert not alive, "processes wait for ever"
    return [process.exitcode for process in children]


def evaluated(pipes, out, processes):
    evaluate(pipes[0], {"it": pipes[1]}, PROMPTS, ("psnr", "ssim"), out=out, accelerator=processes, **QUICK)


def test_a_process_that_is_killed_leaves_no_other_waiting_and_loses_nothing(tiny_sd, tmp_path):
    pipes = tiny_sd(), tiny_sd()
    with torch.no_grad():
        pipes[1].unet.conv_in.weight.mul_(1.05)
    draw = drawing.draw

    def mortal(processes):
        if processes.process_index == 1:
            calls = []
            drawing.draw = lambda *args: os.kill(os.getpid(), 9) if len(calls) == 1 else calls.append(0) or draw(*args)
        evaluated(pipes, tmp_path / "out", processes)

    assert launched(mortal, 2, tmp_path) == [1, -signal.SIGKILL]
    told = (tmp_path / "0.txt").read_text()
    assert "ConnectionError: process 0 of 2 waited in vain" in told
    assert "run the same command again" in told
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert len(kept) >= 4  # what the first process drew of both
    assert launched(lambda processes: evaluated(pipes, tmp_path / "out", processes), 2, tmp_path) == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    evaluated(pipes, tmp_path / "whole", None)
    reports = [Report.from_json((tmp_path / name / "report.json").read_text()) for name in ("out", "whole")]
    assert reports[0].records == reports[1].records


def test_a_process_that_fails_leaves_no_other_waiting(tmp_path):
    def failing(processes):
        if processes.process_index == 0:
            raise OSError(28, "No space left on device")
        processes.wait_for_everyone()

    assert launched(failing, 3, tmp_path) == [1, 1, 1]
    assert "No space left" in (tmp_path / "0.txt").read_text()
    for index in (1, 2):
        assert f"process {index} of 3 waited in vain" in (tmp_path / f"{index}.txt").read_text()


def test_more_processes_than_gpus_share_them(tmp_path, monkeypatch):
    """On a machine that says it has one GPU, which nothing here touches."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")

    def meet(processes):
        assert isinstance(processes, Joined)
        assert processes.device == torch.device("cuda", 0)
        assert processes.num_processes == 2
        assert processes.is_main_process == (processes.process_index == 0)
        processes.wait_for_everyone()
        (tmp_path / f"met-{processes.process_index}").touch()

    codes = launched(meet, 2, tmp_path)
    assert codes == [0, 0], [path.read_text() for path in tmp_path.glob("*.txt")]
    assert {path.name for path in tmp_path.iterdir()} == {"met-0", "met-1"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_two_processes_share_one_gpu(tiny_sd, tmp_path):
    """In processes of their own, as a forked one cannot use a GPU that its parent has used."""
    tiny_sd().save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "qdiff.cli", "evaluate"]
    options = ["--prompts", "prompts.txt", "--metrics", "psnr", "--steps", "2", "--no-costs", "--out", "out"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    command = [sys.executable, *launcher, "sd", "it=sd", *options]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert Report.from_json((tmp_path / "out" / "report.json").read_text()).settings["processes"] == 2
