"""Compare two results load by load: two runs, two forecasts, or a run and a forecast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import pandas as pd

from scenarios.compare.comparison import Comparison, Row, verdict
from scenarios.compare.diagnostics import compare_gaps
from scenarios.compare.repeatability import relative
from scenarios.compare.run_with_model import compare, shared_metrics
from scenarios.compare.saved import Saved
from scenarios.forecast.forecast import Forecast
from scenarios.forecast.forecast import Row as ForecastRow
from scenarios.load.assumed import AssumedServer
from sim.cluster.replay import with_users
from sim.model.errors import BadInput, NotEnoughData
from sim.model.identity import check_engine, named
from sim.model.metric import COMPARED
from sim.model.scenario import Scenario
from sim.model.warning import Notice, notice
from sim.results import metrics, rates
from sim.results.events import alike, tokens_per_event
from sim.run import Run


def compare_two(
    first: Saved,
    second: Saved,
    tolerances: Mapping[str, float],
    assumed: AssumedServer,
) -> Comparison:
    """Two runs, two forecasts, or a run and a forecast; `BadInput` for any other two."""
    if isinstance(first, Run) and isinstance(second, Run):
        return compare_runs(first, second, tolerances or first.scenario.tolerances)
    if isinstance(first, Forecast) and isinstance(second, Forecast):
        return compare_forecasts(first, second, tolerances)
    if isinstance(first, Run) and isinstance(second, Forecast):
        return compare_with_forecast(assumed.of(first), second, tolerances)
    raise BadInput("expected a run and a forecast, two runs, or two forecasts")


def compare_runs(first: Run, second: Run, tolerances: Mapping[str, float] | None = None) -> Comparison:
    """Two runs, rung by rung of equal load; the second is to the first what a forecast is to a measurement."""
    other = metrics.table(second)
    mine = metrics.table(first)
    if other.empty or mine.empty:
        raise NotEnoughData("no rung has a complete window")
    missing = sorted(set(mine["load"]) - set(other["load"]))
    without = set(mine.loc[mine["load"].isin(missing), "rung"].astype(int))
    warnings = [notice("load-missing", f"{second.name} has no load {load:g}: left out") for load in missing]
    matched = [
        other[other["load"] == load].iloc[[0]].assign(rung=place)
        for place, load in enumerate(mine["load"])
        if load not in missing
    ]
    if not matched:
        raise NotEnoughData(f"{first.name} and {second.name} have no load in common")
    warnings += _unlike_runs(first, second)
    tables = [pd.concat(matched, ignore_index=True)]
    details = compare_gaps(first, second) if alike(tokens_per_event(first), tokens_per_event(second)) else None
    found = compare(
        first,
        tables,
        tolerances=tolerances,
        simulated=second.name,
        warnings=warnings,
        details=details,
        without=without,
        carried=tokens_per_event(second),
    )
    return msgspec.structs.replace(found, of="runs")


def compare_forecasts(first: Forecast, second: Forecast, tolerances: Mapping[str, float]) -> Comparison:
    """Two forecasts at the loads they have in common; the second stands for the forecast of the first."""
    rungs = {row.load: rung for rung, row in enumerate(first.rows("rps"))}
    others = _by_metric_and_load(second)
    rows = [
        _row(row.metric, rungs[row.load], row.load, row.users, row.value, others[row.metric, row.load])
        for row in first.curves
        if row.value is not None and (row.metric, row.load) in others
    ]
    assumed = [*first.assumptions, *second.assumptions]
    warnings = [*assumed, *_unlike(first.scenario, second.scenario)]
    found = _verdict(rows, first.name, second.name, tolerances, warnings, of="forecasts")
    return msgspec.structs.replace(found, taken_as=first.taken_as or second.taken_as)


def compare_with_forecast(run: Run, forecast: Forecast, tolerances: Mapping[str, float]) -> Comparison:
    """A measured run against a forecast that was made beforehand, at the loads they have in common.

    A forecast's rates are long-run rates, and so are those of the run here (`sim.results.rates`). `NotTheEngine` for a
    run whose server is not known to be of the engine that was forecast, unless it is taken for it.
    """
    engine = forecast.scenario.server.engine
    check_engine(run.engine, forecast.scenario.server.declared, run.taken_as, f"the server of {run.name}", run.path)
    assumed = [*run.assumptions, *forecast.assumptions]
    forecasts = _by_metric_and_load(forecast)
    run = with_users(run)
    table = rates.table(run)
    if run.scenario.load.rate is not None and run.scenario.workload.sessions is None:
        table = rates.steady(table, [int(row["rung"]) for _, row in table.iterrows() if not rates.growing(row)])
    rows = []
    shared, unlike = shared_metrics(run)
    for _, measured in table.iterrows():
        load, rung = float(measured["load"]), int(measured["rung"])
        for metric in shared:
            if (metric, load) in forecasts and not math.isnan(measured[metric]):
                its = forecasts[metric, load]
                rows.append(_row(metric, rung, load, run.rungs[rung].users, float(measured[metric]), its))
    warnings = [
        notice(
            "own-requests",
            "the forecast draws its own requests, for windows of its own length",
        ),
        *_unlike(_of_run(run), forecast.scenario),
    ]
    said = [*assumed, *run.warnings, *unlike, *warnings]
    found = _verdict(rows, run.name, forecast.name, tolerances or run.scenario.tolerances, said)
    return msgspec.structs.replace(found, taken_as=engine if assumed else None)


def _of_run(run: Run) -> Scenario:
    """What was asked, of a server with the flags that it says it has."""
    return msgspec.structs.replace(run.scenario, server=run.server)


def _unlike_runs(first: Run, second: Run) -> list[Notice]:
    """A warning where two runs are of different engines, or else of other lengths or flags."""
    if first.known and second.known:
        return _unlike(_of_run(first), _of_run(second))
    warnings = _unlike(first.scenario, second.scenario, ("workload",))
    if named(first.engine) != named(second.engine):
        warnings.append(
            notice("engines-differ", f"the first is of {named(first.engine)}, the second of {named(second.engine)}")
        )
    return warnings


def _unlike(first: Scenario, second: Scenario, of: Sequence[str] = ("workload", "server")) -> list[Notice]:
    """A warning where the two are known to ask for other lengths, or to have other flags."""
    warnings = []
    for what in of:
        mine, its = (msgspec.to_builtins(getattr(s, what)) for s in (first, second))
        known = [key for key in mine if mine[key] is not None and its.get(key) is not None]
        differ = [f"{key} {_plain(mine[key])} and {_plain(its[key])}" for key in known if mine[key] != its[key]]
        if differ:
            warnings.append(
                notice("scenarios-differ", f"the first and the second are not of the same {what}: {', '.join(differ)}")
            )
    return warnings


def _plain(value: object) -> str:
    return " ".join(f"{name} {law}" for name, law in value.items()) if isinstance(value, dict) else str(value)


def _by_metric_and_load(forecast: Forecast) -> dict[tuple[str, float], ForecastRow]:
    return {(row.metric, row.load): row for row in forecast.curves if row.metric in COMPARED}


def _row(metric: str, rung: int, load: float, users: int | None, value: float, its: ForecastRow) -> Row:
    inside = None if its.low is None or its.high is None else its.low <= value <= its.high
    return Row(
        rung=rung,
        load=load,
        users=users,
        metric=metric,
        measured=value,
        simulated=its.value,
        low=its.low,
        high=its.high,
        relative_error=relative(its.value, value),
        inside=False if its.value is None else inside,
        held_out=True,
    )


def _verdict(
    rows: list[Row],
    first: str,
    second: str,
    tolerances: Mapping[str, float],
    warnings: list[Notice],
    of: str = "a forecast",
) -> Comparison:
    if not rows:
        raise BadInput(f"{first} and {second} have no load in common")
    return msgspec.structs.replace(verdict(rows, first, second, tolerances, warnings), of=of)
