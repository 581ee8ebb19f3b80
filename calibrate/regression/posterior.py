"""Joint draws of the coefficients.

Each draw weights blocks of seconds at random (Bayesian bootstrap: Rubin 1981; blocks, because steps resemble their
neighbours; weights, because leaving blocks out would delete batch sizes). It multiplies the durations of every rung and
every run by a random effect, of which prefills take their share, because one run shows only one day. And it adds noise
to the targets of the prior, so that draws spread over what the data leave open. Admission timings are treated as the
prior is.
"""

from __future__ import annotations

import numpy as np
from scipy.special import log_ndtr

from calibrate.arrays import Floats
from calibrate.regression.design import Rows
from calibrate.regression.fit import Regression

DRAWS = 200


def draw_coefficients(regression: Regression, rows: Rows, rng: np.random.Generator, n: int = DRAWS) -> Floats:
    """`n` joint draws of the coefficients, (n, coefficients); the second half is antithetic to the first."""
    equations, effects = regression.equations, regression.effects
    rung_of, run_of = equations.rung, rows.run_of_block
    rung_sd = np.sqrt(equations.rung_variance)
    share = np.array([effects.prefill, 1.0])
    sizes = len(rung_of), int(run_of[-1]) + 1, len(rung_sd), len(regression.prior.target)
    scores = antithetic_normals(rng, n, sum(sizes))
    drawn = np.empty((n, len(regression.names)))
    for i, score in enumerate(scores):
        blocks, of_run, of_rung, noise = np.split(score, np.cumsum(sizes[:-1]))
        weight = -log_ndtr(blocks)  # exponential
        slower = 1 + np.outer((effects.run * of_run)[run_of], share)
        slower *= 1 + np.outer((rung_sd * of_rung)[rung_of], share)
        drawn[i] = regression.solve(weight, slower, noise)
    return drawn


def antithetic_normals(rng: np.random.Generator, n: int, size: int) -> Floats:
    """`n` draws of `size` standard normal scores, (n, size); the second half are the negatives of the first, so that
    the median of anything linear in them is exact."""
    half = rng.standard_normal(((n + 1) // 2, size))
    return np.concatenate([half, -half])[:n]
