"""Executors: results in order, errors with their cause, progress within a task, workers that end or are left over."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from sim.executors import IN_PROCESS, PER_CORE, Processes, Tell, WorkerEnded, processes, silent
from sim.model.errors import BadInput


def slowly(task: int, tell: Tell) -> int:
    for part in range(10):
        time.sleep(0.05)
        tell(part / 10)
    return task * task


def square(task: int, _: Tell) -> int:
    return task * task


def sleep(task: float, _: Tell) -> None:
    time.sleep(task)


def refuse(task: int, _: Tell) -> int:
    if task == 3:
        raise BadInput("expected another number", key="task")
    return task


def fall(task: int, _: Tell) -> None:
    os.kill(os.getpid(), task)


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


def test_results_are_in_the_order_of_the_tasks_and_processes_are_used_again() -> None:
    with processes(2) as pool:
        assert pool.run(square, range(20)) == [n * n for n in range(20)]
        before = children()
        assert pool.run(square, range(3)) == [0, 1, 4]
        assert children() == before and len(before) == 2
        assert pool.run(square, []) == []
    assert not children()
    assert IN_PROCESS.run(square, range(20)) == [n * n for n in range(20)]


def test_no_more_processes_start_than_there_are_tasks_or_four_to_a_core() -> None:
    with processes(4) as pool:
        pool.run(square, [1])
        assert len(children()) == 1
    with processes(10_000) as pool:
        assert isinstance(pool, Processes) and pool.jobs == PER_CORE * (os.cpu_count() or 1)
    with processes(1) as pool:
        assert pool is IN_PROCESS


@pytest.mark.parametrize("jobs", [1, 2])
def test_progress_counts_tasks_and_the_shares_of_those_under_way(jobs: int) -> None:
    told: list[float] = []
    with processes(jobs) as pool:
        assert pool.run(slowly, range(3), lambda done, total: told.append(done)) == [0, 1, 4]
    assert told == sorted(told) and told[-1] == 3
    assert any(done != int(done) for done in told)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_is_the_functions_own_and_ends_the_rest(jobs: int) -> None:
    with processes(jobs) as pool:
        with pytest.raises(BadInput, match="expected another number") as caught:
            pool.run(refuse, range(9))
        assert not children()
        assert pool.run(refuse, [1, 2]) == [1, 2]  # with new processes
    assert str(caught.value) == "task: expected another number"
    assert jobs == 1 or "in refuse" in caught.value.__notes__[0]  # the worker's traceback


@pytest.mark.parametrize(("number", "why"), [(signal.SIGKILL, "memory runs out"), (signal.SIGABRT, "before its task")])
def test_a_worker_that_ends_is_an_error_with_advice(number: int, why: str) -> None:
    with processes(2) as pool, pytest.raises(WorkerEnded, match=rf"{why}.*--jobs"):
        pool.run(fall, [number] * 4)
    assert not children()


def test_an_idle_worker_that_ends_is_too() -> None:
    with processes(2) as pool:
        pool.run(square, range(4))
        for process in children():
            process.kill()
            process.wait()
        with pytest.raises(WorkerEnded, match="--jobs"):
            pool.run(square, range(4))


def test_interrupted_it_ends_all_processes_at_once() -> None:
    def interrupt(done: float, total: int) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), processes(2) as pool:
        pool.run(sleep, [0.0, 600.0, 600.0], interrupt)
    assert not children()
    assert time.monotonic() - began < 60


def test_workers_are_deaf_to_signals_that_the_parent_answers() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with processes(2) as pool:
            assert pool.run(fall, [number] * 2) == [None, None]


def test_silence_takes_any_progress() -> None:
    assert silent(0.5) is None and silent(1.0, 3) is None
