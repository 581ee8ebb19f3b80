"""Variance components of a machine's speed, by restricted maximum likelihood.

Residuals averaged over intervals of seconds are step noise plus random effects: a drift (an Ornstein-Uhlenbeck
process), an effect of the rung and an effect of the run. Their standard deviations maximise the likelihood of the
averages with the coefficients integrated out (Patterson and Thompson 1971), because a form with a time for every batch
size absorbs much of the drift.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import minimize

from calibrate.arrays import Bools, Floats, Ints
from calibrate.regression.design import BLOCK_SECONDS, Rows
from calibrate.regression.fit import Regression, design
from calibrate.regression.random_effects import RandomEffects
from sim.steptime.noise_parameters import MOST_SKEWED

EFFECT_SCALE = 0.5  # of the drift's: scale of the half-t prior of the sd of rungs' and runs' effects,
EFFECT_DEGREES = 4.0  # and its degrees of freedom: heavy tails, finite variance (Gelman 2006)
MOST_INTERVALS = 400  # in the likelihood at most; longer runs have longer ones
LEAST_INTERVALS = 40  # at least; short runs have shorter ones, down to a fifth of a block (1 s)
DRIFT_SECONDS = (
    1.0,
    600.0,
)  # s: a drift that forgets itself sooner is noise of steps, and one that does later is a day's
SHARE_SPREAD = 0.5  # prior sd, around 1, of the share of a random effect that prefills take
DRIFT_SCALE = 0.05  # scale of the half-normal prior of the sd of drift and run effect; a shared core had 0.06
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


def fit_random_effects(regression: Regression, rows: Rows) -> RandomEffects:
    """The random effects behind `rows`; where they are too few, a run effect of `DEFAULT_RUN_EFFECT` and no other.

    Drift, its correlation time and the inflation of step noise are the mode of likelihood times prior. The effects of
    rungs and runs are few, and the mode of their standard deviations is often 0: their variances are posterior means,
    given the mode of the others.
    """
    prefill, decode = (_block_deviations(regression, rows, of) for of in (rows.prefill, ~rows.prefill))
    share = _prefill_share(prefill, decode)
    intervals = _intervals(regression, rows, share)
    if len(intervals.residual) < _ENOUGH:
        return RandomEffects(run=DEFAULT_RUN_EFFECT)
    precision = regression.prior.rows.T @ regression.prior.rows
    # the effect of one run, or of one of two rungs, cannot be told from the speed of the machine
    several = len(set(intervals.rung.tolist())) > 2, len(set(intervals.run.tolist())) > 1
    free = np.array([True, True, *several, True])

    def all_of(some: Floats) -> Floats:
        logs = np.where(free, _START, np.log(_NONE))
        logs[free] = some
        return logs

    def unlikely(some: Floats) -> float:
        return -_log_likelihood(all_of(some), intervals, precision) - _log_prior(all_of(some))

    found = minimize(
        unlikely,
        _START[free],
        method="Nelder-Mead",
        options={"maxiter": 300, "xatol": 0.02, "fatol": 0.01},
    )
    mode = all_of(found.x)
    drift, seconds = np.exp(mode[:2]).tolist()
    of_rung, of_run = _posterior_sd(mode, several, intervals, precision)
    return RandomEffects(
        drift, float(np.clip(seconds, *DRIFT_SECONDS)), of_rung, of_run, share, _skewness(decode, rows)
    )


def _posterior_sd(
    mode: Floats, several: tuple[bool, bool], intervals: _Intervals, precision: Floats
) -> tuple[float, float]:
    """The root of the posterior mean of the variance of rungs' and of runs' effects, given the `mode` of the others; of
    the prior alone where there are not `several`."""
    sizes = np.exp(mode[0]) * _RATIOS
    evaluated = [sizes if known else np.array([_NONE]) for known in several]
    likelihood = np.array(
        [
            [
                _log_likelihood(np.array([*mode[:2], rung, run, mode[4]]), intervals, precision)
                for run in np.log(evaluated[1])
            ]
            for rung in np.log(evaluated[0])
        ]
    )
    prior = np.log(sizes) + _log_half_t(_RATIOS)  # a density over the logarithm, in which the grid is even
    density = np.exp(likelihood - likelihood.max() + prior[:, None] + prior[None, :])
    density /= density.sum()
    of_rung, of_run = (density.sum(axis=other) @ sizes**2 for other in (1, 0))
    return float(np.sqrt(of_rung)), float(np.sqrt(of_run))


def _log_likelihood(logs: Floats, intervals: _Intervals, precision: Floats) -> float:
    """The restricted log-likelihood of standard deviations given as the logarithms that `_START` lists; `precision` is
    the prior precision of the coefficients."""
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
    determinants = float(np.log(np.diag(lower)).sum()) + 0.5 * float(np.linalg.slogdet(gram)[1])
    return -(determinants + 0.5 * misfit)


def _log_prior(logs: Floats) -> float:
    """The logarithm of the prior of the components that `_START` lists, for their mode: an effect that coefficients
    explain as well is none, and a flat direction is bounded."""
    return -0.5 * float(np.exp(2 * logs[[0, 3]]).sum()) / DRIFT_SCALE**2 - 1e-3 * float(((logs - _START) ** 2).sum())


def _log_half_t(ratios: Floats) -> Floats:
    """The logarithm, up to a constant, of the prior density of effects' standard deviations over the drift's."""
    return np.asarray(-(EFFECT_DEGREES + 1) / 2 * np.log1p((ratios / EFFECT_SCALE) ** 2 / EFFECT_DEGREES))


# drift, its seconds, rung, run, and by how much the noise of steps exceeds that of independent ones
_START = np.log([0.03, 10.0, EFFECT_SCALE * 0.03, EFFECT_SCALE * 0.03, 1.0])
_RATIOS = np.geomspace(0.02, 20.0, 13)  # of effects' sd over the drift's, where their posterior is evaluated


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
