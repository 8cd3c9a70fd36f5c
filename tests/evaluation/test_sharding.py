"""Work shared by processes, and processes that are killed: the same figures, nothing lost, nothing counted twice."""

import copy
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qdiff import cli
from qdiff.evaluation import Report, drawing, evaluate
from qdiff.evaluation.pictures import PictureStore
from qdiff.evaluation.rows import read_rows

FORK = multiprocessing.get_context("fork")
PROMPTS = [f"red cat {index}" for index in range(7)]
QUICK = {"steps": 2, "guidance_scale": 3.0, "batch_size": 1, "costs": False, "drift": 0, "progress": False}


class Processes:
    """Stands for accelerate's state, for processes that share a barrier."""

    device = torch.device("cpu")

    def __init__(self, index, barrier):
        self.process_index, self.barrier = index, barrier
        self.num_processes, self.is_main_process = barrier.parties, index == 0

    def wait_for_everyone(self):
        self.barrier.wait(60)


@pytest.fixture
def pipes(tiny_sd):
    candidate = copy.deepcopy(tiny_sd())
    with torch.no_grad():
        candidate.unet.conv_in.weight.mul_(1.05)
    candidate.set_progress_bar_config(disable=True)
    return tiny_sd(), {"it": candidate}


def run(pipes, out, processes):
    torch.set_num_threads(1)  # a forked child has no threads of its parent's
    evaluate(*pipes, PROMPTS, ("psnr", "ssim"), out=out, accelerator=processes, **QUICK)


def measured(report):
    settings = {key: value for key, value in report.settings.items() if key != "processes"}
    return report.records, report.pairs, settings


def keys_written(out):
    """Every key in every file of rows, however often."""
    return [line for path in out.rglob("*.keys") for line in path.read_text().splitlines()[1:]]


def test_any_number_of_processes_gives_the_same_figures(pipes, tmp_path):
    reports = {}
    for count in (1, 2, 4):
        barrier = FORK.Barrier(count)
        children = [
            FORK.Process(target=run, args=(pipes, tmp_path / str(count), Processes(index, barrier)))
            for index in range(count)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(100)
        assert [child.exitcode for child in children] == [0] * count
        reports[count] = Report.from_json((tmp_path / str(count) / "report.json").read_text())
        keys = keys_written(tmp_path / str(count))
        assert len(keys) == 7 * 4  # a flaw of each picture, and two metrics of each pair
        writers = {path.name[:5] for path in (tmp_path / str(count)).rglob("*.keys")}
        assert len(writers) == count
    assert measured(reports[1]) == measured(reports[2]) == measured(reports[4])


@pytest.mark.parametrize("batch", [1, 4, 9], ids="killed-at-{}".format)
def test_a_killed_run_goes_on_where_it_was(pipes, tmp_path, monkeypatch, batch):
    drawn, draw = [], drawing.draw

    def mortal(*args):
        if len(drawn) == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        drawn.append(args)
        return draw(*args)

    barrier = FORK.Barrier(1)
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "draw", mortal)
        child = FORK.Process(target=run, args=(pipes, tmp_path / "killed", Processes(0, barrier)))
        child.start()
        child.join(100)
    assert child.exitcode == -signal.SIGKILL
    before = {path.stem for path in (tmp_path / "killed").rglob("*.png")}
    # What was still in the queue is lost; all else is there.
    assert batch - 6 <= len(before) <= batch

    again = []
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "draw", lambda *args: again.append(args) or draw(*args))
        run(pipes, tmp_path / "killed", Processes(0, barrier))
    assert len(again) == 14 - len(before)
    run(pipes, tmp_path / "whole", Processes(0, barrier))
    reports = [Report.from_json((tmp_path / name / "report.json").read_text()) for name in ("killed", "whole")]
    assert measured(reports[0]) == measured(reports[1])
    for folder in (tmp_path / "killed" / "rows" / "psnr").iterdir():
        assert len(read_rows(folder).places) == 7


def test_an_error_in_the_background_ends_the_run_and_keeps_what_was_done(pipes, tmp_path, monkeypatch):
    write, written = PictureStore.write, []

    def full_after_three(store, key, pixels, *, finite=True):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(key)
        write(store, key, pixels, finite=finite)

    with monkeypatch.context() as patch:
        patch.setattr(PictureStore, "write", full_after_three)
        with pytest.raises(OSError, match="No space left"):
            run(pipes, tmp_path, Processes(0, FORK.Barrier(1)))
    assert {path.stem for path in tmp_path.rglob("*.png")} == set(written)
    run(pipes, tmp_path, Processes(0, FORK.Barrier(1)))
    assert len(list(tmp_path.rglob("*.png"))) == 14


def command_line(*arguments):
    """What a launched process runs; forked, it has imported everything already."""
    torch.set_num_threads(1)  # a forked child has no threads of its parent's
    PartialState._reset_state()
    cli.app(arguments, standalone_mode=False)


def test_launched_processes_find_each_other_and_share_the_work(pipes, tmp_path, monkeypatch):
    for name, pipe in (("reference", pipes[0]), ("it", pipes[1]["it"])):
        pipe.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    # What torchrun runs. accelerate's own launcher hands CPU processes to MPI; torch's sets the same variables.
    launcher = elastic_launch(
        LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0),
        command_line,
    )
    options = ["--prompts", "prompts.txt", "--metrics", "psnr,ssim", "--steps", "2", "--guidance-scale", "3"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launcher("evaluate", "reference", "it", *options, "--no-costs", "--out", "two")
    report = Report.from_json((tmp_path / "two" / "report.json").read_text())
    assert report.settings["processes"] == 2
    alone = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, process_index=0, is_main_process=True, wait_for_everyone=lambda: 0
    )
    one = evaluate(
        tmp_path / "reference",
        {"it": tmp_path / "it"},
        tmp_path / "prompts.txt",
        ("psnr", "ssim"),
        out=tmp_path / "one",
        accelerator=alone,
        **{**QUICK, "batch_size": 8},
    )
    for name in ("psnr_db", "ssim"):
        # Batches of four and of three pictures round float32 otherwise than batches of seven.
        assert report.find(name, candidate="it").value == pytest.approx(one.find(name, candidate="it").value, rel=1e-4)
