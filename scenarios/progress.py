"""What is going on, on stderr: a bar on a terminal, elsewhere a line every few seconds; never silent."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sim.console import Console
from sim.text import printable

EVERY = 3.0  # s between lines where there is no terminal


class Commentary:
    """Tells how far things are: call it with what is being done, how much of it is done, and of how much."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._bars = Progress(*columns, console=self._console, transient=True)
        self._tasks: dict[str, object] = {}
        self._said = time.monotonic()

    def __enter__(self) -> Commentary:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` of `what`."""
        if self._console.is_terminal:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(printable(what), total=total)
            self._bars.update(self._tasks[what], completed=done)  # type: ignore[arg-type]
        elif time.monotonic() - self._said >= EVERY:
            self.say(f"{what}: {done} of {total}")

    def say(self, text: str) -> None:
        """A line of commentary."""
        self._said = time.monotonic()
        if self._console.is_terminal:
            self._bars.console.print(printable(text), highlight=False)
        else:
            print(printable(text), file=sys.stderr, flush=True)  # noqa: T201 - commentary goes to stderr as it is
