import time
from types import SimpleNamespace

import pytest
from board import processes
from board.processes import outcome_of, run_all
from board.units import Settings, Task, Unit

UNITS = [Unit("emoji-sd", seed, None) for seed in range(5)]
TASKS = [Task(unit, str(unit.seed)) for unit in UNITS]
DEADLY = 1


class FakeWorker:
    """Measures at once; a unit with the seed `DEADLY` ends its process, as running out of memory does."""

    def __init__(self, settings, threads, index):
        self.pipe, self.task, self.stopped, self.index = object(), None, False, index
        self.process = SimpleNamespace(alive=True, is_alive=lambda: self.process.alive, join=lambda: None)

    def start(self, task):
        assert self.process.alive, "a dead process was sent a unit"
        self.task = self.last = task

    def outcome(self):
        self.process.alive = self.last.unit.seed != DEADLY
        return {"psnr_db": 1.0} if self.process.alive else {"failed": "its process ended with exit code -9"}

    def stop(self):
        self.stopped = True


@pytest.fixture
def made(monkeypatch):
    workers = []

    def make(settings, threads, index):
        workers.append(FakeWorker(settings, threads, index))
        return workers[-1]

    monkeypatch.setattr(processes, "Worker", make)
    monkeypatch.setattr(processes, "wait", lambda pipes, timeout: pipes)
    return workers


def run(tmp_path, jobs, deadline, tasks=TASKS):
    found = {}
    settings = Settings(tmp_path, tmp_path)
    undone = run_all(tasks, settings, jobs, 1, deadline, lambda unit, outcome: found.update({unit.seed: outcome}))
    return found, undone


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_a_process_that_dies_costs_its_own_unit_and_is_replaced(made, tmp_path, jobs):
    found, undone = run(tmp_path, jobs, time.monotonic() + 60)
    assert undone == 0
    assert {seed for seed, outcome in found.items() if "failed" in outcome} == {DEADLY}
    assert set(found) == set(range(5))
    assert len(made) <= min(jobs, 5) + 1


def test_a_process_that_takes_the_place_of_another_has_its_device(made, tmp_path):
    run(tmp_path, 2, time.monotonic() + 60)
    assert sorted(worker.index for worker in made) in ([0, 0, 1], [0, 1, 1])


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_waits_for_a_preparation_lets_others_pass(made, tmp_path, jobs):
    waiting = [Task(UNITS[0], "0", frozenset("3")), Task(UNITS[2], "2", frozenset("9")), *TASKS[3:]]
    found, undone = run(tmp_path, jobs, time.monotonic() + 60, waiting)
    assert undone == 0
    assert list(found) == ([2, 3, 0, 4] if jobs == 1 else [2, 3, 4, 0])


def test_a_preparation_that_fails_does_not_hold_up_what_waits_for_it(made, tmp_path):
    found, undone = run(tmp_path, 2, time.monotonic() + 60, [TASKS[DEADLY], Task(UNITS[2], "2", frozenset("1"))])
    assert undone == 0
    assert "failed" in found[DEADLY]
    assert "failed" not in found[2]


def test_nothing_starts_after_the_deadline(made, tmp_path):
    assert run(tmp_path, 2, time.monotonic() - 1) == ({}, 5)
    assert not made


def test_what_runs_at_the_deadline_is_left_undone(made, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "wait", lambda pipes, timeout: [])
    assert run(tmp_path, 2, time.monotonic() + 60) == ({}, 5)
    assert all(worker.stopped for worker in made)


def test_whatever_a_row_raises_is_its_outcome_in_one_line():
    class Broken:
        def measure(self, unit):
            raise RuntimeError("no kernel\nwith a long trace")

    found = outcome_of(Broken(), UNITS[0])
    assert found["failed"] == "RuntimeError: no kernel"
    assert found["seconds"] >= 0
