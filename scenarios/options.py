"""What the commands share: options that mean the same everywhere, the pool they work on, the way they speak."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sim.errors import BadInput

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from scenarios.progress import Commentary

F = TypeVar("F", bound=Callable[..., Any])


class Seconds(click.FloatRange):
    """A duration; click's own range lets NaN through, which is neither too little nor too much."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See `click.ParamType`."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


file_here = click.Path(path_type=Path, dir_okay=False)
set_option = click.option(
    "--set", "sets", metavar="KEY=VALUE", multiple=True, help="Change any key of the scenario; repeatable."
)
seed_option = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
force_option = click.option(
    "--force", is_flag=True, help="Replace files in -o that servecast did not write; never a run, nor an input."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
csv_option = click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
replicates_option = click.option(
    "--replicates",
    type=click.IntRange(min=19),
    default=99,
    show_default=True,
    help="Simulations per scenario; 99 make the bands whole.",
)
jobs_option = click.option("--jobs", type=click.IntRange(min=1), help="Processes; all cores if absent.")


def simulation_options(function: F) -> F:
    """The options of commands that simulate."""
    for option in (jobs_option, replicates_option, seed_option, set_option):
        function = option(function)
    return function


def one_of(as_json: bool, as_csv: bool) -> None:
    """Complain about two ways of printing at once."""
    if as_json and as_csv:
        raise BadInput("expected one of --json and --csv")


def say(text: str) -> None:
    """A line of the result."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


@contextmanager
def working(jobs: int | None) -> Iterator[tuple[Executor, Commentary]]:
    """A pool of processes, and somebody who tells how far they are."""
    from scenarios.progress import Commentary
    from sim.sweep import processes

    with Commentary() as commentary, processes(jobs) as executor:
        yield executor, commentary


def doubt(texts: Iterable[str]) -> None:
    """Doubts go to stderr, each once."""
    for text in dict.fromkeys(texts):
        click.echo(f"doubt: {text}", err=True)
