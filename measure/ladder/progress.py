"""Progress of a measurement on stderr: a growing table on a terminal, one line per rung elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from measure.ladder.totals import Window
from sim.model.text import printable
from sim.model.warning import Notice
from sim.terminal.columns import Column, table
from sim.terminal.console import Console

# title, and rank: in a narrow terminal columns of the highest rank are left out first
COLUMNS = {
    "load": 0,
    "RPS": 1,
    "TTFT p50": 6,
    "TTFT p95": 3,
    "E2E p50": 5,
    "E2E p95": 2,
    "tokens/s": 4,
    "±": 7,
    "errors": 1,
}


def cells(load: str, w: Window) -> list[str]:
    """The cells of one rung: seconds, requests/s, and the half-width of tokens/s in percent."""
    failed = sum(w.errors.values())
    half = f"{w.half_width:.1%}" if w.half_width < 10 else "?"
    times = [f"{x:.3f}" if x == x else "-" for x in (w.ttft_p50, w.ttft_p95, w.e2e_p50, w.e2e_p95)]
    return [load, f"{w.rps:.3g}", *times, f"{w.tokens_per_s:.4g}", half, f"{failed}" if failed else ""]


class Progress:
    """Shows rungs on a console (stderr)."""

    def __init__(self, console: Console):
        self.console = console
        self._rows: list[list[str]] = []
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self.console.print(self._table(self._rows))

    def update(self, load: str, doing: str, window: Window | None) -> None:
        """Show the current rung, and what it still waits for."""
        if self._live is not None:
            rows = [*self._rows, cells(load, window)] if window is not None else self._rows
            self._live.update(Group(self._table(rows), Text(f"{load}: {doing}", style="dim")))

    def finish(self, load: str, window: Window, status: str, warnings: Iterable[Notice]) -> None:
        """Show a finished rung."""
        row = cells(load, window)
        self._rows.append(row)
        if self._live is None:
            parts = [f"{name} {value}" for name, value in list(zip(COLUMNS, row, strict=True))[1:] if value]
            if found := len(list(warnings)):  # their texts are printed at the end of the ladder
                parts.append(f"{found} warning{'s' if found > 1 else ''}")
            self.say(f"{load}: {status}; {', '.join(parts)}")

    def say(self, sentence: str) -> None:
        """Print a line."""
        self.console.print(printable(sentence), highlight=False, soft_wrap=True)

    def _table(self, rows: list[list[str]]) -> Table:
        cells = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
        columns = [
            Column(title, list(column), rank, left=rank == 0)
            for (title, rank), column in zip(COLUMNS.items(), cells, strict=True)
        ]
        return table(columns, self.console.width)[0]
