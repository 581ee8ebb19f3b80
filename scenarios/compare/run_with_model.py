"""A measured run against its forecast, load by load and metric by metric.

The forecast is a replay (`sim/cluster/replay.py`), many times over: a parameter draw, both noises and a fresh seed each
time, so that the 5 % and 95 % quantiles over replicates are a 90 % prediction interval for a window of the measured
length.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pandas as pd

from calibrate.sources.streamed import calibrate_runs
from scenarios.compare.comparison import Comparison, Diagnostics, Row, verdict
from scenarios.compare.diagnostics import diagnose
from scenarios.compare.repeatability import relative, repeat_errors
from scenarios.compare.training_rungs import training_rungs
from scenarios.forecast.modes import modes
from scenarios.forecast.replicate import described
from scenarios.forecast.transfer import check_transfer
from scenarios.forecast.warnings import replay_warnings
from scenarios.progress import ProgressDisplay
from sim.cluster.replay import with_users
from sim.executors import IN_PROCESS, Executor, Progress, Tell, silent
from sim.model.calibration import Calibration, check_suits, read_calibration
from sim.model.errors import BadInput, NotEnoughData
from sim.model.metric import COMPARED
from sim.model.warning import Notice, notice
from sim.replicate import Task, tasks_for
from sim.results import metrics
from sim.results.curve import band
from sim.results.events import alike, between_events, tokens_per_event
from sim.run import Run

REPLICATES = 99  # the least at which 5 % and 95 % quantiles of `weibull` lie within the sample with room to spare


def forecast_run(
    run: Run,
    calibration: Calibration,
    executor: Executor = IN_PROCESS,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    taken_as: str | None = None,
) -> list[pd.DataFrame]:
    """Replays of a measured run under draws of a calibration, as tables of metrics.

    `NotTheEngine` where either is not known to be of the engine that is simulated, unless `taken_as` it.
    """
    check_suits(calibration, run.server.declared, taken_as or run.taken_as)
    return replays(run, calibration, executor, range(1, replicates + 1), seed=seed)


def replays(
    run: Run,
    calibration: Calibration,
    executor: Executor,
    numbers: Iterable[int],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> list[pd.DataFrame]:
    """The replicates of `forecast_run` with these numbers."""
    # the streams themselves are not asked again, and are nearly all of a run's bulk
    asked = replace(with_users(run), token_times=None, event_tokens=None)
    tasks = tasks_for(asked, calibration, seed, numbers)
    return executor.run(partial(_described, run.token_times is not None), tasks, progress)


def _described(streamed: bool, task: Task, tell: Tell) -> pd.DataFrame:
    """The metrics and circumstances of a replay, one row a rung."""
    again = task.run(tell)
    table = described(again, task.model.server)
    if not streamed:  # tokens without times count when their answer ends, here as there
        unseen = metrics.table(replace(again, steps=None, step_ends=None))
        table["output_tokens_per_s"] = unseen["output_tokens_per_s"]
    return table


def shared_metrics(run: Run, carried: float = 1.0) -> tuple[list[str], list[Notice]]:
    """The metrics that mean the same on both sides, and what to say: `carried` is the other side's tokens an event."""
    own = tokens_per_event(run)
    if alike(own, carried):
        return list(COMPARED), [] if (text := between_events(run)) is None else [notice("bundled-tokens", text)]
    said = notice(
        "itl-not-compared",
        f"ITL is not compared: it is the time between events, and an event of {run.name} carries {own:.3g} tokens on "
        f"average, one of the other side {carried:.3g}",
    )
    return [m for m in COMPARED if not m.startswith("itl_")], [said]


