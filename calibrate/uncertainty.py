"""Joint draws of the coefficients: what other stretches of the same machine's time would have given.

Blocks of seconds, within rungs, are reweighted at random (the Bayesian bootstrap of Rubin 1981, on blocks because steps
resemble their neighbours; leaving blocks out would delete batch sizes). On top of that the machine of another day: a
factor for every rung and one for every run, for prefills and decode steps apart, since one run sees only one day. And
every draw takes its own sample of the prior, so that what the data leave open is scattered over and not chosen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibrate.moods import Moods
from calibrate.regress import Regression
from calibrate.rows import BLOCK_SECONDS, Rows

Floats = NDArray[np.float64]

DRAWS = 200


def draw_coefficients(
    regression: Regression, rows: Rows, moods: Moods, rng: np.random.Generator, n: int = DRAWS
) -> Floats:
    """`n` joint draws of the coefficients, shape (n, coefficients)."""
    rung_of, run_of = rows.rung_of_block, rows.run_of_block
    blocks, rungs, runs = len(rung_of), int(rung_of[-1]) + 1, int(run_of[-1]) + 1
    in_a_rung = blocks / rungs
    keeps = moods.of_a_rung(in_a_rung * BLOCK_SECONDS, in_a_rung)
    feels = np.array([moods.prefill, 1.0])
    drawn = np.empty((n, len(regression.names)))
    for i in range(n):
        weight = rng.exponential(size=blocks)
        day = 1 + moods.run * feels * rng.standard_normal((runs, 2))
        hour = 1 + keeps * feels * rng.standard_normal((rungs, 2))
        drawn[i] = regression.solve(weight, day[run_of] * hour[rung_of], rng)
    return drawn
