"""Joint draws of the coefficients: what other stretches of the same machine's time would have given.

Blocks of seconds, within rungs, are reweighted at random (the Bayesian bootstrap of Rubin 1981, on blocks because steps
resemble their neighbours; leaving blocks out would delete batch sizes). On top of that the machine of another day: a
factor for every rung and one for every run, for prefills and decode steps apart, since one run sees only one day. And
every draw takes its own sample of the prior, so that what the data leave open is scattered over and not chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calibrate.regress import Regression
from calibrate.rows import Rows

Floats = NDArray[np.float64]

DRAWS = 200
LEAST = 0.5  # of its drift: a machine is no more like itself at another load, or on another day, than that


class Moods(NamedTuple):
    """Relative standard deviations of a machine's speed, (prefill, decode), between rungs of a run and between runs."""

    rung: Floats
    run: Floats


def moods(rows: Rows, predicted: Floats, drift: float) -> Moods:
    """How far rungs, and runs, are from the fit, beyond what their blocks make likely; `drift` is that within rungs."""
    rung_sd, run_sd = np.zeros(2), np.zeros(2)
    for kind, of in enumerate((rows.prefill, ~rows.prefill)):
        if not of.any():
            continue
        factor = (rows.seconds / predicted)[of]
        # a batch size seen at one load only has that load's mood in its level, where no residual shows it
        rung_sd[kind] = max(_beyond(factor, rows.rung[of], rows.block[of]), LEAST * drift)
        apart = _beyond(factor, rows.run[of], rows.rung[of]) if len(np.unique(rows.run[of])) > 1 else 0.0
        run_sd[kind] = max(apart, rung_sd[kind])
    return Moods(rung_sd, run_sd)


def _beyond(factor: Floats, group: NDArray[np.int64], within: NDArray[np.int64]) -> float:
    """The standard deviation of group means that the spread of the smaller groups within them does not explain."""
    small = np.unique(within, return_inverse=True)[1]
    count = np.bincount(small)
    means = np.bincount(small, weights=factor) / count
    of = np.zeros(len(count), dtype=np.int64)
    of[small] = np.unique(group, return_inverse=True)[1]
    groups = int(of.max()) + 1
    if groups < 2:
        return 0.0
    weight = np.bincount(of, weights=count)
    centre = np.bincount(of, weights=means * count) / weight
    parts = np.bincount(of)
    around = np.bincount(of, weights=count * (means - centre[of]) ** 2) / weight / np.maximum(parts - 1, 1)
    total = float(np.mean((centre - np.mean(centre)) ** 2) * groups / (groups - 1))
    return float(np.sqrt(max(0.0, total - float(around.mean()))))


def draw_coefficients(
    regression: Regression, rows: Rows, spread: Moods, rng: np.random.Generator, n: int = DRAWS
) -> Floats:
    """`n` joint draws of the coefficients, shape (n, coefficients)."""
    grams, rights = regression.grams, regression.rights
    blocks = len(grams)
    rung_of, run_of = np.zeros(blocks, dtype=np.int64), np.zeros(blocks, dtype=np.int64)
    rung_of[rows.block], run_of[rows.block] = rows.rung, rows.run
    drawn = np.empty((n, len(regression.names)))
    for i in range(n):
        weight = rng.exponential(size=blocks)
        day = 1 + spread.run * rng.standard_normal((int(run_of.max()) + 1, 2))
        hour = 1 + spread.rung * rng.standard_normal((int(rung_of.max()) + 1, 2))
        mood = weight[:, None] * (day[run_of] * hour[rung_of])
        right = np.einsum("bk,bkp->p", mood, rights)
        drawn[i] = regression.solve(np.tensordot(weight, grams, axes=1), right, rng)
    return drawn
