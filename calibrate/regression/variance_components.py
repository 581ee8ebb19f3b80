"""How large a machine's moods are: what a fit leaves over tells.

What it leaves over, averaged over blocks of seconds, is noise of single steps plus the machine's mood. The mood is
taken for the sum of a drift that forgets itself (an Ornstein-Uhlenbeck process), of what a whole rung keeps, and of
what a whole run keeps. Their sizes make the blocks most likely once the fit has had its share: restricted
maximum likelihood (Patterson and Thompson 1971), since a form with a time for every batch size follows many a mood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import minimize

from calibrate.regression.design import BLOCK_SECONDS, Rows
from calibrate.regression.fit import Regression, design
from calibrate.regression.random_effects import RandomEffects
from sim.model.calibration import MOST_SKEWED
from sim.run import Run

Floats = NDArray[np.float64]

LEAST_RATIO = (
    0.5  # of its drift: unless repeated, a day, or one of two loads, is taken to be no more like itself than that
)
BLOCKS = 400  # that the likelihood looks at, at the most: longer runs are seen in longer ones
FEWEST = 40  # that it should have: short runs are seen in shorter ones, down to a fifth (1 s)
DRIFT_SECONDS = (
    1.0,
    600.0,
)  # s: a drift that forgets itself sooner is noise of steps, and one that does later is a day's
SHARE_SPREAD = 0.5  # of what prefills feel of a mood around all of it, before anything was measured
USUAL = 0.05  # believed of drift and of days: about that or less (0.06 on a shared machine's core)
UNLIKE = (
    2.0  # in ln: how far a rung's effect may exceed `LEAST_RATIO` of the drift where coefficients explain it as well
)
_TOGETHER = 2.0  # blocks that follow one another tell about as much as one
DEFAULT_RUN_EFFECT = 0.02  # of a day, where nothing can be told
_ENOUGH = 8  # blocks below which that is so
_NONE = 1e-5  # what a deviation starts from, and counts as nothing below


class _Stretches(NamedTuple):
    """Stretches of time, one element each: how far the fit is `off`, relative; the variance of that which is noise of
    single steps (`noise`); what the fit's coefficients can do about it (`matrix`, (stretches, coefficients)); how much
    of a mood it feels (`feels`); and when (s), in which rung and in which run each was."""

    off: Floats
    noise: Floats
    matrix: Floats
    feels: Floats
    time: Floats
    rung: NDArray[np.int64]
    run: NDArray[np.int64]


def fit_random_effects(regression: Regression, rows: Rows, runs: Sequence[Run]) -> RandomEffects:
    """The moods behind `rows`; where they are too few to tell, a day of its own that nothing else is known of."""
    prefill, decode = (_slow(regression, rows, of) for of in (rows.prefill, ~rows.prefill))
    share = _prefill_share(prefill, decode)
    stretches = _stretches(regression, rows, share)
    if len(stretches.off) < _ENOUGH:
        return RandomEffects(run=DEFAULT_RUN_EFFECT)
    days = [runs[i].scenario.workload for i in np.unique(stretches.run).tolist()]
    repeated = len(set(days)) < len(days)
    beliefs = regression.prior.rows.T @ regression.prior.rows
    several = len(set(stretches.rung.tolist())) > 2
    free = np.array([True, True, several, repeated, True])

    def all_of(some: Floats) -> Floats:
        logs = np.where(free, _START, np.log(_NONE))
        logs[free] = some
        return logs

    def unlikely(some: Floats) -> float:
        logs = all_of(some)
        beyond = max(float(logs[2] - logs[0] - np.log(LEAST_RATIO)), 0.0) / UNLIKE
        return 0.5 * beyond**2 - _log_likelihood(logs, stretches, beliefs)

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


def _log_likelihood(logs: Floats, stretches: _Stretches, beliefs: Floats) -> float:
    """The restricted log-likelihood of moods, the logarithms of what `_START` has; `beliefs` is the precision of the
    coefficients before anything was measured."""
    drift, seconds, of_rung, of_run, inflation = np.exp(logs)
    apart = np.abs(np.subtract.outer(stretches.time, stretches.time)) / np.clip(seconds, *DRIFT_SECONDS)
    same_run, same_rung = (np.equal.outer(x, x) for x in (stretches.run, stretches.rung))
    covariance = drift**2 * np.exp(-apart) * same_run + of_rung**2 * same_rung + of_run**2 * same_run
    covariance *= np.outer(stretches.feels, stretches.feels)
    # a machine without noise leaves a matrix of zeros, one of everlasting moods a matrix of ones
    nugget = _NONE**2 + 1e-8 * (drift**2 + of_rung**2 + of_run**2)
    covariance[np.diag_indices_from(covariance)] += inflation * stretches.noise + nugget
    lower = np.linalg.cholesky(covariance)
    both = np.column_stack([stretches.matrix, stretches.off])
    whitened = solve_triangular(lower, both, lower=True, check_finite=False)
    x, y = whitened[:, :-1], whitened[:, -1]
    gram = x.T @ x + beliefs
    gram[np.diag_indices_from(gram)] = np.maximum(np.diag(gram), 1e-12) * (1 + 1e-9)  # of some nothing is told
    explained = x.T @ y
    misfit = float(y @ y - explained @ np.linalg.solve(gram, explained))
    # a flat direction is not followed to its end, and what coefficients could explain as well is no mood
    far = 1e-3 * float(((logs - _START) ** 2).sum()) + 0.5 * float(drift**2 + of_run**2) / USUAL**2
    determinants = float(np.log(np.diag(lower)).sum()) + 0.5 * float(np.linalg.slogdet(gram)[1])
    return -(determinants + 0.5 * misfit + far)


# drift, its seconds, rung, run, and by how much the noise of steps exceeds that of independent ones
_START = np.log([0.03, 10.0, LEAST_RATIO * 0.03, 0.02, 1.0])


def _prefill_share(prefills: tuple[Floats, Floats], decodes: tuple[Floats, Floats]) -> float:
    """How much of a mood that its decode steps show a stretch's prefills feel: the slope of the one's deviations from
    its rung over the other's (`_slow`), whose own noise is taken off; believed to be about 1."""
    (prefill, noise), (decode, others) = prefills, decodes
    known = np.isfinite(prefill + decode) & (noise > 0)
    weight, belief = 1.0 / noise[known], SHARE_SPREAD**-2
    together = float((weight * prefill[known] * decode[known]).sum())
    moved = max(float((weight * (decode[known] ** 2 - others[known])).sum()), 0.0)
    return float(np.clip((together + belief) / (moved + belief), 0.0, 2.0))


