"""Nonnegative least squares on step durations, by normal equations per block of time (`equations`).

Errors are relative, since noise grows with the duration, and squared, since forecasts need means: medians and robust
losses of a skewed noise forecast too little. Weights come from fitted durations; those of measured ones would favour
short steps. Random effects are estimated from a first fit
without them. With them the form is selected again, because a time for every batch size would otherwise follow the
drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from calibrate.arrays import Floats
from calibrate.regression.design import BLOCK_SECONDS, COLD_CACHE, Rows, level_knots, level_terms, terms
from calibrate.regression.equations import Equations, equations
from calibrate.regression.priors import Prior, prior_for
from calibrate.regression.random_effects import NO_EFFECTS, RandomEffects
from calibrate.schedule.admission_timing import admission_rows
from sim.steptime.linear import LEVEL

_PASSES = 10  # of reweighting: after six, batch sizes that were seen rarely were still 2 % off


@dataclass(frozen=True)
class Form:
    """A candidate form: the name of a `sim.steptime.linear` model and the terms in it."""

    model: str
    terms: tuple[str, ...]

    @property
    def padded(self) -> bool:
        """Whether every row is padded to the longest."""
        return self.model in ("padded", "levels")

    @property
    def by_batch(self) -> bool:
        """Whether every batch size has a time of its own."""
        return self.model.endswith("levels")


@dataclass(frozen=True)
class Regression:
    """A fitted form; `predicted`, (rows,), is the duration that a calibration forecasts for each row, s."""

    form: Form
    names: tuple[str, ...]
    prior: Prior
    coefficients: Floats
    predicted: Floats
    equations: Equations
    effects: RandomEffects

    def solve(self, weight: Floats, slower: Floats | None = None, noise: Floats | None = None) -> Floats:
        """Coefficients from the prior and the blocks, weighted and slowed as in `Equations.reduced`; `noise`, (k,), is
        added to the k targets of the prior."""
        return _solve(*self.equations.reduced(weight, slower), self.prior, noise)


def regress(rows: Rows, form: Form, admissions: pd.DataFrame, effects: RandomEffects = NO_EFFECTS) -> Regression:
    """Fit a form to all rows and to the admission timings, given the random effects."""
    names = tuple(name for name in terms(rows, form.model) if name in form.terms)
    if form.by_batch:
        names += tuple(f"{LEVEL}{size}" for size in level_knots(rows))
    matrix = design(rows, form, names)
    known = prior = prior_for(names, rows, form.padded)
    y, block = rows.seconds, rows.block
    group = pd.DataFrame({"p": rows.prefill, "n": rows.table["sequences"], "r": rows.rung, "y": y})
    predicted = group.groupby(["p", "n", "r"])["y"].transform("mean").to_numpy(np.float64)
    everything = np.ones(int(block.max()) + 1)
    exposure = np.where(rows.prefill, effects.prefill, 1.0)
    variance = effects.block_sd(BLOCK_SECONDS) ** 2 + effects.between**2
    effect = np.zeros(len(everything))  # of each block
    left = np.zeros(len(everything))  # the variance that this estimate leaves
    for _ in range(_PASSES):
        weight, spread = _weight(y / predicted - 1 - exposure * effect[block], exposure**2 * left[block], rows)
        seen = equations(rows, matrix, weight / predicted, predicted * exposure, effects)
        coefficients = _solve(*seen.reduced(everything), prior)
        predicted = np.maximum(matrix @ coefficients, 1e-6)
        prior = known.extended(*admission_rows(admissions, names, coefficients, spread))
        left[:] = variance / (1 + variance * np.bincount(block, weights=(weight * exposure) ** 2))
        effect[:] = left * np.bincount(block, weights=weight**2 * exposure * (y / predicted - 1))
    forecast = np.maximum(matrix @ _forecast(names, coefficients), 1e-6)
    return Regression(form, names, prior, coefficients, forecast, seen, effects)


def _forecast(names: Sequence[str], coefficients: Floats) -> Floats:
    """The coefficients of a calibration: the cold-cache term at its mean, 0."""
    return np.where(np.array(names) == COLD_CACHE, 0.0, coefficients)


def _weight(residual: Floats, unsure: Floats, rows: Rows) -> tuple[Floats, float]:
    """The weight of every row, and the relative standard deviation of decode steps.

    A row weighs less the more rows of its kind vary and the more they resemble others of their block. `residual`,
    (rows,), is the relative error without the estimated effect of the block, `unsure`, (rows,), the variance of that
    estimate.
    """
    weight, spread = np.empty(len(residual)), {}
    for kind in (True, False):
        of = rows.prefill == kind
        if not of.any():
            continue
        error = residual[of]
        spread[kind] = max(float(np.sqrt((error**2 + unsure[of]).mean())), 1e-4)
        clusters = np.bincount(rows.block[of], weights=error)
        inflation = max(1.0, float((clusters**2).sum() / max((error**2).sum(), 1e-12)))
        weight[of] = 1 / (spread[kind] * np.sqrt(inflation))
    return weight, spread[False]


def design(rows: Rows, form: Form, names: Sequence[str]) -> Floats:
    """The design matrix of the named coefficients, (rows, names)."""
    knots = [int(name.removeprefix(LEVEL)) for name in names if name.startswith(LEVEL)]
    columns = terms(rows, form.model) | level_terms(rows, knots)
    return np.stack([columns[name] for name in names], axis=1)


def _solve(gram: Floats, right: Floats, prior: Prior, noise: Floats | None = None) -> Floats:
    """argmin over x ≥ floor of xᵀGx − 2rᵀx + |prior.rows·x − (prior.target + noise)|²."""
    target = prior.target if noise is None else prior.target + noise
    floor = prior.floor
    full = gram + prior.rows.T @ prior.rows
    wanted = right + prior.rows.T @ target - full @ floor
    size = np.sqrt(np.maximum(np.diag(full), 1e-300))
    seen = np.diag(full) > 0
    scaled = (full / np.outer(size, size))[np.ix_(seen, seen)]
    scaled[np.diag_indices_from(scaled)] += 1e-10  # collinear columns must not stop the factorisation
    lower = np.linalg.cholesky(scaled)
    found = np.zeros(len(floor))
    found[seen] = nnls(lower.T, np.linalg.solve(lower, (wanted / size)[seen]))[0]
    return np.asarray(found / size + floor, dtype=np.float64)


def rung_errors(regression: Regression, rows: Rows) -> dict[int, float]:
    """The relative error at each rung of the form fitted to all others: Σ over kinds and batch sizes of |Σ (fit − y)|,
    over Σ y.

    The prior stays the same, and with it the admission timings of that rung, which bound the filter and the network
    latency but hardly a step.
    """
    matrix = design(rows, regression.form, regression.names)
    missed = {}
    for rung in np.unique(rows.rung).tolist():
        x = regression.solve((rows.rung_of_block != rung).astype(np.float64))
        here = rows.rung == rung
        error = matrix[here] @ _forecast(regression.names, x) - rows.seconds[here]
        key = rows.table["sequences"].to_numpy()[here] * 2 + rows.prefill[here]
        missed[rung] = float(np.abs(np.bincount(key, weights=error)).sum() / rows.seconds[here].sum())
    return missed


def choose(
    rows: Rows, forms: list[Form], admissions: pd.DataFrame, effects: RandomEffects = NO_EFFECTS
) -> tuple[Regression, str]:
    """The simplest form within one standard error of the best, leaving out one rung at a time; and a sentence on it."""
    fitted = [regress(rows, form, admissions, effects) for form in forms]
    rungs = len(np.unique(rows.rung))
    if rungs < 3:
        return fitted[0], f"{forms[0].model}: too few loads to choose between forms"
    errors = np.array([list(rung_errors(r, rows).values()) for r in fitted])
    mean = errors.mean(axis=1)
    best = int(np.argmin(mean))
    # standard error of the best one's error (Breiman et al.): that of the differences is smaller, since forms err at
    # the same rungs for the same reason, and would select a time for every batch size that follows the drift
    margin = errors[best].std(ddof=1) / np.sqrt(rungs)
    chosen = next(i for i in range(len(forms)) if mean[i] <= mean[best] + margin)
    said = "; ".join(f"{_name(r.form)} {m:.1%}" for r, m in zip(fitted, mean, strict=True))
    return fitted[chosen], f"error at loads left out: {said}; chosen: {_name(forms[chosen])}"


def _name(form: Form) -> str:
    return form.model + (" with longest context" if "b3" in form.terms else "")
