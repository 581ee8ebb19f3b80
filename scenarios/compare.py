"""A measured run beside its forecast, load by load and metric by metric; or any two runs beside each other.

The forecast is a replay (`sim/replay.py`), many times over: a parameter draw, both noises and a fresh seed each time,
so that the 5 % and 95 % quantiles over replicates are a 90 % prediction interval for a window of the measured length.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd

from scenarios.evidence import Evidence, side_by_side
from scenarios.forecast import named
from scenarios.replicate import described
from sim import metrics
from sim.calibration import Calibration
from sim.curve import band
from sim.errors import NotEnoughData
from sim.model import draw_model, drawing
from sim.replay import replay, with_users
from sim.run import Run, read_run, write_atomic

FORMAT = 1  # 1: first
# what another grouping of the users changes; rates and far quantiles of few requests fall apart of themselves
SWAYED = ("e2e_mean", "e2e_p50", "e2e_p95", "ttft_mean", "ttft_p50", "ttft_p95")
PATTERNS = 3  # as many metrics of two patterns are named at one load
REPLICATES = 99  # the least at which 5 % and 95 % quantiles of `weibull` lie within the sample with room to spare


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One metric at one load. `low`..`high` is the 90 % prediction interval; without one they are None.

    What was measured but not forecast has no `simulated` and no `relative_error`, and is not `inside`.
    """

    rung: int
    load: float
    users: int | None
    metric: str
    measured: float
    simulated: float | None
    low: float | None
    high: float | None
    relative_error: float | None
    inside: bool | None
    held_out: bool
    repeat_error: float | None = None
    humps: list[float] | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One metric over the scored rungs; `effective` is how many independent rungs their correlation leaves.

    No errors, no averages: where nothing was forecast, or nothing but zeros measured, they are None.
    """

    mape: float | None
    median: float | None
    bias: float | None
    coverage: float | None
    rungs: int
    effective: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True, rename={"passed": "pass"}):
    """What `compare` says: rows, a summary of those held out of the fit, a verdict if tolerances were stated, and what
    lies behind it. `coverage` is the share of all scored rows inside their intervals; nine tenths should be. Where none
    was expected and none came (errors, mostly) there is no interval to be in. `of` says what `simulated` is: `a
    forecast` of the run `measured`, or one of two `runs` or `forecasts`."""

    format: int = FORMAT
    measured: str
    simulated: str
    rows: list[Row]
    summary: dict[str, Summary]
    tolerances: dict[str, float]
    passed: bool | None
    doubts: list[str]
    evidence: Evidence | None = None
    coverage: float | None = None
    of: str = "a forecast"

    @property
    def titles(self) -> tuple[str, str]:
        """What the two are to each other: only a forecast is held against a measurement."""
        return ("measured", "simulated") if self.of == "a forecast" else ("first", "second")

    @property
    def unit(self) -> str:
        """What a load is counted in."""
        return "requests/s" if all(row.users is None for row in self.rows) else "users"


@dataclass(frozen=True)
class Replicate:
    """One replay to be made: picklable, and the same result wherever it is made."""

    run: Run
    calibration: Calibration
    seed: int
    number: int

    def __call__(self) -> pd.DataFrame:
        """Its metrics and circumstances, one row a rung."""
        model = draw_model(self.calibration, self.run.server, drawing(self.seed, self.number))
        return described(replay(self.run, model, (self.seed, self.number)), model.server)


def forecast_run(
    run: Run, calibration: Calibration, executor: Executor, *, replicates: int = REPLICATES, seed: int = 0
) -> list[pd.DataFrame]:
    """Replays of a measured run under draws of a calibration, as tables of metrics."""
    # the streams themselves are not asked again, and are nearly all of a run's bulk
    asked = replace(with_users(run), token_times=None)
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
    without: Collection[int] = (),
) -> Comparison:
    """A measured run against replicates of its forecast; `fitted` are the rungs the calibration has seen, `repeats` are
    runs of the same server and workload, rungs `without` a counterpart are left out."""
    measured = metrics.table(run)
    if measured.empty:
        raise NotEnoughData(f"{run.name}: no rung has a complete window")
    together = pd.concat(tables, keys=range(len(tables)), names=["replicate", None]).reset_index("replicate")
    again, others = _repeat_errors(run, measured, repeats)
    rows = []
    for place, (rung, load) in enumerate(zip(measured["rung"], measured["load"], strict=True)):
        if int(rung) in without:
            continue
        here = measured.iloc[place]
        replicates = together[together["rung"] == place]  # a replay has the complete rungs only, in the same order
        for metric in metrics.COMPARED:
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
    said = [*with_users(run).doubts, *doubts, *others]
    found = verdict(rows, run.name, simulated, tolerances or {}, said)
    return msgspec.structs.replace(found, evidence=evidence)


def compare_runs(first: Run, second: Run, tolerances: Mapping[str, float] | None = None) -> Comparison:
    """Two runs, rung by rung of equal load; the second is to the first what a forecast is to a measurement."""
    other = metrics.table(second)
    mine = metrics.table(first)
    if other.empty or mine.empty:
        raise NotEnoughData("no rung has a complete window")
    missing = sorted(set(mine["load"]) - set(other["load"]))
    without = set(mine.loc[mine["load"].isin(missing), "rung"].astype(int))
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
    found = compare(
        first, tables, tolerances=tolerances, simulated=second.name, doubts=doubts, evidence=beside, without=without
    )
    return msgspec.structs.replace(found, of="runs")


def verdict(
    rows: list[Row], measured: str, simulated: str, tolerances: Mapping[str, float], doubts: Iterable[str]
) -> Comparison:
    """Summaries over the rungs held out of the fit, and whether each stated tolerance holds for their mean error."""
    scored = [row for row in rows if row.held_out]
    summary = {}
    for metric in dict.fromkeys(row.metric for row in scored):
        mine = [row for row in scored if row.metric == metric]
        finite = np.array([row.relative_error for row in mine if row.relative_error is not None])
        summary[metric] = Summary(
            mape=float(np.abs(finite).mean()) if len(finite) else None,
            median=float(np.median(np.abs(finite))) if len(finite) else None,
            bias=float(finite.mean()) if len(finite) else None,
            coverage=_coverage(mine),
            rungs=len(mine),
            effective=_effective(finite),
        )
    said = [*doubts, *_unforecast(rows), *_two_patterns(rows)]
    held = True
    for metric, limit in tolerances.items() if scored else ():
        why = _no_verdict(metric, [row for row in scored if row.metric == metric])
        if why is not None:
            said.append(f"{metric} counts as outside its tolerance: {why}")
        mape = summary[metric].mape if metric in summary else None
        held &= why is None and mape is not None and mape <= limit
    if tolerances and not scored:
        said.append("every rung was used for the fit: there is nothing to judge")
    return Comparison(
        measured=measured,
        simulated=simulated,
        rows=rows,
        summary=summary,
        tolerances=dict(tolerances),
        passed=held if tolerances and scored else None,
        doubts=said,
        coverage=_coverage(row for row in scored if row.measured or row.high),
    )


def _coverage(rows: Iterable[Row]) -> float | None:
    insides = [row.inside for row in rows if row.inside is not None]
    return float(np.mean(insides)) if insides else None


def _no_verdict(metric: str, rows: Sequence[Row]) -> str | None:
    """Why these rows of a metric cannot be within a tolerance, whatever their mean error; None if they can."""
    if not rows:
        return "it was not measured at any load that counts"
    absent = [_at(row) for row in rows if row.simulated is None]
    if absent:
        return f"measured but not forecast at {', '.join(absent)}"
    # forecast of something where there was nothing: no relative error can say how wrong
    endless = [_at(row) for row in rows if row.relative_error is None and row.inside is not True]
    return f"none was measured at {', '.join(endless)}, where some was forecast" if endless else None


def _unforecast(rows: Iterable[Row]) -> list[str]:
    """What was measured but not forecast, load by load."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.simulated is None:
            found.setdefault(_at(row), []).append(row.metric)
    return [f"measured but not forecast at {at}: {', '.join(absent)}" for at, absent in found.items()]