def _skewness(decodes: tuple[Floats, Floats], rows: Rows) -> float:
    """The skewness of the logarithm of the drift, from what decode steps show of it (`_slow`); believed to be none."""
    rung = rows.rung_of_block
    known = np.isfinite(decodes[0])
    logs, noise = np.log1p(decodes[0][known]), float(decodes[1][known].mean())
    count = np.bincount(rung[known])
    away = logs - (np.bincount(rung[known], weights=logs) / np.maximum(count, 1))[rung[known]]
    n = count[count > 2].astype(np.float64)  # two blocks of a rung lie evenly around their mean
    away = away[count[rung[known]] > 2]
    if not len(n):
        return 0.0
    whole = float((away**2).sum() / (n - 1).sum())
    slow = whole - noise
    if slow <= 0.0:
        return 0.0
    skewness = float((away**3).sum() / ((n - 1) * (n - 2) / n).sum()) / slow**1.5
    chance = _TOGETHER * 6 / float((n - 1).sum()) * (whole / slow) ** 3
    return float(np.clip(skewness / (1 + chance), -MOST_SKEWED, MOST_SKEWED))


def _slow(regression: Regression, rows: Rows, of: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """How far steps of one kind are from those of their rung as a whole, relative, block by block (NaN: there are
    none), and the variance of that which is noise of single steps."""
    predicted, block, rung = regression.predicted[of], rows.block[of], rows.rung[of]
    blocks = int(rows.block.max()) + 1
    whole = np.bincount(rung, weights=predicted)
    predicted = predicted * (np.bincount(rung, weights=rows.seconds[of]) / np.maximum(whole, 1e-12))[rung]
    total = np.bincount(block, weights=predicted, minlength=blocks)
    off = rows.seconds[of] / predicted - 1
    with np.errstate(invalid="ignore"):
        mood = np.bincount(block, weights=off * predicted, minlength=blocks) / total
        single = _single(off - mood[block], block, np.ones(len(block), dtype=bool))
        noise = np.bincount(block, weights=single * predicted**2, minlength=blocks) / total**2
    return mood, noise


def _stretches(regression: Regression, rows: Rows, share: float) -> _Stretches:
    cell, predicted = _cells(rows), regression.predicted
    total = np.bincount(cell, weights=predicted)
    seen = total > 0

    def summed(values: Floats) -> Floats:
        return np.asarray((np.bincount(cell, weights=values) / np.maximum(total, 1e-12))[seen])

    off = summed(rows.seconds - predicted)
    alone = rows.seconds - predicted * (1 + _filled(off, seen)[cell])  # without the mood of its stretch
    noise = summed(_single(alone / predicted, cell, rows.prefill) * predicted**2) / total[seen]
    columns = design(rows, regression.form, regression.names).T
    first = np.unique(cell, return_index=True)[1]
    return _Stretches(
        off=off,
        noise=noise,
        matrix=np.stack([summed(column) for column in columns], axis=1),
        feels=summed(predicted * np.where(rows.prefill, share, 1.0)),
        time=rows.table["end"].to_numpy()[first],
        rung=rows.rung[first],
        run=rows.run[first],
    )


def _single(alone: Floats, block: NDArray[np.int64], prefill: NDArray[np.bool_]) -> Floats:
    """The variance of a single step of each row's kind, relative, from how far rows are from the rest of their stretch.

    All stretches share one: one of a few steps does not know its own, and one of a single step would count as certain.
    """
    count = np.bincount(block)[block]
    several = count > 1
    variance = np.zeros(len(alone))
    for kind in (True, False):
        of = (prefill == kind) & several
        if of.any():
            variance[prefill == kind] = float((alone[of] ** 2 * count[of] / (count[of] - 1)).mean())
    return variance


def _cells(rows: Rows) -> NDArray[np.int64]:
    """The stretch of time in which every row lies: its block, several of them, or a part of it."""
    blocks = int(rows.block.max()) + 1
    if blocks > BLOCKS:
        return rows.block // (blocks // BLOCKS + 1)
    parts = min(5, -(-FEWEST // blocks))
    within = rows.table["end"].to_numpy() / BLOCK_SECONDS % 1.0
    return rows.block * parts + (within * parts).astype(np.int64)


def _filled(values: Floats, at: NDArray[np.bool_]) -> Floats:
    """The values spread over the places that `at` marks, zero elsewhere."""
    full = np.zeros(len(at))
    full[at] = values
    return full
