"""Lock-stepped users settle into one of several groupings, and what is forecast of them then has several answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scenarios.compare.comparison import Row

# what another grouping of the users changes; rates and far quantiles of few requests fall apart of themselves
SWAYED = ("e2e_mean", "e2e_p50", "e2e_p95", "ttft_mean", "ttft_p50", "ttft_p95")
PATTERNS = 3  # as many metrics of two patterns are named at one load


def humps(drawn: np.ndarray) -> list[float] | None:
    """Centres of two separate patterns among replicates, if there are two; None for a single one.

    Lock-stepped users settle into one of several groupings, and a forecast then has several answers. Two groups count
    as separate if the widest gap splits off at least a tenth and is wider than either group's own spread.
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


def two_patterns(rows: Iterable[Row]) -> list[str]:
    """Where the forecast has two answers, load by load."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.humps is not None and row.metric in SWAYED:
            one, other = row.humps
            found.setdefault(row.at, []).append(f"{row.metric} about {one:.3g} or {other:.3g}")
    return [
        f"at {at} two patterns are stable: {', '.join(two[:PATTERNS])}"
        + (f", and {len(two) - PATTERNS} metrics more" if len(two) > PATTERNS else "")
        for at, two in found.items()
    ]
