"""Evaluate a measured run: forecast the rungs that a fit has not seen, then fit all rungs and forecast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from calibrate.sources.streamed import calibrate_runs
from scenarios.compare.comparison import Comparison
from scenarios.compare.fit_check import check_runs, with_check
from scenarios.compare.run_with_model import compare_with_model, model_of_other_rungs, parse_rungs
from scenarios.forecast.forecast import Forecast
from scenarios.forecast.next_measurement import next_measurements, question_of
from scenarios.forecast.simulate import simulate
from scenarios.progress import ProgressDisplay
from sim.executors import Executor
from sim.model.calibration import Calibration
from sim.model.errors import BadInput
from sim.model.identity import check_engine
from sim.model.scenario import Scenario
from sim.run import Run
from sim.run import taken_as as assume

BEYOND = 10  # times the most users that were measured, of a forecast


class Evaluation(NamedTuple):
    """Every second rung against the forecast from the others; the calibration from all rungs; its forecast."""

    comparison: Comparison
    calibration: Calibration
    forecast: Forecast


def check_two_loads(scenario: Scenario, source: str) -> None:
    """Raise `BadInput` for a ladder of one rung, of which none can be held out."""
    listed = scenario.load.users or scenario.load.rate or ([0] if scenario.load.trace else None)
    if listed is not None and len(listed) < 2:
        raise BadInput("expected at least two loads: some to fit and some to score", path=source, key="load")


def assume_engine(run: Run, scenario: Scenario, taken_as: str | None) -> Run:
    """The run, treated as one of `taken_as` if given; `NotTheEngine` if it is not known to be of the scenario's."""
    check_engine(run.engine, scenario.server.declared, taken_as, "this run, measured and kept,", run.path)
    return run if taken_as is None else assume(run, taken_as, scenario)


def beyond(scenario: Scenario, run: Run) -> Scenario:
    """The scenario at the users that it lists or that were measured, and at ten times the most; open loops stay."""
    users = {rung.users for rung in run.rungs if rung.users is not None} | set(scenario.load.users or ())
    if not users or scenario.load.rate is not None or scenario.load.trace:
        return scenario
    most = BEYOND * max(users)
    load = msgspec.structs.replace(scenario.load, users=[*sorted(users), most])
    return msgspec.structs.replace(scenario, load=load)


def next_measurement(
    calibration: Calibration, run: Run, question: Scenario, executor: Executor, seed: int
) -> list[str]:
    """Which load of the question's own profile to measure next, as a line; none where there are no users.

    `calibrate --advise` considers other profiles, too, and takes longer.
    """
    if not question.load.users or not calibration.draws:
        return []
    asked = question_of([run], msgspec.structs.replace(question, server=run.server))
    return next_measurements(calibration, [run], asked, executor, seed, quick=True)


def evaluate(
    run: Run,
    scenario: Scenario,
    *,
    file: Path,
    replicates: int,
    seed: int,
    executor: Executor,
    display: ProgressDisplay,
    changes: Sequence[str] = (),
    taken_as: str | None = None,
) -> Evaluation:
    """Evaluate the run of a scenario; `file` is where the calibration will be written."""
    model = model_of_other_rungs(run, parse_rungs(None, len(run.rungs)), seed, executor, display)
    comparison = compare_with_model(run, model, {}, replicates, seed, executor, display)
    calibration = calibrate_runs([run], seed, executor=executor)
    check = check_runs(calibration, [run], executor, seed=seed, progress=display)
    calibration = with_check(calibration, check)

    def tell(done: float, total: int) -> None:
        display(f"simulating {scenario.name}", done, total)

    forecast = simulate(
        msgspec.structs.replace(scenario, server=run.server, calibration=str(file), table=None),
        calibration,
        seed=seed,
        replicates=replicates,
        executor=executor,
        progress=tell,
        changes=changes,
        taken_as=taken_as,
        flags=run.flags,
    )
    return Evaluation(comparison, calibration, forecast)
