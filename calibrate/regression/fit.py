"""Nonnegative least squares on step times, by normal equations per block of time (`equations`).

Errors are relative (noise grows with the step) and squared: means are wanted, and medians or robust losses of a skewed
noise forecast too little. Weights come from the fit, not from the measured value, which would favour quick steps; rungs
that are unlike the others as a whole count for less. The machine's moods are found from a fit that knows of none; with
them the form is chosen anew, or a time for every batch size would follow the moods of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from calibrate.regression.design import BLOCK_SECONDS, COLD_CACHE, Floats, Ints, Rows, level_knots, level_terms, terms
from calibrate.regression.equations import Equations, equations
from calibrate.regression.priors import Prior, prior_for
from calibrate.regression.random_effects import NO_EFFECTS, RandomEffects
from calibrate.schedule.admission_timing import admission_rows
from sim.steptime.linear import LEVEL

_PASSES = 10  # six left batch sizes seen rarely two percent off
_TAIL = 4.0  # degrees of freedom of a rung's mood: heavy tails, but with a variance
_MOOD = 0.02  # a rung this far off is nothing unusual, however alike the others are


@dataclass(frozen=True)
class Form:
    """A candidate: the name of a `sim.steptime.linear` model and which of its terms are in it."""

    model: str
    terms: tuple[str, ...]

    @property
    def padded(self) -> bool:
        """Whether work is in sequences × longest."""
        return not self.model.startswith("affine")

    @property
    def by_batch(self) -> bool:
        """Whether every batch size has a time of its own."""
        return self.model.endswith("levels")


@dataclass(frozen=True)
class Regression:
    """A fitted form; `predicted` is the time of every row, s, as a calibration would forecast it."""

    form: Form
    names: tuple[str, ...]
    prior: Prior
    coefficients: Floats
    predicted: Floats
    equations: Equations
    moods: RandomEffects

    def solve(self, weight: Floats, slower: Floats | None = None, noise: Floats | None = None) -> Floats:
        """Coefficients from the prior and from blocks that count so often, and are that much slower
        (`Equations.reduced`); `noise`, (k,), is what each of the prior's k targets is off by."""
        return _solve(*self.equations.reduced(weight, slower), self.prior, noise)


def regress(rows: Rows, form: Form, admissions: pd.DataFrame, moods: RandomEffects = NO_EFFECTS) -> Regression:
    """Fit a form to all rows of a machine of such moods, and to who came back in time (`admission_timings`)."""
    names = tuple(name for name in terms(rows, form.padded) if name in form.terms)
    if form.by_batch:
        names += tuple(f"{LEVEL}{size}" for size in level_knots(rows))
    matrix = design(rows, form, names)
    believed = prior = prior_for(names, rows, form.padded)
    y, block = rows.seconds, rows.block
    group = pd.DataFrame({"p": rows.prefill, "n": rows.table["sequences"], "r": rows.rung, "y": y})
    predicted = group.groupby(["p", "n", "r"])["y"].transform("mean").to_numpy(np.float64)
    everything = np.ones(int(block.max()) + 1)
    feels = np.where(rows.prefill, moods.prefill, 1.0)
    variance = moods.block_sd(BLOCK_SECONDS) ** 2 + moods.between**2
    mood = np.zeros(len(everything))  # of each block
    left = np.zeros(len(everything))  # the variance that this leaves
    for _ in range(_PASSES):
        weight, spread = _weight(y / predicted - 1 - feels * mood[block], feels**2 * left[block], rows)
        usual = robust_weights(y, predicted, rows.rung)[0]
        seen = equations(rows, matrix, weight / predicted, predicted * feels, moods, usual)
        coefficients = _solve(*seen.reduced(everything), prior)
        predicted = np.maximum(matrix @ coefficients, 1e-6)
        prior = believed.extended(*admission_rows(admissions, names, coefficients, spread))
        left[:] = variance / (1 + variance * np.bincount(block, weights=(weight * feels) ** 2))
        mood[:] = left * np.bincount(block, weights=weight**2 * feels * (y / predicted - 1))
    forecast = np.maximum(matrix @ _forecast(names, coefficients), 1e-6)
    return Regression(form, names, prior, coefficients, forecast, seen, moods)


