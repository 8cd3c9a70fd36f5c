import threading

import pytest

from qdiff.evaluation.background import Background


def test_jobs_are_done_in_order_and_waited_for():
    done = []
    with Background(done.append, depth=2) as background:
        for job in range(20):
            background.put(job)
    assert done == list(range(20))


def test_no_more_jobs_wait_than_allowed():
    started, go = threading.Semaphore(0), threading.Event()

    def work(job):
        started.release()
        go.wait(10)

    with Background(work, depth=2) as background:
        background.put(0)
        started.acquire(timeout=10)
        background.put(1)
        background.put(2)
        blocked = threading.Thread(target=background.put, args=(3,), daemon=True)
        blocked.start()
        blocked.join(0.1)
        assert blocked.is_alive()
        go.set()
        blocked.join(10)


@pytest.mark.parametrize("jobs", [1, 50])
def test_an_error_reaches_the_caller_and_ends_the_work(jobs):
    done = []

    def work(job):
        done.append(job)
        raise OSError("disk full")

    def run():
        with Background(work, depth=1) as background:
            for job in range(jobs):
                background.put(job)

    with pytest.raises(OSError, match="disk full"):
        run()
    assert done == [0]


def test_an_error_of_the_caller_stays_the_callers():
    with pytest.raises(KeyError, match="mine"), Background(lambda job: None):
        raise KeyError("mine")
