"""Diagnostics kept with a comparison: the distribution of the gaps between tokens at every load, and the residuals of
single steps against the model's step time.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pandas as pd

from calibrate.regression.residuals import residuals
from scenarios.compare.comparison import SHARES, Diagnostics, Distribution, Error
from sim.cluster.replay import with_users
from sim.executors import IN_PROCESS, Executor, Tell
from sim.model.calibration import Calibration
from sim.model.errors import NotEnoughData
from sim.replicate import Task, tasks_for
from sim.results.curve import band
from sim.results.events import alike, tokens_per_event
from sim.results.gaps import gaps
from sim.run import Run, Rung

REPLAYS = 19  # their least and largest are the 5 % and 95 % quantiles of `weibull`
CELL_SECONDS = 5.0  # of steps that are summed up together: as long as what the fit resamples as a whole


def diagnose(run: Run, calibration: Calibration, executor: Executor = IN_PROCESS, seed: int = 0) -> Diagnostics:
    """A measured run's token gaps with those of replays, and its step residuals under the calibration.

    No gaps where an event carries several tokens: those of replays lie between tokens.
    """
    several = not alike(tokens_per_event(run), 1.0)
    found = Diagnostics(itl=[] if several else _replayed(run, calibration, executor, seed))
    try:
        table = residuals(run, calibration)
    except NotEnoughData:  # answers that were not streamed show no steps
        return found
    cell = (table["time"] // CELL_SECONDS + 0.5) * CELL_SECONDS
    return msgspec.structs.replace(found, by_batch=_errors(table, table["sequences"]), by_time=_errors(table, cell))


def compare_gaps(first: Run, second: Run) -> Diagnostics:
    """The gaps of two runs at the loads they have in common."""
    other = {found.load: found.measured for found in reversed(itl(second))}
    pairs = [(found, other[found.load]) for found in itl(first) if found.load in other]
    return Diagnostics(itl=[msgspec.structs.replace(found, simulated=its) for found, its in pairs])


def itl(run: Run) -> list[Distribution]:
    """The gaps of a run in every window that has some."""
    found = [
        Distribution(load=rung.load, at=rung.named, measured=row)
        for rung, row in zip(_windows(run), _quantiles(run), strict=True)
    ]
    return [each for each in found if not np.isnan(each.measured).any()]


def _replayed(run: Run, calibration: Calibration, executor: Executor, seed: int) -> list[Distribution]:
    if not itl(run):
        return []
    asked = replace(with_users(run), token_times=None, event_tokens=None)  # a run's bulk, which no replay looks at
    tables = executor.run(_gaps, tasks_for(asked, calibration, seed, range(1, REPLAYS + 1)))
    simulated = np.stack([np.array(table) for table in tables], axis=1)  # window, replay, share
    found = []
    for rung, mine, replays in zip(_windows(run), _quantiles(run), simulated, strict=True):
        if np.isnan(mine).any() or np.isnan(replays).any():
            continue
        middle, low, high = (list(ends) for ends in zip(*map(band, replays.T), strict=True))
        found.append(Distribution(load=rung.load, at=rung.named, measured=mine, simulated=middle, low=low, high=high))
    return found


def _gaps(task: Task, tell: Tell) -> list[list[float]]:
    return _quantiles(task.run(tell))


def _quantiles(run: Run) -> list[list[float]]:
    return [gaps(run, rung.settled, rung.end).quantiles(SHARES) for rung in _windows(run)]


def _windows(run: Run) -> list[Rung]:
    """Its complete windows, which are the rungs of a replay."""
    return [rung for rung in run.rungs if rung.end > rung.settled]


def _errors(table: pd.DataFrame, key: pd.Series) -> dict[str, list[Error]]:
    found: dict[str, list[Error]] = {}
    steps = pd.DataFrame({"kind": table["kind"], "at": key, "relative": table["relative"]})
    for kind, mine in steps.groupby("kind"):
        groups = mine.groupby("at")["relative"]
        summary = groups.agg(["size", "mean"]).join(groups.quantile(np.array([0.05, 0.95])).unstack()).reset_index()
        found[str(kind)] = [
            Error(at=at, steps=int(size), mean=mean, low=low, high=high)
            for at, size, mean, low, high in summary.to_numpy(np.float64).tolist()
        ]
    return found
