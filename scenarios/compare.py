"""A measured run beside its forecast, load by load and metric by metric; or any two runs beside each other.

The forecast is a replay (`sim/replay.py`), many times over: a parameter draw, both noises and a fresh seed each time,
so that the 5 % and 95 % quantiles over replicates are a 90 % prediction interval for a window of the measured length.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd

from scenarios.evidence import Evidence, side_by_side
from sim import metrics
from sim.calibration import Calibration
from sim.curve import band
from sim.errors import NotEnoughData
from sim.model import draw_model
from sim.replay import replay
from sim.run import Run, read_run, write_atomic

FORMAT = 1  # 1: first
REPLICATES = 99  # the least at which 5 % and 95 % quantiles of `weibull` lie within the sample with room to spare


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One metric at one load. `low`..`high` is the 90 % prediction interval; without one they are None."""

    rung: int
    load: float
    users: int | None
    metric: str
    measured: float
    simulated: float
    low: float | None
    high: float | None
    relative_error: float | None
    inside: bool | None
    held_out: bool
    repeat_error: float | None = None
    humps: list[float] | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One metric over the scored rungs; `effective` is how many independent rungs their correlation leaves."""

    mape: float
    median: float
    bias: float
    coverage: float | None
    rungs: int
    effective: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True, rename={"passed": "pass"}):
    """What `compare` says: rows, a summary of those held out of the fit, a verdict if tolerances were stated, and what
    lies behind it."""

    format: int = FORMAT
    measured: str
    simulated: str
    rows: list[Row]
    summary: dict[str, Summary]
    tolerances: dict[str, float]
    passed: bool | None
    doubts: list[str]
    evidence: Evidence | None = None


@dataclass(frozen=True)
class Replicate:
    """One replay to be made: picklable, and the same result wherever it is made."""

    run: Run
    calibration: Calibration
    seed: int
    number: int

    def __call__(self) -> pd.DataFrame:
        """Its metrics, one row a rung."""
        model = draw_model(self.calibration, self.run.server, np.random.default_rng([self.seed, self.number]))
        return metrics.table(replay(self.run, model, (self.seed, self.number)))


def forecast_run(
    run: Run, calibration: Calibration, executor: Executor, *, replicates: int = REPLICATES, seed: int = 0
) -> list[pd.DataFrame]:
    """Replays of a measured run under draws of a calibration, as tables of metrics."""
    # the streams themselves are not asked again, and are nearly all of a run's bulk
    asked = replace(run, token_times=None)
    tasks = [Replicate(asked, calibration, seed, number) for number in range(1, replicates + 1)]
    return list(executor.map(_call, tasks, chunksize=max(1, replicates // 16)))


def _call(task: Replicate) -> pd.DataFrame:
    return task()


def compare(
    run: Run,
    tables: Sequence[pd.DataFrame],
    *,
    fitted: Collection[int] = (),
    tolerances: Mapping[str, float] | None = None,
    repeats: Iterable[Run] = (),
    simulated: str = "simulated",
    doubts: Iterable[str] = (),
    evidence: Evidence | None = None,
) -> Comparison:
    """A measured run against replicates of its forecast; `fitted` are the rungs the calibration has seen, `repeats` are
    runs of the same server and workload."""
    measured = metrics.table(run)
    if measured.empty:
        raise NotEnoughData(f"{run.name}: no rung has a complete window")
    together = pd.concat(tables, keys=range(len(tables)), names=["replicate", None]).reset_index("replicate")
    again, others = _repeat_errors(run, measured, repeats)
    rows = []
    for place, (rung, load) in enumerate(zip(measured["rung"], measured["load"], strict=True)):
        here = measured.iloc[place]
        replicates = together[together["rung"] == place]  # a replay has the complete rungs only, in the same order
        for metric in metrics.COMPARED:
            value = float(here[metric])
            drawn = replicates[metric].to_numpy(dtype=np.float64)
            if math.isnan(value) or np.isnan(drawn).all():
                continue
            middle, low, high = band(drawn)
            rows.append(
                Row(
                    rung=int(rung),
                    load=float(load),
                    users=run.rungs[int(rung)].users,
                    metric=metric,
                    measured=value,
                    simulated=middle,
                    low=low if len(tables) > 1 else None,
                    high=high if len(tables) > 1 else None,
                    relative_error=_relative(middle, value),
                    inside=bool(low <= value <= high) if len(tables) > 1 else None,
                    held_out=int(rung) not in fitted,
                    repeat_error=again.get((int(rung), metric)),
                    humps=humps(drawn),
                )
            )
    found = verdict(rows, run.name, simulated, tolerances or {}, [*run.doubts, *doubts, *others])
    return msgspec.structs.replace(found, evidence=evidence)


def compare_runs(first: Run, second: Run, tolerances: Mapping[str, float] | None = None) -> Comparison:
    """Two runs, rung by rung of equal load; the second is to the first what a forecast is to a measurement."""
    other = metrics.table(second)
    mine = metrics.table(first)
    if other.empty or mine.empty:
        raise NotEnoughData("no rung has a complete window")
    missing = sorted(set(mine["load"]) - set(other["load"]))
    doubts = [f"{second.name} has no load {load:g}: left out" for load in missing]
    matched = [
        other[other["load"] == load].iloc[[0]].assign(rung=place)
        for place, load in enumerate(mine["load"])
        if load not in missing
    ]
    if not matched:
        raise NotEnoughData(f"{first.name} and {second.name} have no load in common")
    tables = [pd.concat(matched, ignore_index=True)]
    beside = side_by_side(first, second)
    return compare(first, tables, tolerances=tolerances, simulated=second.name, doubts=doubts, evidence=beside)


def verdict(
    rows: list[Row], measured: str, simulated: str, tolerances: Mapping[str, float], doubts: Iterable[str]
) -> Comparison:
    """Summaries over the rungs held out of the fit, and whether each stated tolerance holds for their mean error."""
    scored = [row for row in rows if row.held_out]
    summary = {}
    for metric in dict.fromkeys(row.metric for row in scored):
        mine = [row for row in scored if row.metric == metric]
        finite = np.array([row.relative_error for row in mine if row.relative_error is not None])
        insides = [row.inside for row in mine if row.inside is not None]
        summary[metric] = Summary(
            mape=float(np.abs(finite).mean()) if len(finite) else float("nan"),
            median=float(np.median(np.abs(finite))) if len(finite) else float("nan"),
            bias=float(finite.mean()) if len(finite) else float("nan"),
            coverage=float(np.mean(insides)) if insides else None,
            rungs=len(mine),
            effective=_effective(finite),
        )
    said = list(doubts)
    held = [metric in summary and summary[metric].mape <= limit for metric, limit in tolerances.items()]
    if tolerances and not scored:
        said.append("every rung was used for the fit: there is nothing to judge")
    return Comparison(
        measured=measured,
        simulated=simulated,
        rows=rows,
        summary=summary,
        tolerances=dict(tolerances),
        passed=all(held) if tolerances and scored else None,
        doubts=said,
    )


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write it as `comparison.json`."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(comparison), indent=1) + b"\n")


def fitted_rungs(run: Run, calibration: Calibration) -> set[int]:
    """The rungs of `run` that the calibration was fitted to: all of a run whose requests its source names."""
    if run.path is None:
        return set()
    known = {file.sha256 for file in calibration.source.files}
    mine = {sha256(file.read_bytes()).hexdigest() for file in Path(run.path).glob("requests*.jsonl*")}
    return set(range(len(run.rungs))) if known & mine else set()


def humps(drawn: np.ndarray) -> list[float] | None:
    """Centres of two separate patterns among replicates, if there are two; None for a single one.

    Lock-stepped users settle into one of several groupings, and a forecast then has several answers. Two groups count
    as separate if the widest gap splits off at least a tenth and is wider than either group's own spread.
    """
    x = np.sort(drawn[~np.isnan(drawn)])
    least = max(2, len(x) // 10)
    if len(x) < 20 or x[-1] <= 0:
        return None
    gaps = np.diff(x)[least - 1 : len(x) - least]
    at = least + int(gaps.argmax())
    left, right = x[:at], x[at:]
    gap = float(x[at] - x[at - 1])
    if gap > 2 * max(left.std(), right.std()) and gap > 0.05 * float(np.median(x)):
        return [float(np.median(left)), float(np.median(right))]
    return None


def _relative(simulated: float, measured: float) -> float | None:
    """simulated / measured − 1; None where nothing was measured and something was forecast."""
    if measured:
        return simulated / measured - 1
    return 0.0 if simulated == 0 else None


def _effective(errors: np.ndarray) -> float:
    """How many independent rungs there are: neighbours share their machine's drift (first-order autocorrelation)."""
    n = len(errors)
    if n < 3 or not errors.std():
        return float(n)
    x = errors - errors.mean()
    rho = float(np.clip((x[1:] * x[:-1]).sum() / (x * x).sum(), 0.0, 0.99))
    return n * (1 - rho) / (1 + rho)


