"""One trial of a plan: one option's fleet, on one draw of its calibration, under the traffic. Which SLOs are kept?

A stationary load is simulated until the answer is clear or the metrics are known to `PRECISE`: by batch means (Law and
Kelton, Simulation Modeling and Analysis, ch. 9), over windows that grow fourfold. The random numbers of a short
window are those of the long one. A trace or a profile is simulated once, and every period of it has to keep the SLOs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scenarios.forecast.replicate import circumstances
from sim.executors import Tell, silent
from sim.model.metric import LATENCIES, QUANTILES, plain
from sim.model.scenario import Scenario
from sim.model.status import Status
from sim.replicate import Task
from sim.results import metrics, rates
from sim.run import Run, Rung

PRECISE = 0.02  # relative standard error of a metric that counts as its long-run value
CLEAR = 4.0  # standard errors between a metric and its limit that leave no doubt (of ten batches: 0.3 % of t)
BATCHES = 10
FEWEST, LONGER, LARGEST = 1000, 4, 16_000  # requests: of the first window, of each further one, and at most
REFUSED = rates.TURNED_AWAY  # share of requests that fail: with more of them nothing is kept, whatever the SLOs name
STANDING = 0.5  # share of the last period's requests: with more of them left, a trace does not end in time
SETTLING = 0.25  # of the window, before it: an open loop starts empty


@dataclass(frozen=True)
class Trial:
    """What is simulated, and the `slo` (limits by metric, s or shares) that each `period`, s, of a trace must keep."""

    task: Task
    slo: Mapping[str, float]
    period: float


@dataclass(frozen=True)
class Outcome:
    """Whether each SLO is kept, and the metrics: of a stationary load in the long run, else of the worst period.

    `periods` are the metrics of each period of a trace or profile with arrivals, by its start. With `growing`
    there is no steady state, or requests fail, and nothing is kept. `error` is the largest relative standard error of a
    metric that an SLO is about.
    """

    kept: Mapping[str, bool]
    metrics: Mapping[str, float]
    growing: bool
    error: float
    requests: int
    periods: Mapping[float, Mapping[str, float]] = field(default_factory=dict)

    @property
    def keeps(self) -> bool:
        """Whether every SLO is kept."""
        return all(self.kept.values())


def run_trial(trial: Trial, tell: Tell = silent) -> Outcome:
    """Simulate it; the outcome depends on the trial alone."""
    task = trial.task
    load = _scenario(task).load
    if load.users is None and load.rate is None:
        return _periods(trial, task.run(tell))
    requests = FEWEST
    seconds = requests / load.rate[0] if load.rate is not None else None
    while True:
        run = _with_window(task, seconds).run()
        (rung,) = run.rungs
        found = _window(trial, run, rung)
        if found.growing or found.error <= PRECISE or requests >= LARGEST or _clear(trial, run, rung):
            return found
        if seconds is not None:
            requests *= LONGER
        seconds = requests / max(found.metrics["rps"], requests / 86400.0)


def _with_window(task: Task, seconds: float | None) -> Task:
    """The task with a window so long; None: until every user has had a few answers."""
    scenario = _scenario(task)
    load = scenario.load
    if load.users is not None:
        spawn = max(load.spawn_rate, load.users[0] / 60.0)  # a long ramp tells nothing of the long run
        load = msgspec.structs.replace(load, seconds=seconds, spawn_rate=spawn)
    else:
        assert seconds is not None
        load = msgspec.structs.replace(load, seconds=seconds, settle=max(load.settle, SETTLING * seconds))
    return replace(task, of=msgspec.structs.replace(scenario, load=load))


def _scenario(task: Task) -> Scenario:
    assert isinstance(task.of, Scenario)
    return task.of


def _window(trial: Trial, run: Run, rung: Rung) -> Outcome:
    table = rates.table(run, trial.slo)
    growing = rung.users is None and rates.growing(table.iloc[0]) and _beyond_chance(table.iloc[0], rung)
    if rung.users is None and not growing:
        table = rates.steady(table, [0])
    counted: dict[str, float] = {str(name): float(value) for name, value in table.iloc[0].items()}
    row = counted | circumstances(run, rung, [trial.task.model.server]) | metrics.class_metrics(run, rung)
    growing = growing or ("error_rate" not in trial.slo and row["error_rate"] > REFUSED)
    kept = {name: not growing and bool(row[name] <= limit) for name, limit in trial.slo.items()}
    errors = [_error(run, rung, name)[1] / max(row[name], 1e-12) for name in trial.slo if plain(name) in LATENCIES]
    return Outcome(kept, row, growing, max([0.0, *errors]), len(run.requests))


def _beyond_chance(row: pd.Series, rung: Rung) -> bool:
    """Whether more requests stayed behind than a steady number in flight, of Poisson spread, would show by chance."""
    behind = float(row["backlog"]) * rung.load * rung.seconds
    return behind > CLEAR * math.sqrt(2.0 * float(row["in_flight"])) or row["overloaded_rate"] > REFUSED


def _periods(trial: Trial, run: Run) -> Outcome:
    """The outcome of a run that is judged period by period; one without an arrival has nothing to keep."""
    end = run.rungs[-1].end
    edges = np.arange(0.0, end, trial.period).tolist()
    if len(edges) > 1 and end - edges[-1] < trial.period / 10:
        edges.pop()
    rungs = [Rung(low, low, low, high, rate=0.0) for low, high in zip(edges, [*edges[1:], end], strict=True)]
    sent = run.requests["scheduled"].to_numpy()
    periods = {r.start: _row(trial, run, r) for r in rungs if ((sent >= r.start) & (sent < r.end)).any()}
    rows = list(periods.values())
    failing = any(row["error_rate"] > REFUSED for row in rows) and "error_rate" not in trial.slo
    growing = failing or rows[-1]["backlog"] > STANDING
    seconds = [rung.seconds for rung in rungs if rung.start in periods]
    worst = {name: _whole(name, [row[name] for row in rows], seconds) for name in rows[0]}
    kept = {name: not growing and bool(worst[name] <= limit) for name, limit in trial.slo.items()}
    return Outcome(kept, worst, growing, 0.0, len(run.requests), periods)


def _whole(name: str, values: list[float], seconds: list[float]) -> float:
    """A metric of all periods: the worst latency and share of errors, the mean of rates and of shares of time."""
    if plain(name) in LATENCIES or plain(name).endswith(("error_rate", "overloaded_rate")):
        return max(values, key=_order)
    return float(np.average(values, weights=seconds))


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _row(trial: Trial, run: Run, rung: Rung) -> dict[str, float]:
    found = metrics.rung_metrics(run, rung, trial.slo)
    found |= circumstances(run, rung, [trial.task.model.server]) | metrics.class_metrics(run, rung)
    return {"load": rung.load} | found


def _clear(trial: Trial, run: Run, rung: Rung) -> bool:
    """Whether it is beyond doubt which SLOs are kept: in either half of the window, by `CLEAR` standard errors."""
    for name, limit in trial.slo.items():
        if plain(name) not in LATENCIES:
            continue
        values, error = _error(run, rung, name)
        if math.isinf(error):
            return False
        halves = [float(half.mean()) for half in np.array_split(values, 2)]
        if not all(abs(half - limit) > CLEAR * error for half in halves) or len({half > limit for half in halves}) > 1:
            return False
    return True


def _error(run: Run, rung: Rung, name: str) -> tuple[NDArray[np.float64], float]:
    """A metric in each of some batches of successive requests, and the standard error of its mean by them.

    Gaps between tokens are so many that theirs is taken from the requests' means.
    """
    of, _, metric = name.rpartition(".")
    what, _, which = metric.partition("_")
    requests = run.requests[run.requests["class"] == of] if of else run.requests
    first, last, sent = (requests[column].to_numpy() for column in ("first_token", "last_token", "scheduled"))
    output = requests["output_tokens"].to_numpy()
    at = first if what == "ttft" else last
    here = (requests["status"].to_numpy() == Status.OK) & (at >= rung.settled) & (at < rung.end)
    if what in ("tpot", "itl"):
        here &= output > 1
    each = {"e2e": last - sent, "ttft": first - sent}.get(what, (last - first) / np.maximum(output - 1, 1))[here]
    each = each[np.argsort(at[here], kind="stable")]
    if len(each) < 2 * BATCHES:
        return np.array([math.nan]), math.inf
    batches = np.array_split(each, BATCHES)
    share = QUANTILES.get(which)
    values = np.array([b.mean() if share is None else np.quantile(b, share) for b in batches])
    return values, float(values.std(ddof=1) / math.sqrt(BATCHES))
