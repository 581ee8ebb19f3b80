"""Fit what the sources of `servecast calibrate` name (runs, tables or a scenario), and check the fit against them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from calibrate.next_measurement import Question
from calibrate.sources.step_time_table import calibrate_table
from calibrate.sources.streamed import calibrate_runs
from scenarios.compare.fit_check import check_published, check_runs, check_table, with_check
from scenarios.forecast.next_measurement import question_of
from scenarios.load.assumed import AssumedServer
from scenarios.load.parameters import calibration_of
from scenarios.load.scenario import files_of, load, origin, shipped
from scenarios.progress import ProgressDisplay, read_run_with_progress
from sim.executors import Executor
from sim.model.calibration import Calibration
from sim.model.errors import BadInput
from sim.model.files.shape import nearest
from sim.run import Run


class Sources(NamedTuple):
    """What a calibration is fitted to: runs; or tables, of which `where` chooses rows; or one scenario with `sets`."""

    names: tuple[str, ...]
    runs: Sequence[Run]
    where: dict[str, str]
    sets: tuple[str, ...]

    @property
    def tables(self) -> bool:
        """Whether all of them are tables."""
        return all(Path(name).suffix == ".csv" for name in self.names)


def read_sources(
    names: tuple[str, ...], wheres: Sequence[str], sets: tuple[str, ...], assumed: AssumedServer
) -> Sources:
    """Read the runs among the sources; `BadInput` for options that do not go with what is named."""
    where = dict(_where(text) for text in wheres)
    if where and not all(Path(name).suffix == ".csv" for name in names):
        raise BadInput("expected only with tables, whose rows it chooses", path="--where")
    sources = Sources(names, [assumed.of(run) for run in _runs(names)], where, sets)
    if assumed.engine is not None and not sources.runs:
        raise BadInput("expected only with runs, whose engine it says", path="--as")
    for run in sources.runs:
        _ = run.server  # an unknown engine is refused before anything else is done
    if sets and (sources.runs or sources.tables):
        raise BadInput("expected only with a scenario, whose keys it changes", path="--set")
    return sources


def files_read(names: Sequence[str], question: str | None, sets: Sequence[str]) -> list[Path]:
    """The files and folders that these sources, and the scenario of the question, are read from."""
    found = []
    for name in (*names, *([] if question is None else [question])):
        path = Path(name)
        scenario = not path.is_dir() and path.suffix != ".csv" and (path.is_file() or name in shipped())
        found += files_of(name, *(sets if name == names[0] else ())) if scenario else [path]
    return found


def question(sources: Sources, scenario: str | None) -> Question:
    """What the advice on the next measurement is for: the scenario named, else what the sources are about."""
    if scenario is None and not sources.runs:
        if sources.tables:
            message = "expected --question SCENARIO with it: a table does not say what it is for"
            raise BadInput(message, path="--advise")
        scenario = sources.names[0]
    if scenario is None:
        return question_of(sources.runs)
    sets = sources.sets if scenario == sources.names[0] else ()
    return question_of(sources.runs, load(scenario, *sets), scenario)


def fit_sources(sources: Sources, seed: int, executor: Executor, display: ProgressDisplay) -> Calibration:
    """Fit the sources; the calibration carries its check."""
    if sources.runs:
        calibration = calibrate_runs(sources.runs, seed, executor=executor)
        check = check_runs(calibration, sources.runs, executor, seed=seed, progress=display)
        return with_check(calibration, check)
    paths = [Path(name) for name in sources.names]
    if sources.tables:
        calibration = calibrate_table(paths, np.random.default_rng(seed), where=sources.where)
        return with_check(calibration, check_table(calibration))
    _check_scenario(paths, sources.names)
    source, sets = sources.names[0], sources.sets
    scenario = load(source, *sets)
    calibration = calibration_of(source, scenario, sets=sets, seed=seed, executor=executor, progress=display, anew=True)
    if scenario.table is not None:
        return with_check(calibration, check_table(calibration))
    display.message("checking the fit of the published figures")
    measured = origin(source, "published", *sets)
    return with_check(calibration, check_published(calibration, measured, executor, seed=seed))


def _runs(names: Sequence[str]) -> list[Run]:
    """The runs, if all names are those of run directories; one that is named twice would count twice."""
    paths = [Path(name) for name in names]
    places = [path.resolve() for path in paths]
    for i, path in enumerate(paths):
        if places[i] in places[:i]:
            raise BadInput("named twice; expected every source once", path=path)
    return [read_run_with_progress(path) for path in paths] if all(path.is_dir() for path in paths) else []


def _where(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not (column and equals and value):
        raise BadInput("expected COLUMN=VALUE, such as tensor_parallel=4", path=f"--where {text}")
    return column, value


def _check_scenario(paths: Sequence[Path], names: Sequence[str]) -> None:
    """Raise `BadInput` for sources that are not one scenario."""
    absent = [path for path in paths if not path.exists()]
    if len(paths) > 1:
        if absent:
            raise BadInput("no such run directory, nor table", path=absent[0])
        raise BadInput("expected runs, or tables, or one scenario; not a mixture")
    if paths[0].suffix == ".json" and not absent:
        raise BadInput("expected a run directory, a table (.csv) or a scenario (.yaml)", path=paths[0])
    if absent and names[0] not in shipped():
        hint = nearest(names[0], shipped())
        message = "no such run directory, table or scenario" + (f"; did you mean {hint}?" if hint else "")
        raise BadInput(message, path=names[0])
