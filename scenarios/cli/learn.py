"""The command that learns: a model from measured runs, from tables of step times, or from published figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from scenarios.cli.main import FAILED, command
from scenarios.cli.options import (
    AS_HELP,
    assumed_engine,
    file_here,
    force_option,
    jobs_option,
    json_option,
    remark,
    say,
    seed_option,
    set_option,
    taken_for,
    warn,
    warnings_option,
    working,
)
from scenarios.cli.output import CALIBRATION, check_output
from sim.model.errors import BadInput
from sim.model.files.atomic import is_stdout
from sim.model.files.shape import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibrate.next_measurement import Question
    from sim.model.calibration import Calibration
    from sim.run import Run


@command("servecast calibrate run-a run-b -o calibration.json")
@click.argument("sources", metavar="(RUN... | TABLE.csv... | SCENARIO)", nargs=-1, required=True)
@click.option("-o", "--output", type=file_here, help="Where to write the calibration.")
@click.option("--where", "wheres", metavar="COLUMN=VALUE", multiple=True, help="Which rows of a table; repeatable.")
@click.option("--advise", is_flag=True, help="Say what to measure next.")
@click.option("--question", metavar="SCENARIO", help="What the advice is for: its highest load.")
@force_option
@click.option("--as", "taken_as", metavar="ENGINE|SCENARIO", help=AS_HELP)
@seed_option
@set_option
@jobs_option
@json_option
@warnings_option
def calibrate(
    sources: tuple[str, ...],
    output: Path | None,
    wheres: tuple[str, ...],
    advise: bool,
    question: str | None,
    force: bool,
    taken_as: str | None,
    seed: int,
    sets: tuple[str, ...],
    jobs: int | None,
    as_json: bool,
) -> int:
    """Fit a model: to measured runs, tables or figures.

    Measured runs are best. A table has columns for prefill and decode times; a scenario names a table or has figures
    under `published:`, which are fitted through the simulator. What was fitted is simulated again; exit status 1, after
    the file is written, when the calibration does not show it.
    """
    from scenarios.answer.tables import console, show_check, show_parameters, warned
    from scenarios.compare.fit_check import said
    from scenarios.load.parameters import write_calibration

    where = dict(_where(text) for text in wheres)
    if where and not all(Path(source).suffix == ".csv" for source in sources):
        raise BadInput("expected only with tables, whose rows it chooses", path="--where")
    if output is not None:
        check_output(output, CALIBRATION, inputs=_read(sources, question, sets), force=force)
    taken = assumed_engine(taken_as)
    runs = [taken_for(run, taken) for run in _runs(sources)]
    if taken is not None and not runs:
        raise BadInput("expected only with runs, whose engine it says", path="--as")
    for run in runs:
        _ = run.server  # refused before anything else is done with it
    if sets and (runs or all(Path(source).suffix == ".csv" for source in sources)):
        raise BadInput("expected only with a scenario, whose keys it changes", path="--set")
    if advise and question is None and not runs:
        if Path(sources[0]).suffix == ".csv":
            raise BadInput("expected --question SCENARIO with it: a table does not say what it is for", path="--advise")
        question = sources[0]
    # refused before anything is fitted, or written
    asked = _question(runs, question, sets if question == sources[0] else ()) if advise or question else None
    calibration = _fit(sources, runs, where, seed, sets, jobs)
    if output is not None and is_stdout(output):  # asked for there: as the file, and nothing else
        write_calibration(output, calibration)
    elif as_json:
        say(msgspec.json.encode(calibration).decode())
    else:
        out = console()
        warned([text for run in runs for text in run.assumptions], out)
        show_parameters(calibration, out)
        if calibration.source.note:
            out.print(calibration.source.note)
        show_check(calibration, out)
        if output is None:
            remark("nothing is written: -o FILE keeps it")
    warn([f"{run.name}: {text}" for run in runs for text in run.warnings] + calibration.warnings)
    if asked is not None:
        from scenarios.forecast.next_measurement import next_measurements

        with working(jobs) as (executor, _):
            lines = next_measurements(calibration, runs, asked, executor, seed)
        for line in lines:
            (remark if as_json else say)(line)
    if output is not None and not is_stdout(output):  # last: what was fitted is not lost with a full disk
        sys.stdout.flush()
        write_calibration(output, calibration)
        if not as_json:
            say(str(output))
    assert calibration.check is not None
    for line in said(calibration.check):
        remark(f"check failed: {line}")
    return 0 if calibration.check.passed else FAILED


def _read(sources: Sequence[str], question: str | None, sets: Sequence[str]) -> list[Path]:
    """The files and folders that are read."""
    from scenarios.load.scenario import files_of, shipped

    found = []
    for name in (*sources, *([] if question is None else [question])):
        path = Path(name)
        scenario = not path.is_dir() and path.suffix != ".csv" and (path.is_file() or name in shipped())
        found += files_of(name, *(sets if name == sources[0] else ())) if scenario else [path]
    return found


def _runs(sources: Sequence[str]) -> list[Run]:
    """The runs, if runs are what is named; what is named twice would count twice."""
    from scenarios.progress import read_aloud

    paths = [Path(source) for source in sources]
    places = [path.resolve() for path in paths]
    for i, path in enumerate(paths):
        if places[i] in places[:i]:
            raise BadInput("named twice; expected every source once", path=path)
    return [read_aloud(path) for path in paths] if all(path.is_dir() for path in paths) else []


def _question(runs: Sequence[Run], scenario: str | None, sets: Sequence[str]) -> Question:
    """What the advice is for."""
    from scenarios.forecast.next_measurement import question_of
    from scenarios.load.scenario import load

    return question_of(runs) if scenario is None else question_of(runs, load(scenario, *sets), scenario)


def _where(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not (column and equals and value):
        raise BadInput("expected COLUMN=VALUE, such as tensor_parallel=4", path=f"--where {text}")
    return column, value


def _fit(
    sources: tuple[str, ...],
    runs: Sequence[Run],
    where: dict[str, str],
    seed: int,
    sets: tuple[str, ...],
    jobs: int | None,
) -> Calibration:
    """Fit what the sources are, and check the fit."""
    from scenarios.compare.fit_check import check_published, check_runs, check_table, with_check

    paths = [Path(source) for source in sources]
    if runs:
        from calibrate.sources.streamed import calibrate_runs

        with working(jobs) as (executor, commentary):
            calibration = calibrate_runs(runs, seed, executor=executor)
            return with_check(calibration, check_runs(calibration, runs, executor, seed=seed, progress=commentary))
    if all(path.suffix == ".csv" for path in paths):
        import numpy as np

        from calibrate.sources.step_time_table import calibrate_table

        calibration = calibrate_table(paths, np.random.default_rng(seed), where=where)
        return with_check(calibration, check_table(calibration))
    absent = [path for path in paths if not path.exists()]
    if len(sources) > 1:
        if absent:
            raise BadInput("no such run directory, nor table", path=absent[0])
        raise BadInput("expected runs, or tables, or one scenario; not a mixture")
    from scenarios.load.parameters import fit
    from scenarios.load.scenario import load, origin, shipped

    if paths[0].suffix == ".json" and not absent:
        raise BadInput("expected a run directory, a table (.csv) or a scenario (.yaml)", path=paths[0])
    if absent and sources[0] not in shipped():
        hint = nearest(sources[0], shipped())
        raise BadInput(
            "no such run directory, table or scenario" + (f"; did you mean {hint}?" if hint else ""), path=sources[0]
        )

    scenario = load(sources[0], *sets)
    with working(jobs) as (executor, commentary):
        calibration = fit(sources[0], scenario, sets=sets, seed=seed, executor=executor, progress=commentary)
        if scenario.table is not None:
            return with_check(calibration, check_table(calibration))
        commentary.say("checking the fit of the published figures")
        measured = origin(sources[0], "published", *sets)
        return with_check(calibration, check_published(calibration, measured, executor, seed=seed))
