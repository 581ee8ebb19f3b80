"""A comparison: a row for every load and metric, summaries of the rungs held out of the fit, and a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from scenarios.forecast.forecast import named
from sim.model.errors import BadInput
from sim.model.files.atomic import write_file
from sim.model.files.format import FORMAT
from sim.model.files.shape import Key, known
from sim.model.metric import COMPARED
from sim.model.warning import Notice, notice

# the metrics whose modes are reported: rates, and far quantiles of few requests, often look bimodal by chance
WITH_MODES = ("e2e_mean", "e2e_p50", "e2e_p95", "ttft_mean", "ttft_p50", "ttft_p95")
NAMED = 3  # as many metrics with two modes are named at one load
SHARES = (0.001, 0.005, 0.01, *(k / 50 for k in range(1, 50)), 0.99, 0.995, 0.999)  # of the gaps between tokens


class Row(msgspec.Struct, frozen=True, kw_only=True, rename={"modes": "humps"}):
    """One metric at one load. `low`..`high` is the 90 % prediction interval; without one they are None.

    What was measured but not forecast has no `simulated` and no `relative_error`, and is not `inside`. `modes` are the
    centres of two separate modes among the replicates, if there are two.
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
    modes: list[float] | None = None

    @property
    def at(self) -> str:
        """Its load in words."""
        return named(self.load, "users" if self.users is not None else "requests/s")


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


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """The gaps between tokens in one window, s: for each of `SHARES` the gap that this share of them does not exceed.

    `simulated` is the median of replays (or the other run's), `low`..`high` their 90 % band; absent if there is none.
    """

    load: float
    at: str | None = None  # the load with its unit
    measured: list[float]
    simulated: list[float] = []
    low: list[float] = []
    high: list[float] = []


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """Relative errors (measured / predicted − 1) of some steps: their mean, 5 % and 95 % quantiles. `at` is what these
    steps have in common: their batch size, or the middle of a stretch of time, s."""

    at: float
    steps: int
    mean: float
    low: float
    high: float


class Diagnostics(msgspec.Struct, frozen=True, kw_only=True):
    """`by_batch` and `by_time` are by kind of step (prefill, decode); empty where the run shows no steps."""

    shares: tuple[float, ...] = SHARES
    itl: list[Distribution] = []
    by_batch: dict[str, list[Error]] = {}
    by_time: dict[str, list[Error]] = {}


class Comparison(msgspec.Struct, frozen=True, kw_only=True, rename={"passed": "pass", "diagnostics": "evidence"}):
    """What `compare` says: rows, a summary of those held out of the fit, a verdict if tolerances were stated, and what
    lies behind it. `coverage` is the share of all scored rows inside their intervals; nine tenths should be. Where none
    was expected and none came (errors, mostly) there is no interval to be in. `of` says what `simulated` is: `a
    forecast` of the run `measured`, or one of two `runs` or `forecasts`. `taken_as` is the engine for which
    the user takes a run or a calibration of another."""

    format: int = FORMAT
    measured: str
    simulated: str
    rows: list[Row]
    summary: dict[str, Summary]
    tolerances: dict[str, float]
    passed: bool | None
    warnings: list[Notice]
    diagnostics: Diagnostics | None = None
    coverage: float | None = None
    of: str = "a forecast"
    taken_as: str | None = None

    @property
    def assumptions(self) -> list[Notice]:
        """The warnings that belong to every number of it: those it begins with, if something is taken for what it is
        not known to be."""
        return [said for said in self.warnings if said.code == "taken-as"] if self.taken_as is not None else []

    @property
    def titles(self) -> tuple[str, str]:
        """What the two are to each other: only a forecast is held against a measurement."""
        return ("measured", "simulated") if self.of == "a forecast" else ("first", "second")

    @property
    def unit(self) -> str:
        """What a load is counted in; `load` where some are users and others requests/s."""
        units = {"requests/s" if row.users is None else "users" for row in self.rows}
        return "load" if len(units) > 1 else next(iter(units), "users")

    def load(self, row: Row) -> str:
        """A row's load as tables show it: with its unit where units differ."""
        return row.at if self.unit == "load" else f"{row.load:g}"


