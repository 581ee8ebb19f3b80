"""Summaries of joint draws: an interval for each parameter, and the pairs that are highly correlated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sim.model.calibration import Parameter

Floats = NDArray[np.float64]
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
