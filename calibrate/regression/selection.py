"""Nonnegative least squares in relative error, and selection of terms by cross-validation.

A *design* has one row per timing and one named column per coefficient: the time is their product. A measurement says as
much at 30 ms as at 3 s, so errors are relative. Coefficients are not negative, since a negative one would make some
batch take no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.optimize import nnls

from calibrate.arrays import Floats, Ints


@dataclass(frozen=True)
class Score:
    """Mean |relative error| of a set of terms over the folds that were left out, and its standard error."""

    terms: tuple[str, ...]
    error: float
    stderr: float


@dataclass(frozen=True)
class Selection:
    """The simplest terms within one standard error of the best, and all that was tried, best first."""

    chosen: Score
    best: Score
    tried: tuple[Score, ...]

    def __str__(self) -> str:
        said = f"{' + '.join(self.chosen.terms)}, missing left-out batches by {_percent(self.chosen)}"
        if self.chosen == self.best:
            return f"{said}: the best of {len(self.tried)} forms, and no simpler one within a standard error of it"
        best = f"{' + '.join(self.best.terms)} at {_percent(self.best)}"
        return f"{said}: the simplest of {len(self.tried)} forms within a standard error of the best, {best}"


def _percent(score: Score) -> str:
    return f"{100 * score.error:.1f} ± {100 * score.stderr:.1f} %"


def fit_relative(design: Floats, seconds: Floats, weights: Floats | None = None) -> Floats:
    """Coefficients ≥ 0 that minimise Σ w·(predicted/measured − 1)²; `design` is (rows, terms), `seconds` (rows,)."""
    root = np.ones(len(seconds)) if weights is None else np.sqrt(weights)
    scaled = design / seconds[:, None] * root[:, None]
    size = np.sqrt((scaled**2).sum(axis=0))
    size[size == 0] = 1.0  # a term that no row shows: its coefficient stays 0
    coefficients, _ = nnls(scaled / size, root)
    return np.asarray(coefficients / size, dtype=np.float64)


def select(
    names: Sequence[str], design: Floats, seconds: Floats, folds: Ints, forms: Iterable[tuple[str, ...]]
) -> Selection:
    """Leave each fold out in its turn and keep the fewest terms within one standard error of the smallest error
    (Breiman et al., Classification and Regression Trees, 3.4.3); equals go to the smaller error. `folds` numbers the
    fold of each row; at least two are needed."""
    tried = []
    labels = np.unique(folds)
    for form in forms:
        columns = [names.index(term) for term in form]
        errors = []
        for label in labels:
            out = folds == label
            fitted = fit_relative(design[~out][:, columns], seconds[~out])
            errors.append(float(np.abs(design[out][:, columns] @ fitted / seconds[out] - 1).mean()))
        tried.append(Score(form, float(np.mean(errors)), float(np.std(errors, ddof=1) / np.sqrt(len(errors)))))
    tried.sort(key=lambda score: (score.error, len(score.terms)))
    best = tried[0]
    within = [score for score in tried if score.error <= best.error + best.stderr]
    return Selection(min(within, key=lambda score: (len(score.terms), score.error)), best, tuple(tried))


def subsets(terms: Sequence[str]) -> list[tuple[str, ...]]:
    """Every non-empty subset, in the order of `terms`."""
    return [chosen for n in range(1, len(terms) + 1) for chosen in combinations(terms, n)]
