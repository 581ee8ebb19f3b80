"""What commands print: results on stdout; notes, progress and warnings on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
import msgspec

from scenarios.cli.options import ALL_WARNINGS
from sim.model.text import LINE, escaped, printable
from sim.model.warning import SHOWN, Notice, folded

if TYPE_CHECKING:
    from scenarios.progress import ProgressDisplay
    from sim.executors import Executor


def print_result(text: str) -> None:
    """Print one or several lines of the result."""
    # JSON escapes control characters, but not every character that is invisible; it stays valid JSON
    sys.stdout.write(escaped(text) + ("" if text.endswith("\n") else "\n"))


def print_json(value: Any) -> None:
    """Print a result as indented JSON."""
    print_result(msgspec.json.format(msgspec.json.encode(value), indent=1).decode())


def print_note(text: str) -> None:
    """Print a line on stderr."""
    click.echo(printable(text), err=True)


def print_warnings(warnings: Iterable[Notice]) -> None:
    """Print warnings on stderr, each once: the three that matter most, or with `--warnings` all of them."""
    ctx = click.get_current_context(silent=True)
    most = None if ctx is not None and ctx.meta.get(ALL_WARNINGS) else SHOWN
    for line in folded(warnings, "--warnings shows all", most):
        click.echo(printable(line, limit=10 * LINE), err=True)


@contextmanager
def workers(jobs: int | None) -> Iterator[tuple[Executor, ProgressDisplay]]:
    """A pool of processes, and the display of how far they are."""
    from scenarios.progress import ProgressDisplay
    from sim.executors import processes

    with ProgressDisplay() as display, processes(jobs) as executor:
        yield executor, display
