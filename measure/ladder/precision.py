"""The precision of a window's throughput by batch means (Law, *Simulation Modeling and Analysis*, ch. 9)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

CYCLES = 3  # of E2E per batch at least: users in lock-step have a period of one E2E, which shorter batches would alias
FEWEST, MOST = 6, 30  # batches


def half_width(
    counted: Callable[[NDArray[np.float64]], NDArray[np.float64]], start: float, end: float, cycle: float
) -> float:
    """The relative 95 % half-width of the throughput over [start, end); infinite with fewer than `FEWEST` batches.

    `counted(times)` is the cumulative count at each time; `cycle` is the mean E2E latency, s.
    """
    from scipy.special import stdtrit  # 0.4 s to import, and a window of given length needs none

    if not cycle > 0.0 or end <= start:
        return float("inf")
    batches = min(MOST, int((end - start) / (CYCLES * cycle)))
    if batches < FEWEST:
        return float("inf")
    counts = np.diff(counted(np.linspace(start, end, batches + 1)))
    mean = float(counts.mean())
    if mean <= 0.0:
        return float("inf")
    spread = float(counts.std(ddof=1)) / math.sqrt(batches)
    return float(stdtrit(batches - 1, 0.975)) * spread / mean
