"""Summaries of a fit: an interval for each parameter, highly correlated pairs, the size of residuals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibrate.arrays import Floats
from sim.model.calibration import Parameter, Residual

CORRELATED = 0.7  # |correlation| from which the data hardly tell two parameters apart


def parameter(value: float, drawn: Floats, unit: str, meaning: str) -> Parameter:
    """A parameter with the standard error and the 95 % interval of its draws, (n,), widened to hold `value`."""
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return Parameter(
        value=value,
        stderr=float(drawn.std(ddof=1)),
        low=min(low, value),
        high=max(high, value),
        unit=unit,
        meaning=meaning,
    )


def residual(error: Floats, of: Floats) -> Residual:
    """The size of errors, (rows,), in absolute terms and relative to `of`, (rows,)."""
    rms, p95 = np.sqrt((error**2).mean()), np.quantile(np.abs(error / of), 0.95)
    return Residual(rms=float(rms), p95_relative=float(p95), rows=len(error))


def correlations(names: Sequence[str], drawn: Floats) -> list[tuple[str, str, float]]:
    """Pairs of columns of the draws, (draws, names), whose |correlation| exceeds `CORRELATED`."""
    pairs = []
    for i, one in enumerate(names):
        for j, other in enumerate(names[:i]):
            a, b = drawn[:, i] - drawn[:, i].mean(), drawn[:, j] - drawn[:, j].mean()
            size = float(np.sqrt((a @ a) * (b @ b)))
            if size > 0 and abs(r := float(a @ b) / size) > CORRELATED:
                pairs.append((other, one, round(r, 3)))
    return pairs
