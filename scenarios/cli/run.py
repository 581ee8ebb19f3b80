"""`servecast run`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import click
import msgspec

from scenarios.cli.commands import command
from scenarios.cli.main import FAILED
from scenarios.cli.options import (
    Measurement,
    Simulation,
    force_option,
    here,
    measurement_options,
    simulation_options,
    warnings_option,
)
from scenarios.cli.output_files import (
    CALIBRATION,
    COMPARISON,
    FORECAST,
    REPORT,
    check_measured,
    check_output,
    write,
)
from scenarios.cli.terminal import print_note, print_result, print_warnings, workers

WRITTEN = {
    "comparison.json": COMPARISON,
    "calibration.json": CALIBRATION,
    "forecast.json": FORECAST,
    "report.html": REPORT,
}


@command("servecast run standin --url http://127.0.0.1:8080 -o out/standin")
@click.argument("source", metavar="SCENARIO")
@click.option("-o", "--output", type=here, required=True, help="Folder for the run and everything made from it.")
@measurement_options
@force_option
@click.option("--advise/--no-advise", default=True, show_default=True, help="Say what to measure next.")
@simulation_options
@warnings_option
def run(source: str, output: Path, client: Measurement, force: bool, advise: bool, how: Simulation) -> int:
    """Do everything: measure, calibrate, compare, forecast, report.

    Measures the scenario, fits a model to every second rung and compares it with the others, then fits it to all of
    them and forecasts, up to ten times the users that were measured; what to measure next and the answer come last. A
    scenario without a server block takes the engine that is found. Writes run/, comparison.json, calibration.json,
    forecast.json and report.html. Exit status 1 when an error exceeds the scenario's tolerances, or the model does not
    reproduce the loads it was fitted to. A server that is not known to be the scenario's engine is measured; the rest
    needs --as.
    """
    from measure.ladder.session import measure as run_ladder
    from measure.server.provenance import check_forecastable
    from scenarios.answer.tables import show_answer, show_evaluation
    from scenarios.compare.comparison import write_comparison
    from scenarios.compare.evaluate import assume_engine, beyond, check_two_loads, evaluate, next_measurement
    from scenarios.compare.fit_check import failures
    from scenarios.forecast.forecast import write_forecast
    from scenarios.forecast.size import check_measurable, check_replicates
    from scenarios.load.parameters import write_calibration
    from scenarios.load.scenario import files_of, load
    from scenarios.progress import read_run_with_progress
    from scenarios.report.page import page
    from sim.terminal.console import console

    check_replicates(how.replicates)
    scenario = load(source, *how.sets)
    check_measurable(scenario)
    inputs = files_of(source, *how.sets)
    check_measured(output / "run", client.resume, inputs=inputs)
    for name, kind in WRITTEN.items():
        check_output(output / name, kind, inputs=inputs, force=force)
    check_two_loads(scenario, source)
    options = client._asdict()
    options["check"] = partial(check_forecastable, taken_as=how.taken_as)
    folder = run_ladder(scenario, options.pop("url"), output / "run", **options, seed=how.seed)
    measured = read_run_with_progress(folder)
    if not scenario.written and measured.known:  # the engine was recognised
        scenario = msgspec.structs.replace(scenario, server=measured.scenario.server)
    measured = assume_engine(measured, scenario, how.taken_as)
    question = beyond(scenario, measured)
    with workers(how.jobs) as (executor, display):
        comparison, calibration, forecast = evaluate(
            measured,
            question,
            file=output / "calibration.json",
            replicates=how.replicates,
            seed=how.seed,
            executor=executor,
            display=display,
            changes=how.sets,
            taken_as=how.taken_as,
        )
        if advise:
            display.message("finding out what to measure next")
        advice = next_measurement(calibration, measured, question, executor, how.seed) if advise else []
    assert calibration.check is not None
    out = console()
    show_evaluation(forecast, comparison, calibration, out)
    sys.stdout.flush()
    print_warnings(forecast.warnings)
    for line in failures(calibration.check):
        print_note(f"check failed: {line}")
    out.print()
    for line in advice:
        out.print(line, highlight=False, soft_wrap=True)
    show_answer(forecast, out)  # last, where it is read
    sys.stdout.flush()  # shown before anything is written: a full disk loses no answer
    write_comparison(output / "comparison.json", comparison)
    write_calibration(output / "calibration.json", calibration)
    write_forecast(output / "forecast.json", forecast)
    text = page([forecast, measured, comparison], {}, f"{scenario.name}: measured and forecast")
    write(output / "report.html", text.encode())
    print_result(str(output / "report.html"))
    return FAILED if comparison.passed is False or not calibration.check.passed else 0
