"""How well a steady window knows its throughput: batch means (Law, *Simulation Modeling and Analysis*, ch. 9)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

CYCLES = 3  # users in lock-step repeat themselves every E2E; a batch shorter than several of these makes the answer lie
FEWEST, MOST = 6, 30  # batches


def half_width(
    counted: Callable[[NDArray[np.float64]], NDArray[np.float64]], start: float, end: float, cycle: float
) -> float:
    """The 95 % half-width of a throughput over [start, end), relative to it; infinite while there is too little.

    `counted(times)` is how much has come by each time; `cycle` is the mean time of a request from end to end, s.
    """
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
