"""Many simulations - scenarios × replicates, each with its own draw and seed - on any executor.

A replicate depends on its task alone, so results are the same whatever the executor, the number of jobs, or the order
in which they finish.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

import numpy as np

from sim.cluster.ladder import climb
from sim.model.calibration import Calibration
from sim.model.errors import UserError
from sim.model.machine import Draw, Model, draw_model
from sim.model.scenario import Scenario
from sim.model.workload import RequestLengths
from sim.results.curve import TAKEOFF_FACTOR
from sim.run import Run

T = TypeVar("T")
_LOOK = 1.0  # s between looks at tasks under way
MOST = 4  # processes a core: more of them only fill the memory


@dataclass(frozen=True)
class Task:
    """One replicate of one scenario's ladder: `number` names its draw and seeds; number 0 has the central values."""

    scenario: Scenario
    calibration: Calibration
    seed: int
    number: int
    lengths: RequestLengths | None = None

    def model(self) -> Model:
        """The draw of the calibration that this replicate runs with."""
        return draw_model(self.calibration, self.scenario.server, self._draw)

    @property
    def takeoff_factor(self) -> float:
        """The factor at which this replicate sees latency take off: a judgement by eye, so drawn.

        Published figures say something of it: then it is its draw's, together with the other parameters.
        """
        values = self.calibration.values if self._draw is None else self._draw.values(self.calibration)
        if "takeoff_factor" in values:
            return values["takeoff_factor"]
        return float(np.random.default_rng([self.seed, self.number, 4]).uniform(*TAKEOFF_FACTOR))

    @property
    def _draw(self) -> Draw | None:
        return None if self.number == 0 else Draw(self.seed, self.number)

    def run(self, *, members: bool = False) -> Run:
        """Simulate it; with `members`, its steps say whose they are."""
        return climb(
            self.scenario,
            self.model(),
            (self.seed, self.number),
            self.lengths,
            members=members,
            progress=_under_way.tell,
        )


class _UnderWay:
    """Where a task says what share of it is done: memory that the parent reads, or `hears` where it runs here."""

    def __init__(self) -> None:
        self._shares: Any = None
        self._slot = 0
        self.hears: Callable[[float], None] | None = None

    def write_to(self, shares: Any, workers: Any) -> None:
        """Take a place of its own in the shared memory."""
        with workers.get_lock():
            self._shares, self._slot = shares, workers.value % len(shares)
            workers.value += 1

    def tell(self, share: float) -> None:
        """So much of the task is done."""
        if self._shares is not None:
            self._shares[self._slot] = share
        elif self.hears is not None and share > 0.0:
            self.hears(share)


_under_way = _UnderWay()


class Pool(ProcessPoolExecutor):
    """A pool of processes that knows how far the tasks under way are."""

    def __init__(self, jobs: int):
        """Start nothing yet."""
        context = get_context("spawn")
        self._shares = context.Array("d", jobs, lock=False)
        told = (self._shares, context.Value("i", 0))
        super().__init__(jobs, mp_context=context, initializer=_follow_parent, initargs=told)

    @property
    def under_way(self) -> float:
        """How many tasks' worth of those not done is done."""
        return float(sum(self._shares))


class Here(Executor):
    """Runs every task in this process, when its result is asked for: starting another takes seconds."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run it now."""
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future

    def map(
        self, fn: Callable[..., T], *iterables: Any, timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """Run each when it is asked for."""
        return map(fn, *iterables)


def each_done(
    function: Callable[[Task], T],
    tasks: Sequence[Task],
    executor: Executor | None,
    progress: Callable[[float, int], None],
) -> Iterator[T]:
    """What the function makes of each task, in order; `progress` hears how many are done, with shares of those under
    way where a `Pool` does them."""
    if executor is None or isinstance(executor, Here):
        for done, task in enumerate(tasks):
            _under_way.hears = lambda share, done=done: progress(done + share, len(tasks))
            try:
                made = function(task)
            finally:
                _under_way.hears = None
            yield made
            progress(done + 1, len(tasks))
        return
    futures = [executor.submit(function, task) for task in tasks]
    try:
        for future in futures:
            while not wait([future], timeout=_LOOK).done:
                shares = executor.under_way if isinstance(executor, Pool) else 0.0
                progress(min(sum(f.done() for f in futures) + shares, len(tasks)), len(tasks))
            yield future.result()
            progress(sum(f.done() for f in futures), len(tasks))
    finally:
        for future in futures:
            future.cancel()


def finished() -> None:
    """Tell the parent that the task under way is no longer."""
    _under_way.tell(0.0)


class WorkerEnded(UserError):
    """A process that simulated came to an end that was not its own."""


@contextmanager
def processes(jobs: int | None = None) -> Iterator[Executor]:
    """A pool of `jobs` processes (all cores if absent, and never many times as many; one is this one); tasks not begun
    are dropped when the caller stops early."""
    # spawn: a fork would copy locks that the parent's threads (progress bars) hold, and a fork server dies of a SIGTERM
    # to the process group, after which CPython's pool never ends
    cores = os.cpu_count() or 1
    jobs = min(jobs or cores, MOST * cores)
    if jobs == 1:
        yield Here()
        return
    pool = Pool(jobs)
    try:
        with _held():  # each of these starts a worker
            for _ in range(jobs):
                pool.submit(int)
        yield pool
    except BrokenProcessPool as e:
        killed = any(worker.exitcode == -signal.SIGKILL for worker in (pool._processes or {}).values())
        with _held():
            _abandon(pool)
        why = "by the system, as happens when memory runs out" if killed else "before it was done"
        raise WorkerEnded(f"a simulating process was ended {why}; try fewer at a time with --jobs") from e
    except BaseException:
        with _held():  # a second Ctrl-C must not stop half-way what the first began
            _abandon(pool)
        raise
    pool.shutdown()


_NOTICING, _TIDYING = 2.0, 10.0  # s, for which an abandoned pool's thread is waited for, before and after it is helped
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _held() -> Iterator[None]:
    """Signals wait until the end of this; processes started here are deaf to them from their first instruction on (one
    that is interrupted while it imports would print a traceback that is nobody's)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _abandon(pool: ProcessPoolExecutor) -> None:
    """End a pool at once: what its workers were doing is of no use to anybody any more.

    Its own shutdown waits for the tasks under way, and for ever for a worker that ended while it was being sent one
    (CPython gh-94777): hence the reach inside.
    """
    workers, queue = list((pool._processes or {}).values()), pool._call_queue  # type: ignore[attr-defined]
    manager = pool._executor_manager_thread
    for item in list(pool._pending_work_items.values()):
        item.future = Future()  # nobody's: one that its owner has cancelled would trip the pool's own thread
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.kill()
    if manager is None:
        return
    # waited for, or Python, as it exits, may wake it through a pipe that it is just closing
    manager.join(_NOTICING)  # type: ignore[attr-defined]
    if manager.is_alive():  # type: ignore[attr-defined]
        # older CPythons' does not close this itself; of two that close it at once one fails
        with suppress(OSError):
            queue._reader.close()  # whoever is writing to the workers notices
        manager.join(_TIDYING)  # type: ignore[attr-defined]


def _follow_parent(shares: Any, workers: Any) -> None:
    """In a worker: signals to the process group are the parent's to answer, and its end, however it comes, is ours."""
    _under_way.write_to(shares, workers)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
