"""Tables that fit the terminal: columns that do not fit are left out and named, and no cell is ever wrapped or cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from sim.terminal.console import Console

GAP = 2  # between columns
NARROWEST = 8  # of a terminal's columns: the least that a name is cut to, where even one column does not fit
INDENT = 4


class Column(NamedTuple):
    """A title and the cells below it.

    `rank` says how soon it is left out: the largest goes first, of equals the last one; 0 never goes.
    """

    title: str
    cells: Sequence[str]
    rank: int = 1
    left: bool = False

    @property
    def width(self) -> int:
        """The columns of the terminal that it takes; wide characters take two."""
        return max(map(cell_len, (self.title, *self.cells)))


def fitting(columns: Sequence[Column], width: int) -> tuple[list[Column], list[Column]]:
    """The columns that fit into a width, and those left out."""
    shown = list(columns)
    while sum(c.width for c in shown) + GAP * (len(shown) - 1) > width and any(c.rank for c in shown):
        shown.pop(max(range(len(shown)), key=lambda i: (shown[i].rank, i)))
    return shown, [column for column in columns if column not in shown]


def table(columns: Sequence[Column], width: int) -> tuple[Table, list[Column]]:
    """The table of what fits into a width, and the columns left out. Only names, in the first column, are ever cut."""
    shown, dropped = fitting(columns, width)
    made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    room = max(NARROWEST, width - sum(c.width for c in shown[1:]) - GAP * (len(shown) - 1))
    for i, column in enumerate(shown):
        justify, most = "left" if column.left else "right", room if i == 0 else None
        made.add_column(Text(column.title), justify=justify, no_wrap=True, max_width=most)  # type: ignore[arg-type]
    for cells in zip(*(column.cells for column in shown), strict=True):
        made.add_row(*map(Text, cells))
    return made, dropped


def show_columns(columns: Sequence[Column], out: Console, notes: Iterable[str] = (), instead: str = "--json") -> None:
    """Print a table and the notes on it; `instead` are the options that show the columns left out."""
    made, dropped = table(columns, out.width)
    out.print(made)
    said = [*notes]
    if dropped:
        said.append(f"not shown: {'; '.join(c.title.strip() for c in dropped)} ({instead}, or a wider terminal)")
    for note in said:
        out.print(Text(note, style="dim"))


def show_listed(rows: Iterable[tuple[str, str]], out: Console) -> None:
    """Print names and what is said of each: beside its name where one line is enough, else below it."""
    rows = list(rows)
    widest = max((cell_len(name) for name, _ in rows), default=0)
    for name, text in rows:
        beside = f"{name}{' ' * (widest - cell_len(name))}  {text}"
        if cell_len(beside) <= out.width:
            out.print(Text(beside.rstrip()))
            continue
        out.print(Text(name))
        for line in Text(text).wrap(out, max(NARROWEST, out.width - INDENT)):
            line.rstrip()
            out.print(Text(" " * INDENT) + line)
