"""Progress on stderr: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sim.model.text import printable
from sim.terminal.console import Console

if TYPE_CHECKING:
    from sim.run import Run

KNOWN = 5.0  # s after which the speed so far predicts the rest
EVERY = 3.0  # s between lines where there is no terminal


class ProgressDisplay:
    """Shows progress. Call it with the name of the work, how much of it is done, and its total."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=self._console, transient=True)
        self._tasks: dict[str, object] = {}
        self._began: dict[str, float] = {}
        self._said = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def __call__(self, what: str, done: float, total: int) -> None:
        """`done` of `total` of `what`, and how long the rest takes, once the speed so far says that."""
        began = self._began.setdefault(what, time.monotonic())
        if self._console.is_terminal:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(printable(what), total=total)
            self._bars.update(self._tasks[what], completed=done)  # type: ignore[arg-type]
        elif time.monotonic() - self._said >= EVERY:
            self.message(f"{what}: {_counted(done)} of {total}{_left(time.monotonic() - began, done / total)}")

    def message(self, text: str) -> None:
        """A line of commentary."""
        self._said = time.monotonic()
        if self._console.is_terminal:
            self._bars.console.print(printable(text), highlight=False)
        else:
            print(printable(text), file=sys.stderr, flush=True)  # noqa: T201 - commentary goes to stderr as it is


LARGE = 50_000_000  # bytes of requests whose reading takes seconds


def read_run_with_progress(path: Path) -> Run:
    """Read a run directory; of a large one, say how far that is."""
    from sim.run import read_run

    if sum(file.stat().st_size for file in path.glob("requests*.jsonl*")) < LARGE:
        return read_run(path)
    with ProgressDisplay() as display:
        return read_run(path, lambda done, total: display(f"reading {path}, MB", done // 10**6, total // 10**6))


def _counted(done: float) -> str:
    return f"{done:.0f}" if done == int(done) else f"{done:.1f}"


def _left(elapsed: float, share: float) -> str:
    """How long the rest takes at the speed so far; empty if that is unknown or short."""
    if elapsed < KNOWN or not 0 < share < 1:
        return ""
    left = elapsed * (1 - share) / share
    if left < 2 * EVERY:
        return ""
    return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"
