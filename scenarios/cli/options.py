"""Options that mean the same in every command; a block of them reaches its command as one value."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import click

from scenarios.load.changes import OPTIONS, changes
from sim.engines.catalog import NAMES
from sim.model.errors import BadInput

ENGINES = ", ".join(NAMES)
F = TypeVar("F", bound=Callable[..., Any])
ALL_WARNINGS = "servecast.all_warnings"  # in click's `Context.meta`


class Seconds(click.FloatRange):
    """A positive duration; click's own range accepts NaN and infinity."""

    name = "seconds"

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See `click.ParamType`."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


class Simulation(NamedTuple):
    """How to simulate: the changes of the scenario, the engine it is taken for, and with how many replicates."""

    sets: tuple[str, ...]
    taken_as: str | None
    seed: int
    replicates: int
    jobs: int | None


class Measurement(NamedTuple):
    """How to measure: the server (None: docker starts one), and how long it may take."""

    url: str | None
    resume: bool
    processes: int
    model: str | None
    timeout: float | None
    patience: float
    budget: float | None


def block(kind: type, name: str, *options: Callable[[F], F]) -> Callable[[F], F]:
    """Options whose values a command gets together, as the argument `name` of this `kind`."""

    def add(function: F) -> F:
        @wraps(function)
        def with_block(*args: Any, **given: Any) -> Any:
            values = {field: given.pop(field) for field in kind._fields}  # type: ignore[attr-defined]
            return function(*args, **{name: kind(**values)}, **given)

        made = cast("F", with_block)
        for option in reversed(options):
            made = option(made)
        return made

    return add


here = click.Path(path_type=Path)
file_here = click.Path(path_type=Path, dir_okay=False)
SHORT = {
    "users": ("N,...", "Concurrent users, a rung each: load.users."),
    "rate": ("R,...", "Requests/s, a rung each: load.rate."),
    "prompt_tokens": ("N", "Prompt lengths: workload.prompt_tokens."),
    "output_tokens": ("N", "Answer lengths: workload.output_tokens."),
    "slo": ("METRIC=LIMIT", "An SLO, such as e2e_p95=20; repeatable."),
}
seed_option = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed.")
force_option = click.option(
    "--force", is_flag=True, help="Replace files in -o that servecast did not write; never a run or an input."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
replicates_option = click.option(
    "--replicates",
    type=click.IntRange(min=19),
    default=99,
    show_default=True,
    help="Simulations per scenario. The 5 % and 95 % quantiles need 19; 99 make them stable.",
)
jobs_option = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    envvar="SERVECAST_JOBS",
    help="Processes. Default: SERVECAST_JOBS, else all.",
)
as_engine_option = click.option(
    "--as",
    "taken_as",
    metavar="ENGINE",
    callback=lambda _, __, name: _simulated(name),
    help=f"Treat a server of another or an unknown engine as this one ({ENGINES}).",
)
as_server_option = click.option(
    "--as",
    "taken_as",
    metavar="ENGINE|SCENARIO",
    help=f"Treat the server as this engine with default flags ({ENGINES}), or as that of a scenario with its flags, "
    "whatever the run says. Every number then carries a warning.",
)
transfer_option = click.option(
    "--transfer",
    type=click.FloatRange(min=0, max=2, min_open=True),
    metavar="SHARE",
    help="With --as, of step times measured on another simulated engine: how far they may be off, such as 0.3.",
)
run_output_option = click.option("-o", "--output", type=here, required=True, help="The run directory to write.")
resume_option = click.option("--resume", is_flag=True, help="Continue the run in -o at its first unfinished rung.")


def _simulated(name: str | None) -> str | None:
    if name is not None and name not in NAMES:
        raise BadInput(f"expected an engine that is simulated ({ENGINES})", path=f"--as {name}")
    return name


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


def format_option(function: F) -> F:
    """`--json` and `--csv`; the command gets `output_format`, which is `json`, `csv` or None for tables."""

    @wraps(function)
    def with_format(*args: Any, as_json: bool, as_csv: bool, **options: Any) -> Any:
        if as_json and as_csv:
            raise BadInput("expected one of --json and --csv")
        return function(*args, output_format="json" if as_json else "csv" if as_csv else None, **options)

    return cast("F", json_option(click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")(with_format)))


def _remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[ALL_WARNINGS] = value


warnings_option = click.option(
    "--warnings", is_flag=True, expose_value=False, callback=_remember, help="Show all warnings, not only three."
)
simulation_options = block(Simulation, "how", set_option, as_engine_option, seed_option, replicates_option, jobs_option)
measurement_options = block(
    Measurement,
    "client",
    click.option("--url", help="The server's URL. Default: docker starts one as the scenario's `launch:` says."),
    resume_option,
    click.option(
        "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that generate load."
    ),
    click.option("--model", help="The model's name where the server has several, or a folder with its tokenizer.json."),
    click.option(
        "--timeout",
        type=Seconds(),
        help="Longest wait, s, for the server to describe itself, then to count a prompt, then to warm up.",
    ),
    click.option(
        "--patience",
        type=Seconds(),
        default=300.0,
        show_default=True,
        help="Longest time, s, that a request may go without a token.",
    ),
    click.option("--budget", type=Seconds(), help="Longest time, s, that the whole measurement may take."),
)