def compare(
    run: Run,
    tables: Sequence[pd.DataFrame],
    *,
    fitted: Collection[int] = (),
    tolerances: Mapping[str, float] | None = None,
    repeats: Iterable[Run] = (),
    simulated: str = "simulated",
    warnings: Iterable[Notice] = (),
    details: Diagnostics | None = None,
    without: Collection[int] = (),
    carried: float = 1.0,
    taken_as: str | None = None,
    assumed: Iterable[Notice] = (),
) -> Comparison:
    """A measured run against replicates of its forecast; `fitted` are the rungs the calibration has seen, `repeats` are
    runs of the same server and workload, rungs `without` a counterpart are left out. `carried` is how many tokens an
    event of the other side carries: where it differs, ITL is not the same quantity, and is left out. `taken_as` is the
    engine for which the user takes the run or the calibration, with the warnings of what is `assumed` then."""
    measured = metrics.table(run)
    if measured.empty:
        raise NotEnoughData(f"{run.name}: no rung has a complete window")
    together = pd.concat(tables, keys=range(len(tables)), names=["replicate", None]).reset_index("replicate")
    again, others = repeat_errors(run, measured, repeats)
    shared, unlike = shared_metrics(run, carried)
    rows = []
    for place, (rung, load) in enumerate(zip(measured["rung"], measured["load"], strict=True)):
        if int(rung) in without:
            continue
        here = measured.iloc[place]
        replicates = together[together["rung"] == place]  # a replay has the complete rungs only, in the same order
        for metric in shared:
            value = float(here[metric])
            if math.isnan(value):
                continue
            drawn = replicates[metric].to_numpy(dtype=np.float64)
            nothing = 2 * int(np.isnan(drawn).sum()) >= len(drawn)  # a median replicate has no such value
            middle, low, high = (None, None, None) if nothing else band(drawn)
            inside = None if low is None or high is None else low <= value <= high
            several = len(tables) > 1
            rows.append(
                Row(
                    rung=int(rung),
                    load=float(load),
                    users=run.rungs[int(rung)].users,
                    metric=metric,
                    measured=value,
                    simulated=middle,
                    low=low if several else None,
                    high=high if several else None,
                    relative_error=relative(middle, value),
                    inside=False if nothing else inside if several else None,
                    held_out=int(rung) not in fitted,
                    repeat_error=again.get((int(rung), metric)),
                    modes=modes(drawn),
                )
            )
    said = list(dict.fromkeys([*assumed, *with_users(run).warnings, *unlike, *warnings, *others]))
    found = verdict(rows, run.name, simulated, tolerances or {}, said)
    return msgspec.structs.replace(found, diagnostics=details, taken_as=taken_as)


class Model(NamedTuple):
    """A calibration, the rungs of a run that it was `fitted` to, and what to say with a forecast by it: its `name`,
    `warnings`, and those of what is `assumed` because the user takes a server for one of another engine."""

    calibration: Calibration
    fitted: Collection[int]
    name: str = "forecast"
    warnings: Sequence[Notice] = ()
    taken_as: str | None = None
    assumed: Sequence[Notice] = ()


def model_of_file(run: Run, file: Path, taken_as: str | None) -> Model:
    """The calibration in a file; `taken_as` is the engine for which the user takes the run's server, if any."""
    calibration = read_calibration(file)
    check_transfer(calibration, run.server.declared, taken_as, None, str(file))
    assumed = [] if run.assumptions else check_suits(calibration, run.server.declared, taken_as, file)
    fitted, said = training_rungs(run, calibration)
    return Model(calibration, fitted, file.name, said, taken_as, assumed)


def model_of_other_rungs(
    run: Run, held_out: Collection[int], seed: int, executor: Executor, display: ProgressDisplay
) -> Model:
    """Fitted to the rungs not `held_out`."""
    fitted = set(range(len(run.rungs))) - set(held_out)
    if not fitted or not held_out:
        raise BadInput("expected at least two rungs: some to fit and some to score", path=run.path or run.name)
    display.message(f"fitting {len(fitted)} of {len(run.rungs)} rungs of {run.name}")
    return Model(calibrate_runs([run], seed, [fitted], executor), fitted)


def compare_with_model(
    run: Run,
    model: Model,
    tolerances: Mapping[str, float],
    replicates: int,
    seed: int,
    executor: Executor,
    display: ProgressDisplay,
    repeats: Sequence[Run] = (),
) -> Comparison:
    """A run against its forecast; the rungs that the model was fitted to are not scored."""
    display.message(f"replaying {run.name} {replicates} times")
    tables = forecast_run(run, model.calibration, executor, replicates=replicates, seed=seed, taken_as=model.taken_as)
    return compare(
        run,
        tables,
        fitted=model.fitted,
        tolerances=tolerances or run.scenario.tolerances,
        repeats=repeats,
        simulated=model.name,
        warnings=[*model.warnings, *replay_warnings(run, model.calibration, tables)],
        details=diagnose(run, model.calibration, executor, seed),
        taken_as=run.server.engine if run.assumptions or model.assumed else None,
        assumed=[*run.assumptions, *model.assumed],
    )


def parse_rungs(text: str | None, rungs: int) -> set[int]:
    """The rungs that `--held-out` names, of so many; every second without it."""
    if text is None:
        return set(range(1, rungs, 2))
    parts = text.split(",")
    if not all(part.strip() in map(str, range(rungs)) for part in parts) or len(set(parts)) == rungs:
        raise BadInput(f"expected some of the rungs 0 to {rungs - 1}, such as 1,3", path=f"--held-out {text}")
    return {int(part) for part in parts}
