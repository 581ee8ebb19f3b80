"""A metric against load with a band, over the replicates of a ladder.

Plateau, knee and latency onset are computed in each replicate and only then summarised, never read off the mean curve:
the mean of many hockey sticks has no corner.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

LOW, HIGH = 0.05, 0.95
TAKEOFF_FACTOR = (1.15, 2.5)  # uniform: a judgement by eye on a printed plot (`docs/files.md`, Forecast)


class Band(NamedTuple):
    """A central value with its 90 % band, over replicates."""

    value: float
    low: float
    high: float


class OperatingPoint(NamedTuple):
    """A point on a curve: its load (users or requests/s), the RPS there, and whether the ladder reached it."""

    load: float
    rps: float
    reached: bool


def band(values: ArrayLike) -> Band:
    """Median and 5 % and 95 % quantiles (`method="weibull"`: unbiased for exceedance), NaN left out."""
    x = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    if not len(x):
        return Band(float("nan"), float("nan"), float("nan"))
    low, value, high = np.quantile(x, [LOW, 0.5, HIGH], method="weibull")
    return Band(float(value), float(low), float(high))


def plateau(table: pd.DataFrame) -> OperatingPoint:
    """The largest RPS over the rungs of one replicate; `reached` if it is not the top rung's."""
    at = int(table["rps"].to_numpy().argmax())
    return OperatingPoint(float(table["load"].iloc[at]), float(table["rps"].iloc[at]), at < len(table) - 1)


def knee(table: pd.DataFrame, e2e_p95: float | None = None, growing: Collection[int] = ()) -> OperatingPoint:
    """Where p95 E2E first exceeds `e2e_p95`, s, or without it twice the lowest rung's mean, in one replicate."""
    limit = 2.0 * float(table["e2e_mean"].iloc[0]) if e2e_p95 is None else e2e_p95
    return crossing(table, "e2e_p95", limit, growing)


def latency_onset(table: pd.DataFrame, factor: float) -> OperatingPoint:
    """Where mean E2E first reaches `factor` times the lowest rung's, in one replicate."""
    return crossing(table, "e2e_mean", factor * float(table["e2e_mean"].iloc[0]))


def broken(table: pd.DataFrame, metric: str, limit: float, growing: Collection[int] = ()) -> NDArray[np.bool_]:
    """Which rungs do not keep `metric` within `limit`, in one replicate. Those without a value do not, nor those at the
    places in `growing`: an open loop's without a steady state."""
    value = table[metric].to_numpy(dtype=np.float64)
    found = np.zeros(len(value), dtype=bool) if np.isnan(limit) else ~(value <= limit)
    found[list(growing)] = True
    return np.asarray(found)


def crossing(table: pd.DataFrame, metric: str, limit: float, growing: Collection[int] = ()) -> OperatingPoint:
    """Where `metric` first passes `limit`, in one replicate: load and RPS on the straight line between the last rung
    that keeps it and the first that does not. The top rung, not `reached`, if it never does.

    Where the line says nothing, since the rung shows no value beyond the limit, that rung itself is taken; likewise the
    first rung, if that does not keep it.
    """
    load, rps, value = (table[name].to_numpy(dtype=np.float64) for name in ("load", "rps", metric))
    over = np.flatnonzero(broken(table, metric, limit, growing))
    if not len(over):
        return OperatingPoint(float(load[-1]), float(rps[-1]), False)
    i = int(over[0])
    if i == 0 or not value[i] > limit:
        return OperatingPoint(float(load[i]), float(rps[i]), True)
    share = (limit - value[i - 1]) / (value[i] - value[i - 1])
    return OperatingPoint(
        float(load[i - 1] + share * (load[i] - load[i - 1])), float(rps[i - 1] + share * (rps[i] - rps[i - 1])), True
    )
