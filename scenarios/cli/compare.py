"""`servecast compare`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from scenarios.cli.commands import command
from scenarios.cli.main import FAILED
from scenarios.cli.options import (
    as_server_option,
    force_option,
    format_option,
    here,
    jobs_option,
    replicates_option,
    seed_option,
    warnings_option,
)
from scenarios.cli.output_files import COMPARISON, REPORT, check_output, write
from scenarios.cli.terminal import print_json, print_result, print_warnings, workers
from sim.model.errors import BadInput


@command("servecast compare run --calibration fit.json --tolerance e2e_mean=0.05")
@click.argument("sources", metavar="RUN [RUN | FORECAST]", nargs=-1, required=True, type=here)
@click.option("--calibration", "calibrated", type=here, help="Forecast the run with this calibration.")
@click.option(
    "--held-out", metavar="1,3", help="Rungs to score, counted from 0; the others are fitted. Default: every second."
)
@click.option(
    "--repeat",
    "repeats",
    metavar="RUN",
    multiple=True,
    type=here,
    help="The same load measured again, which shows the least error possible; repeatable. RUN-again is found by name.",
)
@as_server_option
@click.option("-o", "--output", type=here, help="Folder for comparison.json and report.html.")
@click.option("--tolerance", "tolerances", metavar="METRIC=0.05", multiple=True, help="Largest mean error; repeatable.")
@force_option
@replicates_option
@seed_option
@jobs_option
@format_option
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
    output_format: str | None,
) -> int:
    """Compare a measured run with its forecast.

    With a calibration every rung is forecast; without one, the model is fitted to some rungs and scored on the others.
    Two runs, two forecasts, or a run and what `simulate -o` wrote, are compared with each other. Exit status 1 when an
    error exceeds its tolerance (those of the run's own scenario apply unless some are given here), or one given here
    cannot be judged.
    """
    from scenarios.answer.csv import rows_as_csv
    from scenarios.answer.tables import show_comparison
    from scenarios.compare.comparison import parse_tolerances, write_comparison
    from scenarios.compare.repeatability import read_repeats
    from scenarios.compare.run_with_model import (
        compare_with_model,
        model_of_file,
        model_of_other_rungs,
        parse_rungs,
    )
    from scenarios.compare.saved import read_saved
    from scenarios.compare.two import compare_two
    from scenarios.forecast.size import check_replicates
    from scenarios.load.assumed import assumed_server
    from scenarios.progress import read_run_with_progress
    from scenarios.report.page import page
    from sim.terminal.console import console

    limits = parse_tolerances(tolerances)
    if output is not None:
        inputs = [*sources, *repeats, *([] if calibrated is None else [calibrated])]
        check_output(output / "comparison.json", COMPARISON, inputs=inputs, force=force)
        check_output(output / "report.html", REPORT, inputs=inputs, force=force)
    assumed = assumed_server(taken_as)
    if len(sources) == 2 and repeats:
        raise BadInput("expected only with one run: two are compared with each other", path="--repeat")
    if len(sources) == 2 and calibrated is None:
        first, second = map(read_saved, sources)
        found = compare_two(first, second, limits, assumed)
    elif len(sources) != 1 or (calibrated is not None and held_out is not None):
        raise BadInput(
            "expected a run (with --calibration FILE, or --held-out, or neither), or two of runs and forecasts"
        )
    else:
        check_replicates(replicates)
        run = assumed.of(read_run_with_progress(sources[0]))
        _ = run.server  # an unknown engine is refused before anything is fitted
        again = read_repeats(run, repeats)
        with workers(jobs) as (executor, display):
            if calibrated is None:
                scored = parse_rungs(held_out, len(run.rungs))
                model = model_of_other_rungs(run, scored, seed, executor, display)
            else:
                model = model_of_file(run, calibrated, assumed.engine)
            found = compare_with_model(run, model, limits, replicates, seed, executor, display, again)
    if output_format == "json":
        print_json(found)
    elif output_format == "csv":
        print_result(rows_as_csv(found))
    else:
        show_comparison(found, console())
    print_warnings(found.warnings)
    if output is not None:
        sys.stdout.flush()
        report = page([found], {}, f"{found.measured} against {found.simulated}")
        write_comparison(output / "comparison.json", found)
        write(output / "report.html", report.encode())
    unjudged = bool(limits) and found.passed is None
    return FAILED if found.passed is False or unjudged else 0
