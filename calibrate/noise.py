"""What the fitted form leaves over, taken apart: single steps, their memory, and the slow drift of the machine.

The parts differ in what they do to a forecast: the noise of single steps averages out within a window, drift does not.
Residuals are averaged in cells of time; what those averages vary by, beyond what single steps explain, is drift, and
how fast it forgets itself is read from neighbouring cells. The rest is the noise of steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibrate.rows import Rows
from sim.calibration import Noise

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CELL_SECONDS = 3.0
LONGEST = 0.95  # of a cell's mood kept by the next: what lasts longer than a minute looks constant in windows of one
TABLE = np.linspace(0.0, 1.0, 201)
_LAGS = np.arange(1, 21)


def fit_noise(rows: Rows, predicted: Floats) -> Noise:
    """The noise around `predicted`, s per row."""
    factor = rows.seconds / predicted
    plain = ~rows.prefill & ~rows.table["concat"].to_numpy() & ~rows.table["filtered"].to_numpy()
    whole = rows.prefill & ~rows.table["idle"].to_numpy()
    if not whole.any():
        whole = rows.prefill
    if plain.sum() < 100:
        return Noise(prefill=_table(factor[whole]), decode=_table(factor[plain]))
    time, rung = rows.table["end"].to_numpy()[plain], rows.rung[plain]
    slow, drift, seconds = _drift(factor[plain], time, rung)
    fast = factor[plain] / slow
    memory, steps = _memory(fast, rung)
    return Noise(
        prefill=_table(_shrunk(factor[whole], drift)),
        decode=_table(fast),
        memory=memory,
        memory_steps=steps,
        drift=drift,
        drift_seconds=seconds,
    )


def _drift(factor: Floats, time: Floats, rung: Ints) -> tuple[Floats, float, float]:
    """The slow factor of every row, its standard deviation, and the time in which it forgets itself, s."""
    cell = np.unique(np.stack([rung, (time // CELL_SECONDS).astype(np.int64)]), axis=1, return_inverse=True)[1].reshape(
        -1
    )
    count = np.bincount(cell)
    mean = np.bincount(cell, weights=factor) / count
    slow = mean[cell]
    # A cell's mean also varies by its own steps, which resemble each other: halves of a cell tell how much.
    half = np.zeros(len(cell), dtype=np.int64)
    starts = np.cumsum(count) - count
    order = np.argsort(cell, kind="stable")
    half[order] = (np.arange(len(cell)) - starts[cell[order]]) * 2 >= count[cell[order]]
    double = cell * 2 + half
    halves = np.bincount(double, weights=factor, minlength=2 * len(count)) / np.maximum(
        np.bincount(double, minlength=2 * len(count)), 1
    )
    whole = count >= 8
    if whole.sum() < 3:
        return np.ones(len(factor)), 0.0, 20.0
    own = float(((halves[0::2] - halves[1::2])[whole] ** 2).mean()) / 4
    variance = max(float(np.var(mean[whole])) - own, 0.0)
    if variance < 1e-8:
        return np.ones(len(factor)), 0.0, 20.0
    # Not centred on each rung: a mood that outlasts a rung is drift too, the slow part of it.
    of_rung = rung[order][starts]
    off = mean - float(mean[whole].mean())
    next_to = (of_rung[1:] == of_rung[:-1]) & whole[1:] & whole[:-1]
    follow = float((off[1:] * off[:-1])[next_to].mean()) if next_to.any() else 0.0
    keep = float(np.clip(follow / variance, 0.3, LONGEST))
    return slow, float(np.sqrt(variance)), -CELL_SECONDS / float(np.log(keep))


def _memory(factor: Floats, rung: Ints) -> tuple[float, float]:
    """The share of the variance of single steps that is remembered, and for how many steps."""
    spread = factor - 1
    variance = float((spread**2).mean())
    if variance <= 0:
        return 0.0, 1.0
    resemblance = np.array(
        [float((spread[k:] * spread[:-k])[rung[k:] == rung[:-k]].mean()) / variance for k in _LAGS.tolist()]
    )
    best, share, steps = np.inf, 0.0, 1.0
    for candidate in np.geomspace(1.0, 60.0, 30).tolist():
        shape = np.exp(-_LAGS / candidate)
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
    mean = float(np.trapezoid(quantiles, TABLE))
    return [round(q, 5) for q in (quantiles / mean).tolist()]
