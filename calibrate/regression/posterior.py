"""Joint draws of the coefficients: what other stretches of the same machine's time would have given.

Blocks of seconds, within rungs, are reweighted at random (the Bayesian bootstrap of Rubin 1981, on blocks because steps
resemble their neighbours; leaving blocks out would delete batch sizes). On top of that the machine of another day: a
factor for every rung and one for every run, since one run sees only one day, of which prefills feel their share. And
every draw takes its own sample of the prior, so that what the data leave open is scattered over and not chosen. Who
came back in time (`admission_timings`) is sampled as the prior is, and not reweighted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from calibrate.regression.design import Rows
from calibrate.regression.fit import Regression

Floats = NDArray[np.float64]

DRAWS = 200


def draw_coefficients(regression: Regression, rows: Rows, rng: np.random.Generator, n: int = DRAWS) -> Floats:
    """`n` joint draws of the coefficients, shape (n, coefficients); each of the second half is the opposite of one of
    the first."""
    equations, moods = regression.equations, regression.moods
    rung_of, run_of = equations.rung, rows.run_of_block
    keeps = np.sqrt(equations.of_rung)
    feels = np.array([moods.prefill, 1.0])
    scores = antithetic_normals(rng, n, len(rung_of) + int(run_of[-1]) + 1 + len(keeps) + len(regression.prior.target))
    drawn = np.empty((n, len(regression.names)))
    for i, score in enumerate(scores):
        blocks, days, hours, noise = np.split(score, np.cumsum([len(rung_of), int(run_of[-1]) + 1, len(keeps)]))
        weight = -log_ndtr(blocks)  # exponential
        slower = 1 + np.outer((moods.run * days)[run_of], feels)
        slower *= 1 + np.outer((keeps * hours)[rung_of], feels)
        drawn[i] = regression.solve(weight, slower, noise)
    return drawn


def antithetic_normals(rng: np.random.Generator, n: int, size: int) -> Floats:
    """`n` draws of `size` independent standard normal scores, (n, size), the second half the negatives of the first:
    what they say of anything linear has its median where no noise would have it."""
    half = rng.standard_normal(((n + 1) // 2, size))
    return np.concatenate([half, -half])[:n]