def read_repeats(run: Run, named: Iterable[Path] = ()) -> list[Run]:
    """The runs that measured the same again: those named, and the run's sibling `<run>-again` if there is one."""
    paths = list(named)
    if run.path is not None:
        own = run.path.resolve()
        sibling = own.with_name(f"{own.name}-again")
        if (sibling / "run.json").exists() and sibling not in {path.resolve() for path in paths}:
            paths.append(sibling)
    return [read_run(path) for path in paths]


def _repeat_errors(
    run: Run, measured: pd.DataFrame, repeats: Iterable[Run]
) -> tuple[dict[tuple[int, str], float], list[str]]:
    """How far the real server is from itself: the same load measured again, relative to the first time (of several
    repeats, the farthest); and which repeats are none."""
    found: dict[tuple[int, str], float] = {}
    doubts = []
    for other in repeats:
        again = metrics.table(other).set_index("load")
        common = measured[measured["load"].isin(again.index)]
        if other.scenario.workload != run.scenario.workload or common.empty:
            why = "has no load in common with it" if common.empty else "asked for other lengths"
            doubts.append(f"{other.name} does not repeat {run.name}: it {why}")
            continue
        for _, here in common.iterrows():
            for metric in metrics.COMPARED:
                error = _relative(float(again[metric].loc[[here["load"]]].iloc[0]), float(here[metric]))
                key = int(here["rung"]), metric
                if error is not None and not math.isnan(error) and abs(error) >= abs(found.get(key, 0.0)):
                    found[key] = error
    return found, doubts
