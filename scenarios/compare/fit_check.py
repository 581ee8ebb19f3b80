"""Whether a calibration reproduces what it was fitted to: every fitted load, simulated again, against its measurement.

A fit can go wrong unnoticed: a flag that is not the server's, a machine that changed while it was measured, other
people's requests. Then the loads that were fitted are missed too. Three metrics of every rung are
checked: mean E2E, TTFT p50 and output tokens/s. A metric is *missed* where the measured value lies outside the 90 %
band of the replays and further from their median than a client can tell (`CLIENT`). The check fails

- when more are missed than chance allows: at most one check in a hundred fails so if the calibration is right. In a
  closed loop E2E and tokens/s are one quantity (users = tokens/s × E2E / tokens), so they are taken to miss together;
  TTFT and the rungs are taken to miss independently of each other. What all rungs of a run have in common (its run
  effect) does not count against this: the fit has seen it. The number allowed is the 99 % quantile of
  2 · Binomial(rungs, 0.1) + Binomial(rungs, 0.1);
- when one is missed by more than twice its goal (`goals`). Users who lock into one of two patterns make TTFT one of two
  numbers, so that chance alone puts one outside its band by half as much again. A TTFT must therefore be outside all
  replays too, and outside the band as widened for so many normal variables in one check in a hundred (Bonferroni).

`tools/check_fit_check.py` prints how often right calibrations fail, and how often wrong ones do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from calibrate.schedule.schedule import shows_steps
from calibrate.schedule.usable import client_limited
from scenarios.compare.goals import Goal, goals
from scenarios.compare.repeatability import relative
from scenarios.compare.run_with_model import replays
from sim.executors import IN_PROCESS, Executor
from sim.model.calibration import Calibration, Checked, FitCheck
from sim.model.metric import METRICS, Kind
from sim.model.scenario import Scenario
from sim.model.warning import notice
from sim.results import metrics
from sim.results.curve import band
from sim.run import Run

Floats = NDArray[np.float64]

CHECKED = ("e2e_mean", "ttft_p50", "output_tokens_per_s")
OUTSIDE = 0.1  # share of right values outside a 90 % band
CHANCE = 0.01  # of failing although the calibration is right
FIRST, ALL = 39, 99  # replays: of both, the 5 % and 95 % quantiles are replays; the second only confirms a failure
CLIENT = 1e-3  # s: how late our client sees a token at the worst (0.65 ms p99 at 8 users, 0.83 at 64: `make bench`)
SMALL = 0.25  # of a metric's goal: bands of a quiet machine are narrower than what a model of steps can be right to
UNFOLLOWED = (
    0.30  # twice the error from which on no form is said to follow a table (`calibrate.sources.step_time_table`)
)

Progress = Callable[[str, float, int], None]


def check_runs(
    calibration: Calibration,
    runs: Sequence[Run],
    executor: Executor = IN_PROCESS,
    *,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> FitCheck:
    """Replay the runs that a calibration was fitted to, and compare every load with what was measured."""
    streamed = [run for run in runs if shows_steps(run)] or runs
    fitted = [run for run in streamed if any(rung.end > rung.settled for rung in run.rungs)]
    if not fitted:
        return _found([], 0, 0)
    cells = [cell for run in fitted for cell in _cells(run)]
    drawn = _replayed(calibration, fitted, executor, seed, range(1, FIRST + 1), progress)
    found = _judge(cells, drawn)
    if not found.passed:  # with more replays, in case their luck made the bands narrow
        more = _replayed(calibration, fitted, executor, seed, range(FIRST + 1, ALL + 1), progress)
        found = _judge(cells, np.concatenate([drawn, more], axis=1))
    return found


def check_published(
    calibration: Calibration, scenario: Scenario, executor: Executor = IN_PROCESS, *, seed: int = 0
) -> FitCheck:
    """Simulate every published figure again. It is missed where it lies outside the band of the draws and further off
    than its rounding and what counts as close (`calibrate.sources.diagnostics.CLOSE`), and far at twice that."""
    from calibrate.sources.diagnostics import deviation
    from calibrate.sources.published import resimulate

    rows = []
    for shown in resimulate(scenario, calibration, seed, FIRST, executor):
        _, low, high = band(shown.drawn)
        off = float(deviation(shown.figure, np.array([shown.central]))[0])
        value, missing = shown.figure.value, math.isnan(shown.central)
        missed = off > 1 and not low <= value <= high
        rows.append(
            Checked(
                of=scenario.name,
                at=shown.title,
                metric=shown.figure.metric,
                measured=value,
                simulated=None if missing else shown.central,
                low=None if math.isnan(low) else low,
                high=None if math.isnan(high) else high,
                relative_error=None if missing else relative(shown.central, value),
                missed=missed,
                far=missed and off > 2,
            )
        )
    return _found(rows, _allowed(0, len(rows)), FIRST)


def check_table(calibration: Calibration) -> FitCheck:
    """Compare the times of a table with the fitted form. A table has no loads to be simulated: what it has is the error
    of its rows, of which 95 % in a phase must be within `UNFOLLOWED`."""
    rows = [
        Checked(
            of="table",
            at=f"95 % of {found.rows} rows",
            metric=f"{phase} times",
            measured=0.0,
            simulated=None,
            low=None,
            high=None,
            relative_error=found.p95_relative,
            missed=found.p95_relative > UNFOLLOWED,
            far=found.p95_relative > UNFOLLOWED,
        )
        for phase, found in calibration.residuals.items()
    ]
    return _found(rows, 0, 0)


def _found(rows: list[Checked], allowed: int, replicates: int) -> FitCheck:
    missed = sum(row.missed for row in rows)
    passed = missed <= allowed and not any(row.far for row in rows)
    return FitCheck(rows=rows, missed=missed, allowed=allowed, passed=passed, replicates=replicates)


class _Cell(NamedTuple):
    """A metric of a fitted load, as it was measured."""

    of: str
    at: str
    metric: str
    measured: float
    goal: Goal


def _cells(run: Run) -> list[_Cell]:
    """The cells of a run, load by load; NaN where nothing was measured."""
    table, of = metrics.table(run), goals(run.scenario.server)
    busy = {i for i, rung in enumerate(run.rungs) if client_limited(rung)}
    if busy.issuperset(table["rung"]):  # nothing else was there to be fitted
        busy = set()
    return [
        _Cell(
            of=run.name,
            at=run.rungs[int(row["rung"])].named,
            metric=metric,
            measured=math.nan if row["rung"] in busy else float(row[metric]),  # left out of the fit
            goal=of[metric],
        )
        for row in table.to_dict("records")
        for metric in CHECKED
    ]


def _replayed(
    calibration: Calibration,
    runs: Sequence[Run],
    executor: Executor,
    seed: int,
    numbers: range,
    progress: Progress,
) -> Floats:
    """The cells of all runs in each replay: (cells, replays)."""
    columns = []
    for run in runs:
        tell = partial(progress, f"checking the fit of {run.name}")
        tables = replays(run, calibration, executor, numbers, seed=seed, progress=tell)
        columns.append(np.array([table[list(CHECKED)].to_numpy(np.float64).ravel() for table in tables]).T)
    return np.concatenate(columns)


def _judge(cells: Sequence[_Cell], drawn: Floats) -> FitCheck:
    known = [(cell, values) for cell, values in zip(cells, drawn, strict=True) if not math.isnan(cell.measured)]
    rows = [_checked(cell, values, len(known)) for cell, values in known]
    first = sum(row.metric == "ttft_p50" for row in rows)
    rungs = max((sum(row.metric == metric for row in rows) for metric in CHECKED), default=0)
    return _found(rows, _allowed(rungs, first), drawn.shape[1])


def _checked(cell: _Cell, drawn: Floats, among: int) -> Checked:
    """One of `among` cells against its replays."""
    # in a short window there may be no first token; that there was one is a miss where hardly any replay has one
    nothing = bool(np.mean(~np.isnan(drawn)) < OUTSIDE / 2)
    middle, low, high = (None, None, None) if nothing else band(drawn)
    off = math.inf if middle is None else abs(middle - cell.measured)
    outside = low is None or high is None or not low <= cell.measured <= high
    error = off / cell.measured if cell.measured else math.inf
    seconds = METRICS[cell.metric].kind is Kind.LATENCY
    missed = outside and error > SMALL * cell.goal.error and not (seconds and off <= CLIENT)
    return Checked(
        of=cell.of,
        at=cell.at,
        metric=cell.metric,
        measured=cell.measured,
        simulated=middle,
        low=low,
        high=high,
        relative_error=relative(middle, cell.measured),
        missed=missed,
        far=missed
        and error > 2 * cell.goal.error
        and off > 2 * cell.goal.seconds
        and (nothing or cell.metric != "ttft_p50" or _beyond_chance(cell.measured, drawn, among)),
    )


def _beyond_chance(measured: float, drawn: Floats, among: int) -> bool:
    """Whether chance would hardly put any of `among` values so far from its replays."""
    from scipy.special import ndtri

    middle, low, high = band(drawn)
    wider = float(ndtri(1 - CHANCE / (2 * among)) / ndtri(1 - OUTSIDE / 2))
    below = min(middle - wider * (middle - low), float(np.nanmin(drawn)))
    above = max(middle + wider * (high - middle), float(np.nanmax(drawn)))
    return not below <= measured <= above


def _allowed(rungs: int, first: int) -> int:
    """How many may be missed of `rungs` whose E2E and tokens/s miss together, and of as many as `first` TTFTs."""
    pairs = np.zeros(2 * rungs + 1)
    pairs[::2] = _binomial(rungs, OUTSIDE)
    chances = np.convolve(pairs, _binomial(first, OUTSIDE))
    return int(np.searchsorted(np.cumsum(chances), 1 - CHANCE - 1e-12))  # a tie is within rounding


def _binomial(n: int, p: float) -> Floats:
    """The probabilities of 0 to n of n. `scipy.stats`, which has them, takes a second to import."""
    from scipy.special import gammaln

    k = np.arange(n + 1)
    ways = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return np.asarray(np.exp(ways + k * np.log(p) + (n - k) * np.log1p(-p)))


def failures(check: FitCheck) -> list[str]:
    """Why a check failed, one line for each figure that was missed; nothing if it passed."""
    if check.passed:
        return []
    lines = [
        f"{row.of}, {row.at}: {row.metric} "
        + (f"is off by {row.relative_error or 0.0:.0%}" if row.simulated is None and row.low is None else _apart(row))
        for row in check.rows
        if row.missed
    ]
    if not any(row.far for row in check.rows):
        lines.append(
            f"{check.missed} of {len(check.rows)} figures that were fitted are outside their 90 % bands; "
            f"chance allows {check.allowed}"
        )
    return lines


def _apart(row: Checked) -> str:
    if row.simulated is None:
        return f"{row.measured:.4g} was measured, none simulated"
    error = "" if row.relative_error is None else f" ({row.relative_error:+.1%})"
    return (
        f"{row.simulated:.4g} simulated, {row.measured:.4g} measured{error}, outside the 90 % band "
        f"{row.low:.4g} to {row.high:.4g}" + ("; more than twice its goal" if row.far else "")
    )


def with_check(calibration: Calibration, check: FitCheck) -> Calibration:
    """The calibration with its check, and a warning if that failed: forecasts with it are then not to be trusted."""
    warnings = calibration.warnings
    if not check.rows:
        warnings = [
            *warnings,
            notice(
                "fit-unchecked",
                "no fitted load has a complete window, so this calibration could not be checked",
            ),
        ]
    if not check.passed:
        missed = ", ".join(dict.fromkeys(f"{row.of} at {row.at}" for row in check.rows if row.missed))
        warnings = [
            *warnings,
            notice(
                "fit-check-failed",
                f"this calibration does not reproduce what it was fitted to ({missed}): see its check",
            ),
        ]
    return msgspec.structs.replace(calibration, check=check, warnings=warnings)
