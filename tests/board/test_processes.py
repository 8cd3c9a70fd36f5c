import time
from types import SimpleNamespace

import pytest
from board import processes
from board.measure import Settings, Unit
from board.processes import outcome_of, run_all

UNITS = [Unit("emoji-sd", seed, None) for seed in range(5)]
DEADLY = 1


class FakeWorker:
    """Measures at once; a unit with the seed `DEADLY` ends its process, as running out of memory does."""

    def __init__(self, settings, threads):
        self.pipe, self.unit, self.stopped = object(), None, False
        self.process = SimpleNamespace(alive=True, is_alive=lambda: self.process.alive)

    def start(self, unit):
        assert self.process.alive, "a dead process was sent a unit"
        self.unit = self.last = unit

    def outcome(self):
        self.process.alive = self.last.seed != DEADLY
        return {"psnr_db": 1.0} if self.process.alive else {"failed": "its process ended with exit code -9"}

    def stop(self):
        self.stopped = True


@pytest.fixture
def made(monkeypatch):
    workers = []

    def make(settings, threads):
        workers.append(FakeWorker(settings, threads))
        return workers[-1]

    monkeypatch.setattr(processes, "Worker", make)
    monkeypatch.setattr(processes, "wait", lambda pipes, timeout: pipes)
    return workers


def run(tmp_path, jobs, deadline):
    found = {}
    settings = Settings(tmp_path, tmp_path)
    undone = run_all(UNITS, settings, jobs, 1, deadline, lambda unit, outcome: found.update({unit.seed: outcome}))
    return found, undone


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_a_process_that_dies_costs_its_own_unit_and_is_replaced(made, tmp_path, jobs):
    found, undone = run(tmp_path, jobs, time.monotonic() + 60)
    assert undone == 0
    assert {seed for seed, outcome in found.items() if "failed" in outcome} == {DEADLY}
    assert set(found) == set(range(5))
    assert len(made) <= min(jobs, 5) + 1


def test_nothing_starts_after_the_deadline_and_every_process_is_stopped(made, tmp_path):
    found, undone = run(tmp_path, 2, time.monotonic() - 1)
    assert (found, undone) == ({}, 5)
    assert made
    assert all(worker.stopped for worker in made)


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
