"""Where tasks run: in this process or in several. Progress, Ctrl-C and the death of a worker are dealt with here.

A result depends on its task alone, so results are the same whatever the executor, the number of processes, or the order
in which tasks end.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol, TypeVar, cast

from sim.model.errors import UserError

A = TypeVar("A")
R = TypeVar("R")
Tell = Callable[[float], None]  # the share of a task that is done
Progress = Callable[[float, int], None]  # how many tasks are done, those under way by their shares, and of how many

PER_CORE = 4  # processes: more of them only fill the memory
EVERY = 0.25  # s between two messages of a worker about its task
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def silent(*_: float) -> None:
    """Ignore progress."""


class Executor(Protocol):
    """Runs tasks."""

    def run(self, function: Callable[[A, Tell], R], tasks: Sequence[A], progress: Progress = silent) -> list[R]:
        """`function(task, tell)` of each task, in the order of the tasks; raises what the function raises."""


class InProcess:
    """Runs every task in this process: starting another one takes a second."""

    def run(self, function: Callable[[A, Tell], R], tasks: Sequence[A], progress: Progress = silent) -> list[R]:
        """See `Executor`."""
        made: list[R] = []
        for task in tasks:
            made.append(function(task, lambda share: progress(len(made) + share, len(tasks))))
            progress(len(made), len(tasks))
        return made


IN_PROCESS = InProcess()


class WorkerEnded(UserError):
    """A worker process ended before its task did."""


class Processes:
    """Runs tasks in up to `jobs` processes, which start when they are needed and last until `close`, or an error.

    Function and tasks are pickled once for each process, what tasks share once in all.
    """

    def __init__(self, jobs: int):
        """Start nothing yet."""
        self.jobs = jobs
        self._workers: dict[Connection, SpawnProcess] = {}

    def run(self, function: Callable[[A, Tell], R], tasks: Sequence[A], progress: Progress = silent) -> list[R]:
        """See `Executor`. Raises `WorkerEnded` if a process ends, as it does when the system kills it."""
        try:
            return self._run(ForkingPickler.dumps((function, tasks)), len(tasks), progress)
        except BaseException:
            self.close()  # the results of tasks under way are of no use any more
            raise

    def close(self) -> None:
        """End all processes at once."""
        with _held():  # a second Ctrl-C must not interrupt what the first began
            for process in self._workers.values():
                process.kill()
            for worker, process in self._workers.items():
                process.join()
                worker.close()
            self._workers.clear()

    def _run(self, work: memoryview, total: int, progress: Progress) -> list[Any]:
        self._start(min(self.jobs, total))
        made: list[Any] = [None] * total
        begun = done = 0
        task_of: dict[Connection, int] = {}
        shares: dict[Connection, float] = {}
        idle = list(self._workers)[:total]
        for worker in idle:
            self._exchange(worker, worker.send_bytes, work)
        while done < total:
            while idle and begun < total:
                worker = idle.pop()
                self._exchange(worker, worker.send, begun)
                task_of[worker], shares[worker] = begun, 0.0
                begun += 1
            for ready in wait(list(task_of), timeout=1.0):
                worker = cast(Connection, ready)
                message = self._exchange(worker, worker.recv)
                if isinstance(message, float):
                    shares[worker] = message
                    continue
                result, error = message
                if error is not None:
                    raise error
                made[task_of.pop(worker)] = result
                del shares[worker]
                idle.append(worker)
                done += 1
            progress(done + sum(shares.values()), total)
        return made

    def _start(self, count: int) -> None:
        # spawn: a fork would copy locks that other threads (progress bars) hold
        context = get_context("spawn")
        resource_tracker.ensure_running()  # it would start with the first process, and let signals through
        while len(self._workers) < count:
            with _held():
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), daemon=True)
                process.start()
                self._workers[ours] = process
                theirs.close()  # so that the pipe ends when the process does

    def _exchange(self, worker: Connection, send_or_receive: Callable[..., Any], *message: Any) -> Any:
        try:
            return send_or_receive(*message)
        except (EOFError, OSError) as e:
            process = self._workers[worker]
            process.join(5.0)
            killed = process.exitcode == -signal.SIGKILL
            why = "by the system, as happens when memory runs out" if killed else "before its task was done"
            raise WorkerEnded(f"a simulating process was ended {why}; try fewer at a time with --jobs") from e


@contextmanager
def processes(jobs: int | None = None) -> Iterator[Executor]:
    """`jobs` processes, by default one for each core and never many times as many; one job runs in this process."""
    cores = os.cpu_count() or 1
    jobs = min(jobs or cores, PER_CORE * cores)
    if jobs == 1:
        yield IN_PROCESS
        return
    pool = Processes(jobs)
    try:
        yield pool
    finally:
        pool.close()


@contextmanager
def _held() -> Iterator[None]:
    """Signals wait until the end of this. Processes started within keep them blocked: the parent answers a signal to
    the process group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(parent: Connection) -> None:
    """A worker process: takes a function and tasks, then numbers of tasks to be run, until its parent kills it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    said = time.monotonic()

    def tell(share: float) -> None:
        nonlocal said
        if time.monotonic() >= said + EVERY:
            said = time.monotonic()
            parent.send(float(share))

    while True:
        message = parent.recv()
        if not isinstance(message, int):
            function, tasks = message
            continue
        try:
            made, error = function(tasks[message], tell), None
        except Exception as e:
            made, error = None, e
            e.add_note(f"in a worker process:\n{traceback.format_exc()}")
        parent.send((made, error))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