def _two_patterns(rows: Iterable[Row]) -> list[str]:
    """Where the forecast has two answers, load by load."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.humps is not None and row.metric in SWAYED:
            one, other = row.humps
            found.setdefault(_at(row), []).append(f"{row.metric} about {one:.3g} or {other:.3g}")
    return [
        f"at {at} two patterns are stable: {', '.join(two[:PATTERNS])}"
        + (f", and {len(two) - PATTERNS} metrics more" if len(two) > PATTERNS else "")
        for at, two in found.items()
    ]


def _at(row: Row) -> str:
    return named(row.load, "users" if row.users is not None else "requests/s")


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write it as `comparison.json`."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(comparison), indent=1) + b"\n")


def fitted_rungs(run: Run, calibration: Calibration) -> tuple[set[int], list[str]]:
    """The rungs of `run` that the calibration was fitted to, and a doubt where that is a guess.

    All of a run whose requests its source names, compressed since or not; what was compressed when it was fitted and is
    not now is known by its name alone.
    """
    if run.path is None:
        return set(), []
    every = set(range(len(run.rungs)))
    files = [file for file in Path(run.path).glob("requests*.jsonl*") if file.suffix in (".jsonl", ".gz")]
    known = {file.sha256 for file in calibration.source.files}
    if known & {digest for file in files for digest in _digests(file)}:
        return every, []
    folder = Path(run.path).resolve().name
    names = {file.path for file in calibration.source.files}
    if {f"{folder}/{file.name}.gz" for file in files} & names:
        said = f"{run.name} is taken for a run that was fitted, by its name alone: it was compressed then"
        return every, [said]
    return set(), []


def _digests(file: Path) -> Iterator[str]:
    """The sha256 of a file's bytes and, of a compressed one, of what is in it."""
    raw = file.read_bytes()
    yield sha256(raw).hexdigest()
    if file.suffix == ".gz":
        yield sha256(gzip.decompress(raw)).hexdigest()


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


def relative(simulated: float | None, measured: float) -> float | None:
    """simulated / measured − 1; None where nothing was forecast, or nothing measured and something forecast."""
    if simulated is None:
        return None
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
        again = metrics.table(other)
        if again.empty:
            doubts.append(f"{other.name} does not repeat {run.name}: it has no whole window")
            continue
        again = again.set_index("load")
        common = measured[measured["load"].isin(again.index)]
        if other.scenario.workload != run.scenario.workload or common.empty:
            why = "has no load in common with it" if common.empty else "asked for other lengths"
            doubts.append(f"{other.name} does not repeat {run.name}: it {why}")
            continue
        for _, here in common.iterrows():
            for metric in metrics.COMPARED:
                error = relative(float(again[metric].loc[[here["load"]]].iloc[0]), float(here[metric]))
                key = int(here["rung"]), metric
                if error is not None and not math.isnan(error) and abs(error) >= abs(found.get(key, 0.0)):
                    found[key] = error
    return found, doubts