def parse_tolerances(texts: Iterable[str]) -> dict[str, float]:
    """What `--tolerance METRIC=SHARE` options say; `BadInput` for an unknown metric, or a share that is none."""
    found = {}
    for text in texts:
        metric, _, share = text.partition("=")
        where = f"--tolerance {text}"
        known(metric, COMPARED, "metric", (metric,), partial(_wrong_metric, where))
        try:
            found[metric] = float(share)
        except ValueError:
            found[metric] = -1.0
        if not 0 < found[metric] < float("inf"):
            raise BadInput("expected METRIC=SHARE, such as e2e_mean=0.05", path=where)
    return found


def _wrong_metric(where: str, key: Key, message: str) -> BadInput:
    return BadInput(message, path=where)


def verdict(
    rows: list[Row], measured: str, simulated: str, tolerances: Mapping[str, float], warnings: Iterable[Notice]
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
    said = [*warnings, *_unforecast(rows), *_bimodal(rows)]
    held = True
    for metric, limit in tolerances.items() if scored else ():
        why = _no_verdict(metric, [row for row in scored if row.metric == metric])
        if why is not None:
            said.append(notice("no-verdict", f"{metric} counts as outside its tolerance: {why}"))
        mape = summary[metric].mape if metric in summary else None
        held &= why is None and mape is not None and mape <= limit
    if tolerances and not scored:
        said.append(notice("nothing-held-out", "every rung was used for the fit: there is nothing to judge"))
    return Comparison(
        measured=measured,
        simulated=simulated,
        rows=rows,
        summary=summary,
        tolerances=dict(tolerances),
        passed=held if tolerances and scored else None,
        warnings=said,
        coverage=_coverage(row for row in scored if row.measured or row.high),
    )


def _coverage(rows: Iterable[Row]) -> float | None:
    insides = [row.inside for row in rows if row.inside is not None]
    return float(np.mean(insides)) if insides else None


def _no_verdict(metric: str, rows: Sequence[Row]) -> str | None:
    """Why these rows of a metric cannot be within a tolerance, whatever their mean error; None if they can."""
    if not rows:
        return "it was not measured at any load that counts"
    absent = [row.at for row in rows if row.simulated is None]
    if absent:
        return f"measured but not forecast at {', '.join(absent)}"
    # forecast of something where there was nothing: no relative error can say how wrong
    endless = [row.at for row in rows if row.relative_error is None and row.inside is not True]
    return f"none was measured at {', '.join(endless)}, where some was forecast" if endless else None


def _unforecast(rows: Iterable[Row]) -> list[Notice]:
    """What was measured but not forecast, load by load."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.simulated is None:
            found.setdefault(row.at, []).append(row.metric)
    return [
        notice("not-forecast", f"measured but not forecast at {at}: {', '.join(absent)}")
        for at, absent in found.items()
    ]


def _bimodal(rows: Iterable[Row]) -> list[Notice]:
    """A warning for every load at which the forecast has two modes."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.modes is not None and row.metric in WITH_MODES:
            one, other = row.modes
            found.setdefault(row.at, []).append(f"{row.metric} about {one:.3g} or {other:.3g}")
    return [
        notice(
            "two-patterns",
            f"at {at} two patterns are stable: {', '.join(two[:NAMED])}"
            + (f", and {len(two) - NAMED} metrics more" if len(two) > NAMED else ""),
        )
        for at, two in found.items()
    ]


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write it as `comparison.json`."""
    write_file(path, msgspec.json.format(msgspec.json.encode(comparison), indent=1) + b"\n")


def _effective(errors: np.ndarray) -> float:
    """How many independent rungs there are: neighbours share their machine's drift (first-order autocorrelation)."""
    n = len(errors)
    if n < 3 or not errors.std():
        return float(n)
    x = errors - errors.mean()
    rho = float(np.clip((x[1:] * x[:-1]).sum() / (x * x).sum(), 0.0, 0.99))
    return n * (1 - rho) / (1 + rho)
