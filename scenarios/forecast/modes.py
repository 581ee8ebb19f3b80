"""Two separate modes among the replicates of a forecast.

Users in lock-step settle into one of several groupings, and a metric then has one value for each.
"""

from __future__ import annotations

import numpy as np


def modes(drawn: np.ndarray) -> list[float] | None:
    """The centres of two separate modes among the values of replicates (NaN: no value); None for a single mode.

    Two groups count as separate if the widest gap between sorted values leaves at least a tenth of them on either side
    and exceeds twice either group's standard deviation and 5 % of the median.
    """
    x = np.sort(drawn[~np.isnan(drawn)])
    least = max(2, len(x) // 10)
    if len(x) < 20 or x[-1] <= 0:
        return None
    gaps = np.diff(x)[least - 1 : len(x) - least]
    at = least + int(gaps.argmax())
    left, right = x[:at], x[at:]
    gap = float(x[at] - x[at - 1])
    if gap > 2 * max(left.std(), right.std()) and gap > 0.05 * float(np.median(x)):
        return [float(np.median(left)), float(np.median(right))]
    return None
