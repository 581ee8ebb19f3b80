"""An executor that runs the last task first: what depends on the order of tasks is another result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from sim.executors import IN_PROCESS, Progress, Tell, silent

A = TypeVar("A")
R = TypeVar("R")


class Backwards:
    """See `sim.executors.Executor`."""

    def run(self, function: Callable[[A, Tell], R], tasks: Sequence[A], progress: Progress = silent) -> list[R]:
        return IN_PROCESS.run(function, tasks[::-1], progress)[::-1]
