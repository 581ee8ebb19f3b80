"""The commands that judge: compare a model with what was measured, report it all on one page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from scenarios.cli.main import FAILED, command
from scenarios.cli.options import (
    AS_HELP,
    Assumed,
    assumed_engine,
    csv_option,
    file_here,
    force_option,
    jobs_option,
    json_option,
    one_of,
    replicates_option,
    say,
    seed_option,
    taken_for,
    warn,
    warnings_option,
    working,
)
from scenarios.cli.output import COMPARISON, REPORT, check_output, write
from sim.model.errors import BadInput
from sim.model.files.atomic import is_stdout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scenarios.compare.comparison import Comparison
    from scenarios.progress import Commentary
    from sim.executors import Executor
    from sim.run import Run

here = click.Path(path_type=Path)


@command("servecast compare run --calibration fit.json --tolerance e2e_mean=0.05")
@click.argument("sources", metavar="RUN [RUN | FORECAST]", nargs=-1, required=True, type=here)
@click.option("--calibration", "calibrated", type=here, help="Forecast the run with this calibration.")
@click.option(
    "--held-out", metavar="1,3", help="Rungs to score, from 0, when the others are fitted; else every second."
)
@click.option(
    "--repeat",
    "repeats",
    metavar="RUN",
    multiple=True,
    type=here,
    help="The same measured again, for what no model can beat; repeatable. RUN-again is found by itself.",
)
@click.option("--as", "taken_as", metavar="ENGINE|SCENARIO", help=AS_HELP)
@click.option("-o", "--output", type=here, help="A folder for comparison.json and report.html.")
@click.option("--tolerance", "tolerances", metavar="METRIC=0.05", multiple=True, help="Largest mean error; repeatable.")
@force_option
@replicates_option
@seed_option
@jobs_option
@json_option
@csv_option
@warnings_option
def compare(
    sources: tuple[Path, ...],
    calibrated: Path | None,
    held_out: str | None,
    repeats: tuple[Path, ...],
    taken_as: str | None,
    output: Path | None,
    tolerances: tuple[str, ...],
    force: bool,
    replicates: int,
    seed: int,
    jobs: int | None,
    as_json: bool,
    as_csv: bool,
) -> int:
    """Hold a measured run against its forecast.

    With a calibration every rung is forecast; without, the model is fitted to some rungs and scored on the others. Two
    runs, two forecasts, or a run and what `simulate -o` wrote, are compared with each other. Exit status 1 when an
    error exceeds its tolerance (those of the run's own scenario count unless some are given here), or one given here
    cannot be judged.
    """
    from scenarios.answer.csv import rows_as_csv
    from scenarios.answer.tables import console, show_comparison

    one_of(as_json, as_csv)
    limits = dict(_tolerance(text) for text in tolerances)
    if output is not None:
        inputs = [*sources, *repeats, *([] if calibrated is None else [calibrated])]
        check_output(output / "comparison.json", COMPARISON, inputs=inputs, force=force)
        check_output(output / "report.html", REPORT, inputs=inputs, force=force)
    found = _compare(sources, calibrated, held_out, repeats, assumed_engine(taken_as), limits, replicates, seed, jobs)
    if as_json:
        say(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
    elif as_csv:
        say(rows_as_csv(found))
    else:
        show_comparison(found, console())
    warn(found.warnings)
    if output is not None:
        sys.stdout.flush()
        _write(output, found)
    unjudged = bool(limits) and found.passed is None  # what was asked to hold was not looked at
    return FAILED if found.passed is False or unjudged else 0


def _write(folder: Path, comparison: Comparison) -> None:
    from scenarios.compare.comparison import write_comparison
    from scenarios.report.page import page

    title = f"{comparison.measured} against {comparison.simulated}"
    made = page([comparison], {}, title).encode()
    write_comparison(folder / "comparison.json", comparison)
    write(folder / "report.html", made)


def _tolerance(text: str) -> tuple[str, float]:
    from sim.model.files.shape import known
    from sim.results.metrics import COMPARED

    metric, _, limit = text.partition("=")
    where = f"--tolerance {text}"
    known(metric, COMPARED, "metric", (metric,), lambda key, message: BadInput(message, path=where))
    try:
        value = float(limit)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise BadInput("expected METRIC=SHARE, such as e2e_mean=0.05", path=where)
    return metric, value


def _compare(
    sources: tuple[Path, ...],
    calibrated: Path | None,
    held_out: str | None,
    repeated: tuple[Path, ...],
    taken: Assumed | None,
    tolerances: dict[str, float],
    replicates: int,
    seed: int,
    jobs: int | None,
) -> Comparison:
    from scenarios.compare import run_with_model, two
    from scenarios.compare.diagnostics import evidence
    from scenarios.compare.repeatability import read_repeats
    from scenarios.compare.training_rungs import fitted_rungs
    from scenarios.forecast.forecast import Forecast
    from scenarios.forecast.size import check_replicates
    from scenarios.forecast.warnings import misfits
    from scenarios.progress import read_aloud
    from scenarios.report.page import read_item
    from sim.model.calibration import check_suits, read_calibration
    from sim.run import Run

    if len(sources) == 2 and repeated:
        raise BadInput("expected only with one run: two are compared with each other", path="--repeat")
    if len(sources) == 2 and calibrated is None:
        first, second = (read_item(path) for path in sources)
        if isinstance(first, Run) and isinstance(second, Run):
            return two.compare_runs(first, second, tolerances or first.scenario.tolerances)
        if isinstance(first, Forecast) and isinstance(second, Forecast):
            return two.compare_forecasts(first, second, tolerances)
        if isinstance(first, Run) and isinstance(second, Forecast):
            return two.compare_with_forecast(taken_for(first, taken), second, tolerances)
        raise BadInput("expected a run and a forecast, two runs, or two forecasts")
    if len(sources) != 1 or (calibrated is not None and held_out is not None):
        raise BadInput(
            "expected a run (with --calibration FILE, or --held-out, or neither), or two of runs and forecasts"
        )
    check_replicates(replicates)
    run = taken_for(read_aloud(sources[0]), taken)
    engine = run.server.engine  # known, or refused, before anything is fitted
    again = read_repeats(run, repeated)
    with working(jobs) as (executor, commentary):
        if calibrated is None:
            scored = _rungs(held_out, run)
            return held_out_comparison(run, scored, tolerances, replicates, seed, executor, commentary, again)
        calibration = read_calibration(calibrated)
        meant = None if taken is None else taken.engine
        suits = [] if run.assumptions else check_suits(calibration, run.server.declared, meant, calibrated)
        commentary.say(f"replaying {run.name} {replicates} times")
        tables = run_with_model.forecast_run(
            run, calibration, executor, replicates=replicates, seed=seed, taken_as=meant
        )
        behind = evidence(run, calibration, executor, seed)
    fitted, said = fitted_rungs(run, calibration)
    return run_with_model.compare(
        run,
        tables,
        fitted=fitted,
        tolerances=tolerances or run.scenario.tolerances,
        repeats=again,
        simulated=calibrated.name,
        warnings=[*said, *misfits(run, calibration, tables)],
        evidence=behind,
        taken_as=engine if run.assumptions or suits else None,
        assumed=[*run.assumptions, *suits],
    )


def _rungs(held_out: str | None, run: Run) -> set[int]:
    every = range(len(run.rungs))
    if held_out is None:
        return set(every[1::2])
    parts = held_out.split(",")
    if not all(part.strip() in map(str, every) for part in parts) or len(set(parts)) == len(every):
        raise BadInput(f"expected some of the rungs 0 to {len(every) - 1}, such as 1,3", path=f"--held-out {held_out}")
    return {int(part) for part in parts}


def held_out_comparison(
    run: Run,
    held_out: set[int],
    tolerances: dict[str, float],
    replicates: int,
    seed: int,
    executor: Executor,
    commentary: Commentary,
    repeats: Sequence[Run] = (),
) -> Comparison:
    """A run against the forecast of a model that was fitted to its other rungs."""
    from calibrate.sources.streamed import calibrate_runs
    from scenarios.compare import run_with_model
    from scenarios.compare.diagnostics import evidence
    from scenarios.forecast.warnings import misfits

    fitted = set(range(len(run.rungs))) - held_out
    if not fitted or not held_out:
        raise BadInput("expected at least two rungs: some to fit and some to score", path=run.path or run.name)
    commentary.say(f"fitting {len(fitted)} of {len(run.rungs)} rungs of {run.name}")
    calibration = calibrate_runs([run], seed, [fitted], executor)
    commentary.say(f"replaying {run.name} {replicates} times")
    tables = run_with_model.forecast_run(run, calibration, executor, replicates=replicates, seed=seed)
    return run_with_model.compare(
        run,
        tables,
        fitted=fitted,
        tolerances=tolerances or run.scenario.tolerances,
        repeats=repeats,
        simulated="forecast",
        warnings=misfits(run, calibration, tables),
        evidence=evidence(run, calibration, executor, seed),
        taken_as=run.taken_as,
        assumed=run.assumptions,
    )


@command("servecast report out/llama2-70b-1500-100 run -o report.html")
@click.argument("sources", metavar="(RUN | FORECAST | COMPARISON)...", nargs=-1, required=True, type=here)
@click.option("-o", "--output", type=file_here, default=Path("report.html"), show_default=True)
@force_option
@click.option("--title", default="What this LLM server will do under load", show_default=True)
def report(sources: tuple[Path, ...], output: Path, force: bool, title: str) -> None:
    """Put it all on one self-contained page.

    Takes run directories, what `simulate -o` wrote, forecasts and comparisons as JSON.
    """
    from scenarios.forecast.forecast import Forecast
    from scenarios.report.page import page, read_item
    from sim.run import read_run

    check_output(output, REPORT, inputs=sources, force=force)
    items = [read_item(path) for path in sources]
    runs: dict[str, Run] = {}
    for path, item in zip(sources, items, strict=True):
        two = (path if path.is_dir() else path.parent) / "run"
        if isinstance(item, Forecast) and (two / "run.json").exists():
            run = read_run(two)
            if run.kind == "simulated":  # not the measured one that a forecast was fitted to
                runs[item.name] = run
    write(output, page(items, runs, title).encode())
    if not is_stdout(output):
        say(str(output))
