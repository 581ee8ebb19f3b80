"""What the commands share: options that mean the same everywhere, the pool they work on, the way they speak."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import click

from scenarios.load.changes import OPTIONS, changes
from sim.engines.catalog import NAMES
from sim.model.errors import BadInput
from sim.model.text import LINE, escaped, printable
from sim.model.warning import SHOWN, folded

if TYPE_CHECKING:
    from scenarios.progress import Commentary
    from sim.executors import Executor
    from sim.model.scenario import Scenario
    from sim.run import Run

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
SHORT = {
    "users": ("N,...", "Users at once, a rung each: load.users."),
    "rate": ("R,...", "Requests/s, a rung each: load.rate."),
    "prompt_tokens": ("N", "workload.prompt_tokens."),
    "output_tokens": ("N", "workload.output_tokens."),
    "slo": ("METRIC=LIMIT", "slo.METRIC, such as e2e_p95=20; repeatable."),
}
ALL_WARNINGS = "servecast.all_warnings"  # in click's `Context.meta`
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
jobs_option = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    envvar="SERVECAST_JOBS",
    help="Processes; SERVECAST_JOBS or all cores if absent.",
)

as_option = click.option(
    "--as",
    "taken_as",
    metavar="ENGINE",
    callback=lambda _, __, name: engine_named(name),
    help="Take a server of another engine, or of none that is known, for this one (tgi-0.9.4).",
)


def engine_named(name: str | None) -> str | None:
    """The engine that `--as` names; complains about one that is not simulated."""
    if name is not None and name not in NAMES:
        raise BadInput(f"expected an engine that is simulated ({', '.join(NAMES)})", path=f"--as {name}")
    return name


AS_HELP = (
    "Take the server for this engine (tgi-0.9.4, with default flags), or for that of a scenario with its flags, "
    "whatever the run says; warned about at every number."
)


class Assumed(NamedTuple):
    """What `--as` says: an engine, and a scenario that has its flags, if one was named."""

    engine: str
    like: Scenario | None = None


def assumed_engine(text: str | None) -> Assumed | None:
    """What `--as ENGINE|SCENARIO` says."""
    if text is None or text in NAMES:
        return None if text is None else Assumed(text)
    from scenarios.load.scenario import load

    try:
        like = load(text)
    except BadInput as e:
        if e.path is not None and str(e.path) != text:
            raise
        raise BadInput(f"expected {' or '.join(NAMES)}, or a scenario ({e.message})", path=f"--as {text}") from e
    return Assumed(like.server.engine, like)


def taken_for(run: Run, taken: Assumed | None) -> Run:
    """The run with its server taken for what `--as` says."""
    from sim.run import taken_as

    return run if taken is None else taken_as(run, taken.engine, taken.like)


def set_option(function: F) -> F:
    """`--set` and its short forms; the command gets all of them as `sets`."""

    @wraps(function)
    def with_changes(*args: Any, sets: tuple[str, ...], **options: Any) -> Any:
        given = {name: options.pop(name) for name in SHORT}
        for name in OPTIONS:
            if len(given[name]) > 1:
                raise BadInput("given twice; expected it once", path=f"--{name.replace('_', '-')}")
        return function(*args, sets=changes(sets, given), **options)

    made: Any = with_changes
    for name, (metavar, text) in reversed(SHORT.items()):
        made = click.option(f"--{name.replace('_', '-')}", name, metavar=metavar, multiple=True, help=text)(made)
    text = "Change any key of the scenario; repeatable. Short forms follow."
    return cast("F", click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help=text)(made))


def _remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[ALL_WARNINGS] = value


warnings_option = click.option(
    "--warnings", is_flag=True, expose_value=False, callback=_remember, help="Show all warnings, not three."
)


def simulation_options(function: F) -> F:
    """The options of commands that simulate."""
    for option in (jobs_option, replicates_option, seed_option, as_option, set_option):
        function = option(function)
    return function


def one_of(as_json: bool, as_csv: bool) -> None:
    """Complain about two ways of printing at once."""
    if as_json and as_csv:
        raise BadInput("expected one of --json and --csv")


def say(text: str) -> None:
    """A line of the result, or several."""
    # escapes are JSON's: of JSON, which escapes control characters but not all that look like nothing, it stays valid
    sys.stdout.write(escaped(text) + ("" if text.endswith("\n") else "\n"))


def remark(text: str) -> None:
    """A line of commentary."""
    click.echo(printable(text), err=True)


@contextmanager
def working(jobs: int | None) -> Iterator[tuple[Executor, Commentary]]:
    """A pool of processes, and somebody who tells how far they are."""
    from scenarios.progress import Commentary
    from sim.executors import processes

    with Commentary() as commentary, processes(jobs) as executor:
        yield executor, commentary


def warn(texts: Iterable[str]) -> None:
    """Warnings go to stderr, each once: the three that move the asked number most, or all of them if asked for."""
    ctx = click.get_current_context(silent=True)
    most = None if ctx is not None and ctx.meta.get(ALL_WARNINGS) else SHOWN
    for line in folded(texts, "--warnings shows all", most):
        click.echo(printable(line, limit=10 * LINE), err=True)
