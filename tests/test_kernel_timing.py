"""Turns and rounds of `scripts/kernel_bench/timing.py`, by a clock of the test's own."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"


class Gpu:
    """One that runs what is queued at once."""

    def __init__(self):
        self.ms = 0.0
        self.replayed = []

    def run(self, name, ms):
        self.replayed.append(name)
        self.ms += ms


@pytest.fixture
def timed(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from kernel_bench import timing

    gpu = Gpu()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = gpu.ms

        def synchronize(self):
            gpu.ms += 10  # what a wait costs, which belongs to no turn

        def elapsed_time(self, end):
            return end.ms - self.ms

    def prepare(call, copies):
        name, ms, calls = call(copies)
        return timing._Run(lambda: gpu.run(name, ms), calls, "")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_prepare", prepare)
    return timing, gpu


def broken(copies):
    raise ValueError("no such kernel")


def test_each_gets_its_own_time(timed):
    timing, _ = timed
    competitors = {"fast": lambda copies: ("fast", 2.0, 200), "slow": lambda copies: ("slow", 2.4, 8), "broken": broken}
    timings = timing.race(competitors, copies=3)
    assert timings["fast"].us == pytest.approx(10)
    assert timings["slow"].us == pytest.approx(300)
    assert math.isnan(timings["broken"].us)
    assert timings["broken"].note == "ValueError: no such kernel"


def test_a_turn_is_one_replay_and_every_round_begins_with_another(timed):
    timing, gpu = timed
    names = ["a", "b", "c"]
    timing.race({name: lambda copies, name=name: (name, 2.0, 1) for name in names}, copies=1)
    rounds = [gpu.replayed[start : start + 4] for start in range(0, len(gpu.replayed), 4)]
    assert len(rounds) == timing.ROUNDS
    for lead, *turns in rounds:
        assert sorted(turns) == names
        assert lead == turns[-1]  # thrown away, as it waits for the host
    assert Counter(turns[0] for _, *turns in rounds) == dict.fromkeys(names, timing.ROUNDS // len(names))


def test_nobody_is_left_to_time(timed):
    timing, _ = timed
    timings = timing.race({"broken": broken}, copies=1)
    assert math.isnan(timings["broken"].us)
