"""The commands that meet a server: measure one (or take over what another tool measured), be one, go the whole way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from scenarios.cli.main import FAILED, command
from scenarios.cli.options import (
    Seconds,
    as_option,
    force_option,
    jobs_option,
    remark,
    replicates_option,
    say,
    seed_option,
    set_option,
    warn,
    warnings_option,
    working,
)
from scenarios.cli.output import (
    CALIBRATION,
    COMPARISON,
    FORECAST,
    REPORT,
    check_measured,
    check_output,
    check_run,
    write,
)
from sim.model.errors import BadInput

if TYPE_CHECKING:
    from sim.model.scenario import Scenario
    from sim.run import Run

here = click.Path(path_type=Path)
processes_option = click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that make load."
)
model_option = click.option(
    "--model", help="The model's name where the server has several, or a folder with its tokenizer.json."
)
budget_option = click.option(
    "--budget", type=Seconds(min=0, min_open=True), help="The longest all of it may take, s, from the start."
)
timeout_option = click.option(
    "--timeout",
    type=Seconds(min=0, min_open=True),
    help="The longest to wait, s, for the server to say what it is, then to count a prompt, then to warm up.",
)
patience_option = click.option(
    "--patience",
    type=Seconds(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="The longest a request may go without a token, s.",
)


@command("servecast measure standin --url http://127.0.0.1:8080 -o run")
@click.argument("scenario")
@click.option("--url", help="The server; without it, docker starts one as the scenario's `launch:` says.")
@click.option("-o", "--output", type=here, required=True, help="The run directory to be written.")
@click.option("--resume", is_flag=True, help="Go on at the first unfinished rung of the run in -o.")
@processes_option
@model_option
@click.option("--bind", metavar="HOST:PORT", help="Where workers on other machines may join.")
@click.option(
    "--remote", type=click.IntRange(min=0), default=0, show_default=True, help="How many of them to wait for."
)
@timeout_option
@patience_option
@budget_option
@set_option
@seed_option
def measure(
    scenario: str,
    url: str | None,
    output: Path,
    resume: bool,
    processes: int,
    model: str | None,
    bind: str | None,
    remote: int,
    timeout: float | None,
    patience: float,
    budget: float | None,
    sets: tuple[str, ...],
    seed: int,
) -> int:
    """Climb the users ladder on a live server.

    Leaves a run directory, which can be calibrated from, compared and reported. A token for the server comes from
    SERVECAST_API_KEY. Ctrl-C keeps what was measured; --resume goes on from there. Exit status 1 when no load was
    measured with a single answer.
    """
    from measure.ladder.session import measure as climb
    from scenarios.forecast.size import check_measurable
    from scenarios.load.scenario import files_of, load
    from scenarios.progress import read_aloud
    from sim.results import metrics

    check_measured(output, resume, inputs=files_of(scenario, *sets))
    asked = load(scenario, *sets)
    check_measurable(asked)
    if remote and not bind:
        raise BadInput("expected HOST:PORT for the workers of --remote to join", path="--bind")
    found = climb(
        asked,
        url,
        output,
        resume=resume,
        processes=processes,
        model=model,
        seed=seed,
        timeout=timeout,
        patience=patience,
        budget=budget,
        bind=bind,
        remote=remote,
    )
    say(str(found))
    table = metrics.table(read_aloud(found))
    return 0 if len(table) and table["completions"].any() else FAILED


@command("servecast import guidellm.json -o run", name="import")
@click.argument("file", type=here)
@click.option("-o", "--output", type=here, required=True, help="The run directory to be written.")
@warnings_option
def take(file: Path, output: Path) -> None:
    """Make a run of another tool's results.

    Of guidellm (JSON), `vllm bench serve --save-result --save-detailed`, sglang's bench_serving --output-details,
    aiperf (profile_export.jsonl, or the folder of a sweep), genai-perf (profile_export.json), inference-perf
    (per_request_lifecycle_metrics.json), and locust (the history that --csv writes, or rows of locust-plugins'
    JmeterListener). What they do not say is said on stderr, and in the run. The load is what the requests show.
    """
    from scenarios.importers.detect import import_results
    from sim.run import write_run

    check_run(output, inputs=[file])
    run = import_results(file)
    say(str(write_run(run, output, read_back=True)))
    warn([*run.warnings, *(f"at {rung.named}: {text}" for rung in run.rungs for text in rung.warnings)])


@command("servecast standin --port 8080 --fault overloaded=0.05")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes any free one.")
@click.option("--calibration", "calibrated", type=here, help="Step times; a quarter of the article's if absent.")
@click.option("--fault", "faults", metavar="KIND=SHARE", multiple=True, help="What should go wrong; repeatable.")
@click.option("--log", type=here, help="A folder for what the engine did and when it sent each token.")
@seed_option
def standin(
    host: str, port: int, calibrated: Path | None, faults: tuple[str, ...], log: Path | None, seed: int
) -> None:
    """Stand in for TGI 0.9.4 over HTTP, in real time.

    Scheduled by the simulator's own engine, with the step times of a calibration. Prints its URL; ends at Ctrl-C.
    Faults: reset, stall, overloaded, error, eos, incomplete (shares of requests), after=N, die=SECONDS, crlf.
    """
    from measure.standin.faults import parse_faults
    from measure.standin.server import announce, serve
    from sim.model.calibration import read_calibration

    try:
        wrong = parse_faults(list(faults))
    except ValueError as e:
        raise BadInput(str(e), path="--fault") from e
    calibration = None if calibrated is None else read_calibration(calibrated)
    serve(host, port, calibration, faults=wrong, log=log, seed=seed, ready=announce)


@command("servecast run standin --url http://127.0.0.1:8080 -o out/standin")
@click.argument("scenario")
@click.option("--url", help="The server; without it, docker starts one as the scenario's `launch:` says.")
@click.option("-o", "--output", type=here, required=True, help="A folder for the run and all that is made of it.")
@click.option("--resume", is_flag=True, help="Go on with the ladder of the run in -o.")
@processes_option
@model_option
@timeout_option
@patience_option
@budget_option
@force_option
@as_option
@set_option
@replicates_option
@seed_option
@jobs_option
@warnings_option
def run(
    scenario: str,
    url: str | None,
    output: Path,
    resume: bool,
    processes: int,
    model: str | None,
    timeout: float | None,
    patience: float,
    budget: float | None,
    force: bool,
    taken_as: str | None,
    sets: tuple[str, ...],
    replicates: int,
    seed: int,
    jobs: int | None,
) -> int:
    """Go the whole way: measure to report.

    Measures the scenario, fits a model to every second rung and holds it against the others, then fits it to all of
    them and forecasts; the answer comes last. Writes run/, comparison.json, calibration.json, forecast.json and
    report.html. Exit status 1 when an error exceeds the scenario's tolerances, or the model does not show the loads it
    was fitted to. A server that is not known to be the scenario's engine is measured; the rest needs --as.
    """
    from calibrate.sources.streamed import calibrate_runs
    from measure.ladder.session import measure as climb
    from scenarios.answer.tables import console, show_answer, show_check, show_comparison, show_curves, warned
    from scenarios.cli.judge import held_out_comparison
    from scenarios.compare.comparison import write_comparison
    from scenarios.compare.fit_check import check_runs, said, with_check
    from scenarios.forecast.forecast import write_forecast
    from scenarios.forecast.simulate import simulate
    from scenarios.forecast.size import check_measurable, check_replicates
    from scenarios.load.parameters import write_calibration
    from scenarios.load.scenario import files_of, load
    from scenarios.progress import read_aloud
    from scenarios.report.page import page
    from sim.model.identity import check_engine
    from sim.run import taken_as as assumed

    check_replicates(replicates)
    asked = load(scenario, *sets)
    check_measurable(asked)
    inputs = files_of(scenario, *sets)
    check_measured(output / "run", resume, inputs=inputs)
    for name, kind in _MADE.items():
        check_output(output / name, kind, inputs=inputs, force=force)
    listed = asked.load.users or asked.load.rate or ([0] if asked.load.trace else None)
    if listed is not None and len(listed) < 2:
        raise BadInput("expected at least two loads: some to fit and some to score", path=scenario, key="load")
    made = climb(
        asked,
        url,
        output / "run",
        resume=resume,
        processes=processes,
        model=model,
        seed=seed,
        timeout=timeout,
        patience=patience,
        budget=budget,
    )
    measured = read_aloud(made)
    check_engine(measured.engine, asked.server.declared, taken_as, "this run, measured and kept,", made)
    if taken_as is not None:
        measured = assumed(measured, taken_as, asked)
    out = console()
    with working(jobs) as (executor, commentary):
        scored = set(range(1, len(measured.rungs), 2))
        comparison = held_out_comparison(measured, scored, {}, replicates, seed, executor, commentary)
        calibration = calibrate_runs([measured], seed, executor=executor)
        check = check_runs(calibration, [measured], executor, seed=seed, progress=commentary)
        calibration = with_check(calibration, check)

        def tell(done: float, total: int) -> None:
            commentary(f"simulating {asked.name}", done, total)

        forecast = simulate(
            _as_measured(asked, measured, output / "calibration.json"),
            calibration,
            seed=seed,
            replicates=replicates,
            executor=executor,
            progress=tell,
            changes=sets,
            taken_as=taken_as,
            flags=measured.flags,
        )
    warned(forecast.assumptions, out)
    show_curves(forecast, out)
    out.print()
    show_comparison(comparison, out)
    show_check(calibration, out)
    sys.stdout.flush()
    warn(forecast.warnings)
    for line in said(check):
        remark(f"check failed: {line}")
    out.print()
    show_answer(forecast, out)  # last, where it is read
    sys.stdout.flush()  # shown before it is written: a full disk loses no answer
    write_comparison(output / "comparison.json", comparison)
    write_calibration(output / "calibration.json", calibration)
    write_forecast(output / "forecast.json", forecast)
    report = output / "report.html"
    write(report, page([forecast, measured, comparison], {}, f"{asked.name}: measured and forecast").encode())
    say(str(report))
    return FAILED if comparison.passed is False or not check.passed else 0


_MADE = {
    "comparison.json": COMPARISON,
    "calibration.json": CALIBRATION,
    "forecast.json": FORECAST,
    "report.html": REPORT,
}


def _as_measured(scenario: Scenario, run: Run, calibration: Path) -> Scenario:
    """The scenario with the calibration, and with the flags that the server said it has."""
    return msgspec.structs.replace(scenario, server=run.server, calibration=str(calibration), table=None)


@command("servecast doctor llama2-70b --url http://127.0.0.1:8080")
@click.argument("scenario", required=False)
@click.option("--url", help="A server to look at, and to hold against the scenario.")
@timeout_option
@set_option
def doctor(scenario: str | None, url: str | None, timeout: float | None, sets: tuple[str, ...]) -> int:
    """Say what is missing here, and how to fix it.

    Exit status 1 when something is missing that the scenario (or the URL) needs.
    """
    from measure.server.detection import PROBE_SECONDS
    from measure.server.doctor import diagnose
    from scenarios.answer.tables import console
    from scenarios.load.scenario import load
    from sim.terminal.columns import show_listed

    findings = diagnose(
        None if scenario is None else load(scenario, *sets),
        url,
        lambda line: click.echo(line, err=True),
        PROBE_SECONDS if timeout is None else timeout,
    )
    words = {True: "ok", False: "missing", None: "-"}
    rows = []
    for finding in findings:
        rows.append((f"{finding.what:<16} {words[finding.ok]:<7}", finding.found))
        if finding.fix and finding.ok is not True:
            rows.append((f"{'':<16} fix:", finding.fix))
    show_listed(rows, console())
    return FAILED if any(finding.ok is False for finding in findings) else 0
