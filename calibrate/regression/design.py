"""What a regression needs of rebuilt schedules: one row per step whose length is known, and its terms.

A term is a column that a coefficient multiplies. `seconds` of a row lies between two ends as clients saw them, so it
holds the step itself, the filter that ran before it and the joining of batches; a prefill that found the server idle
begins where its first request was sent, so it holds the way there and back (`u0`, `u1`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from calibrate.schedule.network_latency import latency_bounds
from calibrate.schedule.rebuild import Schedule
from calibrate.schedule.step_table import works
from calibrate.schedule.usable import usable_steps
from sim.engines.tgi_0_9_4 import Flags
from sim.model.errors import NotEnoughData
from sim.run import Run
from sim.steptime.basis import AFFINE, PADDED, columns
from sim.steptime.linear import LEVEL

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCK_SECONDS = 5.0  # what is resampled as a whole, and has a mood: short enough for ten a rung
COLD_CACHE = "w0"  # what a decode step takes longer the sooner it follows a prefill; a forecast has the average of it
_WARM = 4.0  # decode steps: within so many the caches hold again what a prefill has driven out of them
_CONTINUED = 2.0 * Flags().max_concurrent_requests  # sequences: more than routers let in


@dataclass(frozen=True)
class Rows:
    """The steps of some runs whose lengths are known. `rung` and `block` number them over all runs; `run` is which.

    `way` bounds the way to the server (`latency_bounds`).
    """

    table: pd.DataFrame
    seconds: Floats
    prefill: NDArray[np.bool_]
    run: Ints
    rung: Ints
    block: Ints
    warnings: list[str]
    way: tuple[float, float] | None = None

    @property
    def longest(self) -> Floats:
        """The longest prompt of a prefill, the longest context of a decode step, tokens."""
        return np.asarray((self.table["prefill_longest"] + self.table["decode_longest"]).to_numpy(np.float64))

    @property
    def rung_of_block(self) -> Ints:
        """The rung in which each block lies; ascending, as the runs of rungs are."""
        return self.rung[np.unique(self.block, return_index=True)[1]]

    @property
    def run_of_block(self) -> Ints:
        """The run in which each block lies."""
        return self.run[np.unique(self.block, return_index=True)[1]]


def build_rows(runs: Sequence[Run], schedules: Sequence[Schedule]) -> Rows:
    """The usable steps of all runs.

    `NotEnoughData` where no decode step is left.
    """
    warnings: list[str] = []
    tables = []
    for number, (run, schedule) in enumerate(zip(runs, schedules, strict=True)):
        steps = schedule.steps.drop(columns="members")
        idle = ~steps["seen"] & (steps["kind"] == "prefill") & (steps["start"] > steps["end"].shift(fill_value=np.inf))
        usable = usable_steps(run, steps, idle, warnings)
        tables.append(steps[usable].assign(idle=idle[usable], run=number))
    table = pd.concat(tables, ignore_index=True)
    if not (table["kind"] == "decode").any():
        raise NotEnoughData(
            f"{', '.join(run.name for run in runs)}: no load to be fitted shows a decode step from end to end"
        )
    rung = _numbered(table["run"].to_numpy(), table["rung"].to_numpy())
    block = _numbered(rung, (table["end"].to_numpy() // BLOCK_SECONDS).astype(np.int64))
    return Rows(
        table=table,
        seconds=table["seconds"].to_numpy(np.float64),
        prefill=(table["kind"] == "prefill").to_numpy(),
        run=table["run"].to_numpy(),
        rung=rung,
        block=block,
        warnings=warnings,
        way=latency_bounds(runs, schedules),
    )


def _numbered(*keys: Ints) -> Ints:
    """0, 1, … for every distinct tuple of keys."""
    index = np.unique(np.stack(keys), axis=1, return_inverse=True)[1]
    return np.asarray(index, dtype=np.int64).reshape(-1)


# How the level of a decode step grows with its batch besides linearly: it flattens, as kernels use a processor better
# the more rows they have, and from some size on all of it.
TREND: dict[str, Callable[[Floats], Floats]] = {
    "bs": lambda n: np.asarray(np.sqrt(n)),
    "bt": lambda n: np.asarray(-np.expm1((1.0 - n) / 4.0)),
}


def terms(rows: Rows, padded: bool) -> dict[str, Floats]:
    """What each coefficient multiplies, (rows,): the terms of `sim.steptime.basis`, and those of a regression alone,
    `TREND`, `u0` and `u1` (network latency of a prefill on an idle server) and `COLD_CACHE`, whose mean is 0."""
    t, decode = rows.table, (~rows.prefill).astype(np.float64)
    n, idle = t["sequences"].to_numpy(np.float64), t["idle"].to_numpy(np.float64)
    fresh = np.exp(-t["since"].to_numpy(np.float64) / _WARM) * decode
    if np.ptp(fresh[~rows.prefill]) > 0:  # or all steps follow their prefill at one distance, and nothing tells
        fresh -= decode * np.average(fresh, weights=decode)
    else:
        fresh[:] = 0.0
    trend = {name: decode * curve(n) for name, curve in TREND.items()}
    of_client = {"u0": idle, "u1": idle * rows.longest}
    return columns(PADDED if padded else AFFINE, *works(t)) | trend | of_client | {COLD_CACHE: fresh}


def level_terms(rows: Rows, knots: Sequence[int]) -> dict[str, Floats]:
    """For every knot the share of a decode step's level that it holds: hats between knots, flat beyond them."""
    n = rows.table["sequences"].to_numpy(np.float64)
    decode = (~rows.prefill).astype(np.float64)
    hats = np.eye(len(knots))
    return {f"{LEVEL}{k}": decode * np.interp(n, knots, hats[i]) for i, k in enumerate(knots)}


def level_knots(rows: Rows) -> list[int]:
    """Batch sizes with a level of their own: all small ones, then ever fewer to half as many again as were seen, and a
    few beyond, since a trend that flattens is not continued by a line."""
    top = 1.5 * float(rows.table["sequences"].to_numpy()[~rows.prefill].max())
    knots, size = [1], 1
    while size < max(top, _CONTINUED):
        size += max(1, size // (12 if size < top else 4))
        knots.append(size)
    return knots
