"""The regression problem of rebuilt schedules: one row per step whose duration is known, and its terms.

The duration of a row lies between two step ends as clients saw them. It includes the filter that ran before the step
and the joining of batches. A prefill that found the server idle starts when its first request was sent, so it includes
the network latency there and back (`u0`, and `u1` per prompt token).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from calibrate.arrays import Bools, Floats, Ints
from calibrate.schedule.admission_timing import latency_bounds
from calibrate.schedule.schedule import Schedule, works
from calibrate.schedule.usable import usable_steps
from sim.engines.tgi_0_9_4 import Flags
from sim.model.errors import NotEnoughData
from sim.model.warning import Notice
from sim.run import Run
from sim.steptime.basis import COLUMNS, columns
from sim.steptime.linear import FORMS, LEVEL

BLOCK_SECONDS = 5.0  # resampled as a whole, with a random effect each: short enough for ten in a rung
COLD_CACHE = "w0"  # extra time of a decode step soon after a prefill; forecasts have its mean over the steps fitted
_WARM = 4.0  # decode steps in which the caches recover from a prefill (a factor e)
_CONTINUED = 2.0 * Flags().max_concurrent_requests  # sequences: more than routers admit


@dataclass(frozen=True)
class Rows:
    """The usable steps of some runs, one element per row.

    `extra` are passes without a token in the time of a row, whose number they have as `row`.
    `table` has the columns of `Schedule.steps`, `idle` (the server was idle before) and `run`. `seconds` is the
    duration, `prefill` marks prefills. `run`, `rung` and `block` number the runs, their rungs and blocks of
    `BLOCK_SECONDS` over all runs. `latency` bounds the network latency to the server, s
    (`admission_timing.latency_bounds`).
    """

    table: pd.DataFrame
    extra: pd.DataFrame
    seconds: Floats
    prefill: Bools
    run: Ints
    rung: Ints
    block: Ints
    warnings: list[Notice]
    latency: tuple[float, float] | None = None

    @property
    def longest(self) -> Floats:
        """The longest prompt of a prefill, the longest context of a decode step, tokens."""
        longest = self.table["prefill_longest"].where(self.prefill, self.table["decode_longest"])
        return np.asarray(longest.to_numpy(np.float64))

    @property
    def rung_of_block(self) -> Ints:
        """The rung of each block, (blocks,), ascending."""
        return self.rung[np.unique(self.block, return_index=True)[1]]

    @property
    def run_of_block(self) -> Ints:
        """The run of each block, (blocks,)."""
        return self.run[np.unique(self.block, return_index=True)[1]]


def build_rows(runs: Sequence[Run], schedules: Sequence[Schedule]) -> Rows:
    """The usable steps of all runs, whose schedules are given in the same order.

    Raises `NotEnoughData` where no decode step is left.
    """
    warnings: list[Notice] = []
    tables, extras, count = [], [], 0
    for number, (run, schedule) in enumerate(zip(runs, schedules, strict=True)):
        steps = schedule.steps.drop(columns="members")
        idle = ~steps["seen"] & (steps["kind"] == "prefill") & (steps["start"] > steps["end"].shift(fill_value=np.inf))
        usable = usable_steps(run, steps, idle, warnings)
        tables.append(steps[usable].assign(idle=idle[usable], run=number))
        row = np.where(usable, count + np.cumsum(usable) - 1, -1)[schedule.extra["step"].to_numpy()]
        extras.append(schedule.extra[row >= 0].assign(row=row[row >= 0]))
        count += int(usable.sum())
    table = pd.concat(tables, ignore_index=True)
    if not (table["kind"] == "decode").any():
        raise NotEnoughData(
            f"{', '.join(run.name for run in runs)}: no load to be fitted shows a decode step from end to end"
        )
    rung = _numbered(table["run"].to_numpy(), table["rung"].to_numpy())
    block = _numbered(rung, (table["end"].to_numpy() // BLOCK_SECONDS).astype(np.int64))
    return Rows(
        table=table,
        extra=pd.concat(extras, ignore_index=True),
        seconds=table["seconds"].to_numpy(np.float64),
        prefill=(table["kind"] == "prefill").to_numpy(),
        run=table["run"].to_numpy(),
        rung=rung,
        block=block,
        warnings=warnings,
        latency=latency_bounds(runs, schedules),
    )


def _numbered(*keys: Ints) -> Ints:
    """A number 0, 1, … for every distinct tuple of keys, (n,)."""
    index = np.unique(np.stack(keys), axis=1, return_inverse=True)[1]
    return np.asarray(index, dtype=np.int64).reshape(-1)


# How the time of a decode step grows with its batch beyond a line: it flattens, because kernels use a processor better
# the more rows they have, and from some size on fully.
TREND: dict[str, Callable[[Floats], Floats]] = {
    "bs": lambda n: np.asarray(np.sqrt(n)),
    "bt": lambda n: np.asarray(-np.expm1((1.0 - n) / 4.0)),
}


def terms(rows: Rows, model: str) -> dict[str, Floats]:
    """What each coefficient multiplies in every row: the terms of `sim.steptime.basis`, and those that only a
    regression has: `TREND`, `u0` and `u1`, and `COLD_CACHE`, whose mean is 0."""
    t, decode = rows.table, (~rows.prefill).astype(np.float64)
    n, idle = t["sequences"].to_numpy(np.float64), t["idle"].to_numpy(np.float64)
    fresh = np.exp(-t["since"].to_numpy(np.float64) / _WARM) * decode
    if np.ptp(fresh[~rows.prefill]) > 0:  # else all steps are equally far from their prefill
        fresh -= decode * np.average(fresh, weights=decode)
    else:
        fresh[:] = 0.0
    trend = {name: decode * curve(n) for name, curve in TREND.items()}
    of_client = {"u0": idle, "u1": idle * rows.longest}
    basis = FORMS[model].basis
    design = columns(basis, *works(t))
    if len(rows.extra):
        for name, values in columns(basis, {name: rows.extra[name] for name in COLUMNS}).items():
            design[name] = design[name] + np.bincount(rows.extra["row"], weights=values, minlength=len(t))
    return design | trend | of_client | {COLD_CACHE: fresh}


def level_terms(rows: Rows, knots: Sequence[int]) -> dict[str, Floats]:
    """Hat functions of the batch size with a knot at each of `knots`, constant beyond them: how much of each level's
    time a decode step has."""
    n = rows.table["sequences"].to_numpy(np.float64)
    decode = (~rows.prefill).astype(np.float64)
    hats = np.eye(len(knots))
    return {f"{LEVEL}{k}": decode * np.interp(n, knots, hats[i]) for i, k in enumerate(knots)}


def level_knots(rows: Rows) -> list[int]:
    """Batch sizes with a time of their own: every small one, ever fewer up to 1.5 times the largest seen, and a few
    beyond, because no line continues a trend that flattens."""
    top = 1.5 * float(rows.table["sequences"].to_numpy()[~rows.prefill].max())
    knots, size = [1], 1
    while size < max(top, _CONTINUED):
        size += max(1, size // (12 if size < top else 4))
        knots.append(size)
    return knots