def _forecast(names: Sequence[str], coefficients: Floats) -> Floats:
    """The coefficients that a calibration takes over: of what cold caches cost, the average over the steps fitted."""
    return np.where(np.array(names) == COLD_CACHE, 0.0, coefficients)


def _weight(alone: Floats, unsure: Floats, rows: Rows) -> tuple[Floats, float]:
    """The weight of every row by how much rows of its kind vary, relative, and by how much they resemble others of
    their block; and how much decode steps vary. `alone` is how far each is off without the mood of its block, as far as
    that is known; `unsure` is the variance that this leaves."""
    weight, spread = np.empty(len(alone)), {}
    for kind in (True, False):
        of = rows.prefill == kind
        if not of.any():
            continue
        error = alone[of]
        spread[kind] = max(float(np.sqrt((error**2 + unsure[of]).mean())), 1e-4)
        clusters = np.bincount(rows.block[of], weights=error)
        inflation = max(1.0, float((clusters**2).sum() / max((error**2).sum(), 1e-12)))
        weight[of] = 1 / (spread[kind] * np.sqrt(inflation))
    return weight, spread[False]


def robust_weights(seconds: Floats, predicted: Floats, rung: Ints) -> tuple[Floats, Floats]:
    """The weight of every rung by how usual its speed is, as a Student t distribution has it (about 1 for the usual),
    and how far it is off, relative.

    A machine shared with others is now and then out of the ordinary for a whole minute, and what its steps differ by is
    then not what it is at other times: on the recorded CPU runs forecasts are worse where only the mood is uncertain.
    """
    off = np.bincount(rung, weights=seconds - predicted) / np.maximum(np.bincount(rung, weights=predicted), 1e-12)
    scale = max(_MOOD, 1.48 * float(np.median(np.abs(off[np.unique(rung)]))))
    return (_TAIL + 1) / (_TAIL + (off / scale) ** 2), off


def design(rows: Rows, form: Form, names: Sequence[str]) -> Floats:
    """What the named coefficients multiply, (rows, names)."""
    knots = [int(name.removeprefix(LEVEL)) for name in names if name.startswith(LEVEL)]
    columns = terms(rows, form.padded) | level_terms(rows, knots)
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
    """For every rung the error of the form fitted to the steps of all others: Σ over kinds and batch sizes of
    |Σ(fit − y)| / Σy. What is believed stays the same, admission timings of that rung included: that bounds the
    filter and the way there, and hardly a step."""
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
    rows: Rows, forms: list[Form], admissions: pd.DataFrame, moods: RandomEffects = NO_EFFECTS
) -> tuple[Regression, str]:
    """The simplest form within one standard error of the best, rungs left out in turn; and what was seen, in words."""
    fitted = [regress(rows, form, admissions, moods) for form in forms]
    rungs = len(np.unique(rows.rung))
    if rungs < 3:
        return fitted[0], f"{forms[0].model}: too few loads to choose between forms"
    errors = np.array([list(rung_errors(r, rows).values()) for r in fitted])
    mean = errors.mean(axis=1)
    best = int(np.argmin(mean))
    # as Breiman et al. have it, of the best one's error: that of the differences is smaller, since forms miss the same
    # rungs for the same reason, and would have a time for every batch size follow the moods of each
    margin = errors[best].std(ddof=1) / np.sqrt(rungs)
    chosen = next(i for i in range(len(forms)) if mean[i] <= mean[best] + margin)
    said = "; ".join(f"{_name(r.form)} {m:.1%}" for r, m in zip(fitted, mean, strict=True))
    return fitted[chosen], f"error at loads left out: {said}; chosen: {_name(forms[chosen])}"


def _name(form: Form) -> str:
    return form.model + (" with longest context" if "b3" in form.terms else "")
