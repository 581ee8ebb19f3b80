"""`servecast calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from scenarios.cli.commands import command
from scenarios.cli.main import FAILED
from scenarios.cli.options import (
    as_server_option,
    file_here,
    force_option,
    jobs_option,
    json_option,
    seed_option,
    set_option,
    warnings_option,
)
from scenarios.cli.output_files import CALIBRATION, check_output
from scenarios.cli.terminal import print_note, print_result, print_warnings, workers
from sim.model.files.atomic import is_stdout


@command("servecast calibrate run-a run-b -o calibration.json")
@click.argument("names", metavar="(RUN... | TABLE.csv... | SCENARIO)", nargs=-1, required=True)
@click.option("-o", "--output", type=file_here, help="Where to write the calibration.")
@click.option("--where", "wheres", metavar="COLUMN=VALUE", multiple=True, help="Which rows of a table; repeatable.")
@click.option("--advise", is_flag=True, help="Say what to measure next.")
@click.option("--question", "asked", metavar="SCENARIO", help="What the advice is for: its highest load.")
@force_option
@as_server_option
@seed_option
@set_option
@jobs_option
@json_option
@warnings_option
def calibrate(
    names: tuple[str, ...],
    output: Path | None,
    wheres: tuple[str, ...],
    advise: bool,
    asked: str | None,
    force: bool,
    taken_as: str | None,
    seed: int,
    sets: tuple[str, ...],
    jobs: int | None,
    as_json: bool,
) -> int:
    """Fit the model to runs, tables or published figures.

    Measured runs are best. A table has columns for prefill and decode times; a scenario names a table or has figures
    under `published:`, which are fitted through the simulator. The fit is checked by simulating again what it was
    fitted to; exit status 1, after the file is written, when that is not reproduced.
    """
    from scenarios.answer.tables import show_calibration
    from scenarios.compare.fit import files_read, fit_sources, question, read_sources
    from scenarios.compare.fit_check import failures
    from scenarios.forecast.next_measurement import next_measurements
    from scenarios.load.assumed import assumed_server
    from scenarios.load.parameters import write_calibration
    from sim.terminal.console import console

    if output is not None:
        check_output(output, CALIBRATION, inputs=files_read(names, asked, sets), force=force)
    sources = read_sources(names, wheres, sets, assumed_server(taken_as))
    target = question(sources, asked) if advise or asked else None  # an error in it comes before the fit
    with workers(jobs) as (executor, display):
        calibration = fit_sources(sources, seed, executor, display)
    if output is not None and is_stdout(output):  # the file alone, where it was asked for
        write_calibration(output, calibration)
    elif as_json:
        print_result(msgspec.json.encode(calibration).decode())
    else:
        show_calibration(calibration, [said for run in sources.runs for said in run.assumptions], console())
        if output is None:
            print_note("Nothing is written; -o FILE keeps the calibration.")
    print_warnings([said.of(run.name) for run in sources.runs for said in run.warnings] + calibration.warnings)
    if target is not None:
        with workers(jobs) as (executor, _):
            lines = next_measurements(calibration, sources.runs, target, executor, seed)
        for line in lines:
            (print_note if as_json else print_result)(line)
    if output is not None and not is_stdout(output):  # last: a full disk does not lose what was fitted
        sys.stdout.flush()
        write_calibration(output, calibration)
        if not as_json:
            print_result(str(output))
    assert calibration.check is not None
    for line in failures(calibration.check):
        print_note(f"check failed: {line}")
    return 0 if calibration.check.passed else FAILED
