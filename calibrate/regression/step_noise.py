"""Noise of single steps around the fitted form: its distribution, autocorrelation and scale.

The noise of single steps averages out within a window; drift and run effects do not. So the mean of each cell of a few
seconds is removed first.
"""

from __future__ import annotations

import numpy as np

from calibrate.arrays import Bools, Floats, Ints
from calibrate.regression.design import Rows
from calibrate.regression.random_effects import RandomEffects
from sim.steptime.noise_parameters import Noise

CELL_SECONDS = 3.0  # shorter than a drift, longer than the autocorrelation of steps
NO_DRIFT = 1e-4  # relative: a smaller drift is none
TABLE = np.linspace(0.0, 1.0, 201)
_LAGS = np.arange(1, 21)
_LEAST_SHARE = 0.2  # a smaller moving-average share is none
_PLAIN = 100  # decode steps without joining or dropping: fewer do not tell step noise from drift
_ROWS = 20  # pairs of steps that tell an autocorrelation


def fit_noise(rows: Rows, predicted: Floats, effects: RandomEffects) -> Noise:
    """The noise around `predicted`, (rows,) in s, given the random effects."""
    factor = rows.seconds / predicted
    plain = ~rows.prefill & (rows.table[["once_joined", "before_dropped"]] == 0).to_numpy().all(axis=1)
    whole = rows.prefill & ~rows.table["idle"].to_numpy()
    if not whole.any():
        whole = rows.prefill
    fast, rung = factor[plain], rows.rung[plain]
    memory, steps, returned = 0.0, 1.0, 0.0
    if plain.sum() >= _PLAIN:
        if effects.drift > NO_DRIFT:
            fast, known = _without_cell_means(fast, rows.table["end"].to_numpy()[plain], rung)
            fast, rung = fast[known], rung[known]
        memory, steps, returned = _autocorrelation(fast, rung)
    slow = factor[whole]
    return Noise(
        prefill=_quantiles(_without_drift(slow, effects.drift * effects.prefill)) if len(slow) else [],
        decode=_quantiles(fast),
        memory=memory,
        memory_steps=steps,
        returned=returned,
        drift=effects.drift,
        drift_seconds=effects.seconds,
        drift_skew=effects.skew,
        between=effects.between,
        prefill_share=effects.prefill,
    )


def _without_cell_means(factor: Floats, time: Floats, rung: Ints) -> tuple[Floats, Bools]:
    """Factors divided by the mean of the cell of time in which each lies, and which of them are not alone in their
    cell.

    The mean of n rows takes 1/n of the variance with it, which is restored.
    """
    keys = np.stack([rung, (time // CELL_SECONDS).astype(np.int64)])
    cell = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
    count = np.bincount(cell)
    mean = np.bincount(cell, weights=factor) / count
    whole = np.sqrt(count / np.maximum(count - 1, 1))
    return 1 + (factor / mean[cell] - 1) * whole[cell], count[cell] > 1


def _autocorrelation(factor: Floats, rung: Ints) -> tuple[float, float, float]:
    """The autocorrelated share of the variance of single steps, its correlation length in steps, and the moving-average
    share.

    The latter is noise with a negative lag-1 autocorrelation: a token that the client saw late makes one step look long
    and the next one short.
    """
    spread = factor - 1
    variance = float((spread**2).mean())
    if variance <= 0:
        return 0.0, 1.0, 0.0
    pairs = [(spread[k:] * spread[:-k])[rung[k:] == rung[:-k]] for k in _LAGS.tolist()]
    lags = _LAGS[[len(products) >= _ROWS for products in pairs]]
    if len(lags) < 2:
        return 0.0, 1.0, 0.0
    correlation = np.array([float(pairs[k - 1].mean()) / variance for k in lags.tolist()])
    share, steps = _exponential(lags[1:], correlation[1:])
    returned = min(2 * (share * float(np.exp(-1 / steps)) - float(correlation[0])), 1 - share)
    if returned > _LEAST_SHARE:
        return share, steps, returned
    return *_exponential(lags, correlation), 0.0


def _exponential(lags: Ints, correlation: Floats) -> tuple[float, float]:
    """Share and length, in steps, of the exponential that is nearest to autocorrelations at some lags."""
    best, share, steps = np.inf, 0.0, 1.0
    for candidate in np.geomspace(1.0, 60.0, 30).tolist():
        shape = np.exp(-lags / candidate)
        level = float(np.clip(shape @ correlation / (shape @ shape), 0.0, 0.98))
        error = float(((correlation - level * shape) ** 2).sum())
        if error < best:
            best, share, steps = error, level, candidate
    return (share, steps) if share > 0.05 else (0.0, 1.0)


def _without_drift(factor: Floats, drift: float) -> Floats:
    """Factors of long steps without the variance of the drift, which they contain too."""
    variance = float(np.var(factor))
    if variance == 0:
        return factor
    mean = float(factor.mean())
    shrunk: Floats = mean + (factor - mean) * np.sqrt(max(variance - drift**2, 0.1 * variance) / variance)
    return shrunk


def _quantiles(factor: Floats) -> list[float]:
    """Quantiles of a factor, scaled to mean 1; empty for fewer than five values."""
    if len(factor) < 5:
        return []
    quantiles = np.maximum(np.quantile(factor, TABLE), 0.05)
    # straight lines lie between quantiles: one to the largest would have half of it on average in the last of them
    end = float(factor[factor >= quantiles[-2]].mean())
    quantiles[-1] = np.clip(2 * end - quantiles[-2], quantiles[-2], quantiles[-1])
    mean = float(np.trapezoid(quantiles, TABLE))
    return [round(q, 5) for q in (quantiles / mean).tolist()]
