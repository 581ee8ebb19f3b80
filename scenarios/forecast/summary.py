"""Replicates summarised: medians and 90 % bands of curves, operating points and costs.

Operating points of the curves and costs are computed in each replicate and only then summarised: the knee of the mean
curve is not the mean of the knees.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import islice

import msgspec
import numpy as np
import pandas as pd

from scenarios.forecast.bottleneck import bottleneck
from scenarios.forecast.cost import costs
from scenarios.forecast.forecast import (
    ComparedFigure,
    Estimate,
    Forecast,
    OperatingPoint,
    Provenance,
    Row,
    SloProbability,
    estimate,
    named,
    unit_of,
)
from scenarios.forecast.slo import crossing, operating_point
from scenarios.forecast.warnings import above, below, forecast_warnings, several_patterns, short_windows, unstable
from sim.model.calibration import Calibration, check_suits
from sim.model.flags import Flag, unwritten
from sim.model.metric import METRICS
from sim.model.scenario import Figure, Scenario
from sim.model.workload import Workload
from sim.replicate import Task, takeoff_factor
from sim.results import curve, rates


def summarise(
    scenario: Scenario,
    calibration: Calibration,
    tasks: Sequence[Task],
    tables: Sequence[pd.DataFrame],
    changes: Sequence[str] = (),
    taken_as: str | None = None,
    flags: Mapping[str, Flag] | None = None,
) -> Forecast:
    """The forecast of replicates (`tables` of `replicate`, one for each of `tasks`)."""
    rungs = _medians(tables)
    unit = unit_of(scenario)
    replicas = scenario.served_by.count
    outside = [
        any(leaves(calibration, rung, unit, replicas) for leaves in (above, below)) for _, rung in rungs.iterrows()
    ]
    growing = [unstable(scenario, rung) for _, rung in rungs.iterrows()]
    if scenario.load.rate is not None and scenario.workload.sessions is None:  # or more comes than the rate
        steady = [int(str(number)) for number, grows in zip(rungs.index, growing, strict=True) if not grows]
        tables = [rates.steady(table, steady) for table in tables]
        rungs = _medians(tables)
    probabilities = list(_slo_probabilities(scenario, tables, growing))
    engine = scenario.server.declared
    assumed = check_suits(calibration, engine, taken_as, scenario.calibration)
    known = flags if flags is not None else scenario.flags
    warnings = [*assumed, *forecast_warnings(scenario, calibration, rungs, growing, tasks[0].lengths)]
    if flags is None:
        warnings += unwritten(known, engine)
    limit = scenario.slo.get("e2e_p95")
    plateaus = [curve.plateau(table) for table in tables]
    without = [place for place, grows in enumerate(growing) if grows]
    knees = [curve.knee(table, limit, without) for table in tables]
    first = float(rungs["load"].iloc[0])
    bends = f"p95 E2E exceeds {limit:g} s" if limit else "p95 E2E exceeds twice the first rung's mean"
    knee = operating_point(knees, first, bends)
    if knee.below:
        knees = [curve.OperatingPoint(math.nan, math.nan, True)] * len(knees)
    factors = [takeoff_factor(calibration, *task.seed) for task in tasks]
    onsets = [curve.latency_onset(table, factor) for table, factor in zip(tables, factors, strict=True)]
    latency_onset = _operating_point(
        onsets, "mean E2E rises above its first value (1.15 to 2.5 times it: a judgement by eye)"
    )
    warnings += [*several_patterns(scenario, tables), *short_windows(scenario, rungs, probabilities)]
    return Forecast(
        name=scenario.name,
        scenario=msgspec.structs.replace(scenario, written=msgspec.UNSET),
        provenance=_provenance(calibration, tasks, changes),
        curves=list(_rows(scenario, tables, outside, growing)),
        plateau=_operating_point(plateaus, "the largest RPS over the rungs"),
        knee=knee,
        crossing=crossing(scenario.slo, tables, without),
        latency_onset=latency_onset,
        cost=costs(usd, tables, knees, lambda load: named(load, unit)) if (usd := scenario.usd_per_hour) else [],
        bottleneck=[bottleneck(scenario, rung) for _, rung in rungs.iterrows()],
        slo=probabilities,
        published=list(_published(scenario, tables, latency_onset.rps)),
        warnings=list(dict.fromkeys(warnings)),
        engine=calibration.engine,
        taken_as=engine.name if assumed and calibration.source.kind != "table" else None,
        flags=dict(known),
    )


def _medians(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True).groupby("rung", sort=True).median(numeric_only=True)


def _rows(scenario: Scenario, tables: Sequence[pd.DataFrame], beyond: list[bool], growing: list[bool]) -> Iterator[Row]:
    together = pd.concat(tables, ignore_index=True)
    closed = scenario.load.users is not None
    limits = [limit.full for limit in scenario.server.declared.limits]
    for metric in (*METRICS, *limits):
        for i, (_, group) in enumerate(together.groupby("rung", sort=True)):
            load = float(group["load"].iloc[0])
            quoted = not (growing[i] and metric in METRICS and METRICS[metric].steady)
            found = estimate(group[metric] if quoted else [])
            yield Row(
                scenario=scenario.name,
                users=int(load) if closed else None,
                rate=None if closed else load,
                metric=metric,
                value=found.value,
                low=found.low,
                high=found.high,
                extrapolated=beyond[i],
                unstable=growing[i],
            )


def _operating_point(points: Sequence[curve.OperatingPoint], meaning: str) -> OperatingPoint:
    load, rps, reached = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    return OperatingPoint(load=estimate(load), rps=estimate(rps), reached=float(reached.mean()), meaning=meaning)


def _slo_probabilities(
    scenario: Scenario, tables: Sequence[pd.DataFrame], growing: list[bool]
) -> Iterator[SloProbability]:
    together = pd.concat(tables, ignore_index=True)
    for metric, limit in scenario.slo.items():
        for i, (_, group) in enumerate(together.groupby("rung", sort=True)):
            kept = 0.0 if growing[i] else float((group[metric] <= limit).mean())
            yield SloProbability(load=float(group["load"].iloc[0]), metric=metric, limit=limit, probability=kept)


def _published(scenario: Scenario, tables: Sequence[pd.DataFrame], onset_rps: Estimate) -> Iterator[ComparedFigure]:
    for figure in scenario.published if scenario.load.users else []:  # figures are of a ladder of users
        if not _same_profile(figure, scenario.workload):
            continue
        if figure.metric == "rps_takeoff":
            simulated = onset_rps
        elif figure.metric == "rps_plateau":
            simulated = estimate([table["rps"].max() for table in tables])
        else:
            at = [table.loc[table["load"] == figure.users, figure.metric] for table in tables]
            if not all(len(values) for values in at):  # this load was not asked for
                continue
            simulated = estimate([values.iloc[0] for values in at])
        low, high = simulated.low, simulated.high
        if low is not None and high is not None:
            inside = low - figure.rounding <= figure.value <= high + figure.rounding
            yield ComparedFigure(figure=figure, simulated=simulated, inside=inside)


def _same_profile(figure: Figure, workload: Workload) -> bool:
    same_input = figure.prompt_tokens in (None, workload.prompt_tokens) and workload.conversations is None
    return same_input and figure.output_tokens in (None, workload.output_tokens)


def _provenance(calibration: Calibration, tasks: Sequence[Task], changes: Sequence[str]) -> Provenance:
    return Provenance(
        kind=calibration.source.kind,
        note=calibration.source.note,
        files={file.path: file.sha256 for file in calibration.source.files},
        model=calibration.model,
        parameters={
            name: {"value": p.value, "low": p.low, "high": p.high, "unit": p.unit, "meaning": p.meaning}
            for name, p in islice(calibration.parameters.items(), 40)
        },
        seed=tasks[0].seed[0],
        replicates=len(tasks),
        changes=[str(change) for change in changes],  # they may know their option, which files do not keep
        software={"servecast": version("servecast"), "python": platform.python_version(), "numpy": np.__version__},
    )
