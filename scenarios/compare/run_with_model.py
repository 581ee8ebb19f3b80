"""A measured run beside its forecast, load by load and metric by metric; or any two runs beside each other.

The forecast is a replay (`sim/cluster/replay.py`), many times over: a parameter draw, both noises and a fresh seed each
time, so that the 5 % and 95 % quantiles over replicates are a 90 % prediction interval for a window of the measured
length.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import msgspec
import numpy as np
import pandas as pd

from scenarios.compare.comparison import Comparison, Row, verdict
from scenarios.compare.diagnostics import Evidence
from scenarios.compare.modes import humps
from scenarios.compare.repeatability import relative, repeat_errors
from scenarios.forecast.replicate import described
from sim.cluster.replay import with_users
from sim.executors import IN_PROCESS, Executor, Progress, Tell, silent
from sim.model.calibration import Calibration, check_suits
from sim.model.errors import NotEnoughData
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
    if not streamed:  # tokens that nobody saw come count when their answer does, here as there
        unseen = metrics.table(replace(again, steps=None, step_ends=None))
        table["output_tokens_per_s"] = unseen["output_tokens_per_s"]
    return table


def shared_metrics(run: Run, carried: float = 1.0) -> tuple[list[str], list[str]]:
    """The metrics that mean the same on both sides, and what to say: `carried` is the other side's tokens an event."""
    own = tokens_per_event(run)
    if alike(own, carried):
        return list(metrics.COMPARED), [] if (said := between_events(run)) is None else [said]
    said = (
        f"ITL is not compared: it is the time between events, and an event of {run.name} carries {own:.3g} tokens on "
        f"average, one of the other side {carried:.3g}"
    )
    return [m for m in metrics.COMPARED if not m.startswith("itl_")], [said]


def compare(
    run: Run,
    tables: Sequence[pd.DataFrame],
    *,
    fitted: Collection[int] = (),
    tolerances: Mapping[str, float] | None = None,
    repeats: Iterable[Run] = (),
    simulated: str = "simulated",
    warnings: Iterable[str] = (),
    evidence: Evidence | None = None,
    without: Collection[int] = (),
    carried: float = 1.0,
    taken_as: str | None = None,
    assumed: Iterable[str] = (),
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
                    humps=humps(drawn),
                )
            )
    said = list(dict.fromkeys([*assumed, *with_users(run).warnings, *unlike, *warnings, *others]))
    found = verdict(rows, run.name, simulated, tolerances or {}, said)
    return msgspec.structs.replace(found, evidence=evidence, taken_as=taken_as)
