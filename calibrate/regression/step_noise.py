"""What the fitted form leaves over of single steps: how they vary, and how much each resembles the one before.

The noise of single steps averages out within a window, a machine's moods (`moods`) do not. What a cell of some seconds
has in common is therefore taken off first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibrate.regression.design import Rows
from calibrate.regression.random_effects import RandomEffects
from sim.model.calibration import Noise

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CELL_SECONDS = 3.0  # shorter than a drift, longer than steps resemble each other
NOTHING = 1e-4  # of drift: no more than that is none
TABLE = np.linspace(0.0, 1.0, 201)
_LAGS = np.arange(1, 21)
_RETURNED = 0.2  # a smaller share that the next step gives back is none
_PLAIN = 100  # decode steps without joining or dropping: fewer do not tell their noise from moods
_ROWS, _RUNGS = 20, 4  # how many steps tell how rough a rung is, and how many rungs how much they differ


def fit_noise(rows: Rows, predicted: Floats, moods: RandomEffects) -> Noise:
    """The noise around `predicted`, s per row, of a machine of such moods."""
    factor = rows.seconds / predicted
    plain = ~rows.prefill & (rows.table[["once_joined", "before_dropped"]] == 0).to_numpy().all(axis=1)
    whole = rows.prefill & ~rows.table["idle"].to_numpy()
    if not whole.any():
        whole = rows.prefill
    fast, rung = factor[plain], rows.rung[plain]
    roughness, memory, steps, returned = 0.0, 0.0, 1.0, 0.0
    if plain.sum() >= _PLAIN:
        if moods.drift > NOTHING:
            fast, known = _without_slow(fast, rows.table["end"].to_numpy()[plain], rung)
            fast, rung = fast[known], rung[known]
        fast, roughness = _usual(fast, rung)
        memory, steps, returned = _memory(fast, rung)
    return Noise(
        prefill=_table(_shrunk(_usual(factor[whole], rows.rung[whole])[0], moods.drift * moods.prefill)),
        decode=_table(fast),
        memory=memory,
        memory_steps=steps,
        returned=returned,
        roughness=roughness,
        # the median of what has this for its mean square, and the skewness of each of what has this together
        drift=moods.drift * float(np.exp(-(roughness**2))),
        drift_seconds=moods.seconds,
        drift_skew=moods.skew * float(np.exp(-1.5 * roughness**2)),
        between=moods.between,
        prefill_share=moods.prefill,
    )


def _without_slow(factor: Floats, time: Floats, rung: Ints) -> tuple[Floats, NDArray[np.bool_]]:
    """The factors without the mean of the cell of time in which each lies, and which of them that leaves something of:
    a step that is alone in its cell is that mean. The mean took a share of every deviation with it, which is given
    back."""
    keys = np.stack([rung, (time // CELL_SECONDS).astype(np.int64)])
    cell = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
    count = np.bincount(cell)
    mean = np.bincount(cell, weights=factor) / count
    whole = np.sqrt(count / np.maximum(count - 1, 1))
    return 1 + (factor / mean[cell] - 1) * whole[cell], count[cell] > 1


def _usual(factor: Floats, rung: Ints) -> tuple[Floats, float]:
    """The factors as they were if every rung were as rough as the middle one, and by how much rungs differ in that.

    Otherwise the rung with the most steps would lend its roughness to all. Means are left where they are.
    """
    count = np.bincount(rung)
    mean = np.bincount(rung, weights=factor) / np.maximum(count, 1)
    away = factor - mean[rung]
    spread = np.sqrt(np.bincount(rung, weights=away**2) / np.maximum(count - 1, 1))
    known = (count >= _ROWS) & (spread > 0)
    if known.sum() < _RUNGS:
        return factor, 0.0
    logs = np.log(spread[known])
    scale = np.where(known, np.exp(logs.mean()) / np.where(known, spread, 1.0), 1.0)
    by_chance = float((0.5 / (count[known] - 1)).mean())  # of the log of a spread that so few steps tell
    return mean[rung] + away * scale[rung], float(np.sqrt(max(logs.var(ddof=1) - by_chance, 0.0)))


def _memory(factor: Floats, rung: Ints) -> tuple[float, float, float]:
    """The share of the variance of single steps that is remembered, for how many steps, and the share that the next
    step gives back."""
    spread = factor - 1
    variance = float((spread**2).mean())
    if variance <= 0:
        return 0.0, 1.0, 0.0
    pairs = [(spread[k:] * spread[:-k])[rung[k:] == rung[:-k]] for k in _LAGS.tolist()]
    lags = _LAGS[[len(products) >= _ROWS for products in pairs]]
    if len(lags) < 2:
        return 0.0, 1.0, 0.0
    resemblance = np.array([float(pairs[k - 1].mean()) / variance for k in lags.tolist()])
    share, steps = _forgetting(lags[1:], resemblance[1:])
    returned = min(2 * (share * float(np.exp(-1 / steps)) - float(resemblance[0])), 1 - share)
    if returned > _RETURNED:
        return share, steps, returned
    return *_forgetting(lags, resemblance), 0.0


def _forgetting(lags: Ints, resemblance: Floats) -> tuple[float, float]:
    """The share and the steps of an exponential through how much steps some `lags` apart resemble each other."""
    best, share, steps = np.inf, 0.0, 1.0
    for candidate in np.geomspace(1.0, 60.0, 30).tolist():
        shape = np.exp(-lags / candidate)
        level = float(np.clip(shape @ resemblance / (shape @ shape), 0.0, 0.98))
        error = float(((resemblance - level * shape) ** 2).sum())
        if error < best:
            best, share, steps = error, level, candidate
    return (share, steps) if share > 0.05 else (0.0, 1.0)


def _shrunk(factor: Floats, drift: float) -> Floats:
    """Residuals of long steps without the drift that is in them too."""
    variance = float(np.var(factor))
    if variance == 0:
        return factor
    mean = float(factor.mean())
    shrunk: Floats = mean + (factor - mean) * np.sqrt(max(variance - drift**2, 0.1 * variance) / variance)
    return shrunk


def _table(factor: Floats) -> list[float]:
    """Quantiles of a factor of mean 1; empty when there is nothing to say."""
    if len(factor) < 5:
        return []
    quantiles = np.maximum(np.quantile(factor, TABLE), 0.05)
    # straight lines lie between quantiles: one to the largest would have half of it on average in the last of them
    end = float(factor[factor >= quantiles[-2]].mean())
    quantiles[-1] = np.clip(2 * end - quantiles[-2], quantiles[-2], quantiles[-1])
    mean = float(np.trapezoid(quantiles, TABLE))
    return [round(q, 5) for q in (quantiles / mean).tolist()]
