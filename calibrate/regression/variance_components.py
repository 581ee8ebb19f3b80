"""Variance components of a machine's speed, by restricted maximum likelihood.

Residuals averaged over intervals of seconds are step noise plus random effects: a drift (an Ornstein-Uhlenbeck
process), an effect of the rung and an effect of the run. Their standard deviations maximise the likelihood of the
averages with the coefficients integrated out (Patterson and Thompson 1971), because a form with a time for every batch
size absorbs much of the drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import minimize

from calibrate.arrays import Bools, Floats, Ints
from calibrate.regression.design import BLOCK_SECONDS, Rows
from calibrate.regression.fit import Regression, design
from calibrate.regression.random_effects import RandomEffects
from sim.run import Run
from sim.steptime.noise_parameters import MOST_SKEWED

LEAST_RATIO = 0.5  # of the drift: the effect of a run, or of one of two rungs, that is assumed without a repetition
MOST_INTERVALS = 400  # in the likelihood at most; longer runs have longer ones
LEAST_INTERVALS = 40  # at least; short runs have shorter ones, down to a fifth of a block (1 s)
DRIFT_SECONDS = (
    1.0,
    600.0,
)  # s: a drift that forgets itself sooner is noise of steps, and one that does later is a day's
SHARE_SPREAD = 0.5  # prior sd, around 1, of the share of a random effect that prefills take
EFFECT_SCALE = 0.05  # prior sd of drift and run effect; 0.06 was seen on a core of a shared machine
RATIO_SPREAD = 2.0  # prior sd, in ln, of how far a rung's effect exceeds `LEAST_RATIO` of the drift
_DEPENDENT = 2.0  # so many successive blocks say about as much as one
DEFAULT_RUN_EFFECT = 0.02  # assumed where too little was measured
_ENOUGH = 8  # intervals: fewer are too little
_NONE = 1e-5  # a standard deviation that counts as none


class _Intervals(NamedTuple):
    """Intervals of time, one element each.

    `residual` is the relative error of the fit; `noise` its variance from single steps; `matrix`, (intervals,
    coefficients), what the coefficients can change of it; `exposure` the share of a random effect that applies; `time`
    (s), `rung` and `run` are when and where it was.
    """

    residual: Floats
    noise: Floats
    matrix: Floats
    exposure: Floats
    time: Floats
    rung: Ints
    run: Ints


def fit_random_effects(regression: Regression, rows: Rows, runs: Sequence[Run]) -> RandomEffects:
    """The random effects behind `rows`; where they are too few, a run effect of `DEFAULT_RUN_EFFECT` and no other."""
    prefill, decode = (_block_deviations(regression, rows, of) for of in (rows.prefill, ~rows.prefill))
    share = _prefill_share(prefill, decode)
    intervals = _intervals(regression, rows, share)
    if len(intervals.residual) < _ENOUGH:
        return RandomEffects(run=DEFAULT_RUN_EFFECT)
    workloads = [runs[i].scenario.workload for i in np.unique(intervals.run).tolist()]
    repeated = len(set(workloads)) < len(workloads)
    precision = regression.prior.rows.T @ regression.prior.rows
    several = len(set(intervals.rung.tolist())) > 2
    free = np.array([True, True, several, repeated, True])

    def all_of(some: Floats) -> Floats:
        logs = np.where(free, _START, np.log(_NONE))
        logs[free] = some
        return logs

    def unlikely(some: Floats) -> float:
        logs = all_of(some)
        beyond = max(float(logs[2] - logs[0] - np.log(LEAST_RATIO)), 0.0) / RATIO_SPREAD
        return 0.5 * beyond**2 - _log_likelihood(logs, intervals, precision)

    found = minimize(
        unlikely,
        _START[free],
        method="Nelder-Mead",
        options={"maxiter": 300, "xatol": 0.02, "fatol": 0.01},
    )
    drift, seconds, of_rung, of_run, _ = np.exp(all_of(found.x)).tolist()
    of_rung, of_run = (
        size if known else LEAST_RATIO * drift for size, known in ((of_rung, several), (of_run, repeated))
    )
    return RandomEffects(
        drift, float(np.clip(seconds, *DRIFT_SECONDS)), of_rung, of_run, share, _skewness(decode, rows)
    )


def _log_likelihood(logs: Floats, intervals: _Intervals, precision: Floats) -> float:
    """The restricted log-likelihood, with priors, of standard deviations given as the logarithms that `_START` lists;
    `precision` is the prior precision of the coefficients."""
    drift, seconds, of_rung, of_run, inflation = np.exp(logs)
    apart = np.abs(np.subtract.outer(intervals.time, intervals.time)) / np.clip(seconds, *DRIFT_SECONDS)
    same_run, same_rung = (np.equal.outer(x, x) for x in (intervals.run, intervals.rung))
    covariance = drift**2 * np.exp(-apart) * same_run + of_rung**2 * same_rung + of_run**2 * same_run
    covariance *= np.outer(intervals.exposure, intervals.exposure)
    # without it, a machine without noise gives a matrix of zeros, and one of constant effects a matrix of ones
    nugget = _NONE**2 + 1e-8 * (drift**2 + of_rung**2 + of_run**2)
    covariance[np.diag_indices_from(covariance)] += inflation * intervals.noise + nugget
    lower = np.linalg.cholesky(covariance)
    both = np.column_stack([intervals.matrix, intervals.residual])
    whitened = solve_triangular(lower, both, lower=True, check_finite=False)
    x, y = whitened[:, :-1], whitened[:, -1]
    gram = x.T @ x + precision
    gram[np.diag_indices_from(gram)] = np.maximum(np.diag(gram), 1e-12) * (1 + 1e-9)  # of some nothing is told
    explained = x.T @ y
    misfit = float(y @ y - explained @ np.linalg.solve(gram, explained))
    # priors: they bound a flat direction, and an effect that coefficients explain as well is none
    prior = 1e-3 * float(((logs - _START) ** 2).sum()) + 0.5 * float(drift**2 + of_run**2) / EFFECT_SCALE**2
    determinants = float(np.log(np.diag(lower)).sum()) + 0.5 * float(np.linalg.slogdet(gram)[1])
    return -(determinants + 0.5 * misfit + prior)


# drift, its seconds, rung, run, and by how much the noise of steps exceeds that of independent ones
_START = np.log([0.03, 10.0, LEAST_RATIO * 0.03, 0.02, 1.0])


def _prefill_share(prefills: tuple[Floats, Floats], decodes: tuple[Floats, Floats]) -> float:
    """The share of a random effect that prefills take: the slope of their deviations from the rung over those of decode
    steps (`_block_deviations`), corrected for the noise of the latter; its prior mean is 1."""
    (prefill, noise), (decode, others) = prefills, decodes
    known = np.isfinite(prefill + decode) & (noise > 0)
    weight, precision = 1.0 / noise[known], SHARE_SPREAD**-2
    together = float((weight * prefill[known] * decode[known]).sum())
    moved = max(float((weight * (decode[known] ** 2 - others[known])).sum()), 0.0)
    return float(np.clip((together + precision) / (moved + precision), 0.0, 2.0))


def _skewness(decodes: tuple[Floats, Floats], rows: Rows) -> float:
    """The skewness of the logarithm of the drift, from the block deviations of decode steps (`_block_deviations`),
    shrunk to 0."""
    rung = rows.rung_of_block
    known = np.isfinite(decodes[0])
    logs, noise = np.log1p(decodes[0][known]), float(decodes[1][known].mean())
    count = np.bincount(rung[known])
    deviation = logs - (np.bincount(rung[known], weights=logs) / np.maximum(count, 1))[rung[known]]
    n = count[count > 2].astype(np.float64)  # two blocks of a rung lie evenly around their mean
    deviation = deviation[count[rung[known]] > 2]
    if not len(n):
        return 0.0
    whole = float((deviation**2).sum() / (n - 1).sum())
    slow = whole - noise
    if slow <= 0.0:
        return 0.0
    skewness = float((deviation**3).sum() / ((n - 1) * (n - 2) / n).sum()) / slow**1.5
    chance = _DEPENDENT * 6 / float((n - 1).sum()) * (whole / slow) ** 3
    return float(np.clip(skewness / (1 + chance), -MOST_SKEWED, MOST_SKEWED))


def _block_deviations(regression: Regression, rows: Rows, of: Bools) -> tuple[Floats, Floats]:
    """The relative deviation of steps of one kind in each block from their rung's mean, (blocks,), NaN where there are
    none, and its variance from single steps."""
    predicted, block, rung = regression.predicted[of], rows.block[of], rows.rung[of]
    blocks = int(rows.block.max()) + 1
    whole = np.bincount(rung, weights=predicted)
    predicted = predicted * (np.bincount(rung, weights=rows.seconds[of]) / np.maximum(whole, 1e-12))[rung]
    total = np.bincount(block, weights=predicted, minlength=blocks)
    residual = rows.seconds[of] / predicted - 1
    with np.errstate(invalid="ignore"):
        mean = np.bincount(block, weights=residual * predicted, minlength=blocks) / total
        single = _step_variance(residual - mean[block], block, np.ones(len(block), dtype=bool))
        noise = np.bincount(block, weights=single * predicted**2, minlength=blocks) / total**2
    return mean, noise


def _intervals(regression: Regression, rows: Rows, share: float) -> _Intervals:
    """The intervals of all rows; `share` is what prefills take of a random effect."""
    cell, predicted = _cells(rows), regression.predicted
    total = np.bincount(cell, weights=predicted)
    seen = total > 0

    def summed(values: Floats) -> Floats:
        return np.asarray((np.bincount(cell, weights=values) / np.maximum(total, 1e-12))[seen])

    residual = summed(rows.seconds - predicted)
    single = rows.seconds - predicted * (1 + _filled(residual, seen)[cell])  # without the mean of its interval
    noise = summed(_step_variance(single / predicted, cell, rows.prefill) * predicted**2) / total[seen]
    columns = design(rows, regression.form, regression.names).T
    first = np.unique(cell, return_index=True)[1]
    return _Intervals(
        residual=residual,
        noise=noise,
        matrix=np.stack([summed(column) for column in columns], axis=1),
        exposure=summed(predicted * np.where(rows.prefill, share, 1.0)),
        time=rows.table["end"].to_numpy()[first],
        rung=rows.rung[first],
        run=rows.run[first],
    )


def _step_variance(single: Floats, block: Ints, prefill: Bools) -> Floats:
    """The variance of a single step of each row's kind, relative, from its deviation from the other steps of its
    interval.

    All intervals share one value per kind: one of a few steps does not know its own, and one of a single step would
    count as certain.
    """
    count = np.bincount(block)[block]
    several = count > 1
    variance = np.zeros(len(single))
    for kind in (True, False):
        of = (prefill == kind) & several
        if of.any():
            variance[prefill == kind] = float((single[of] ** 2 * count[of] / (count[of] - 1)).mean())
    return variance


def _cells(rows: Rows) -> Ints:
    """The interval in which every row lies: its block, several of them, or a part of it."""
    blocks = int(rows.block.max()) + 1
    if blocks > MOST_INTERVALS:
        return rows.block // (blocks // MOST_INTERVALS + 1)
    parts = min(5, -(-LEAST_INTERVALS // blocks))
    within = rows.table["end"].to_numpy() / BLOCK_SECONDS % 1.0
    return rows.block * parts + (within * parts).astype(np.int64)


def _filled(values: Floats, at: Bools) -> Floats:
    """The values at the places that `at` marks, zero elsewhere."""
    full = np.zeros(len(at))
    full[at] = values
    return full
