"""Up to which load the SLOs are kept: one computation for plans, reports and the knee.

In each replicate every SLO has a load at which it is first broken (`sim.results.curve.crossing`), and the least of them
is the replicate's. What the replicates say together: kept at a rung, if nine of ten keep every SLO there and at all
before it; broken at a rung, if most have broken one by then; and the crossing, with its band, in between. A rung
is only a grid point; the crossing is the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scenarios.forecast.forecast import Crossing, Estimate, OperatingPoint, estimate
from sim.results import curve

KEPT = 0.9  # the probability with which a plan must keep an SLO
NOWHERE = Estimate(value=None, low=None, high=None)


def operating_point(points: Sequence[curve.OperatingPoint], first: float, meaning: str) -> OperatingPoint:
    """An operating point over replicates; `first` is the lowest rung's load. No value where most lie below that."""
    load, rps, reached = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    passed = float(np.mean((load == first) & (reached > 0)))
    if passed > 0.5:  # it lies somewhere below the ladder
        return OperatingPoint(load=NOWHERE, rps=NOWHERE, reached=1.0, meaning=meaning, passed=passed)
    return OperatingPoint(
        load=estimate(load), rps=estimate(rps), reached=float(reached.mean()), meaning=meaning, passed=passed
    )


def crossing(slo: Mapping[str, float], tables: Sequence[pd.DataFrame], growing: Collection[int]) -> Crossing | None:
    """Where the first of the `slo` (by metric) is broken, over replicates (`tables`, one row a rung each); `growing`
    are the places of the rungs without a steady state. None without SLOs."""
    if not slo:
        return None
    firsts: list[curve.OperatingPoint] = []
    over: list[NDArray[np.bool_]] = []
    breaks: Counter[str] = Counter()
    for table in tables:
        each = {metric: curve.crossing(table, metric, limit, growing) for metric, limit in slo.items()}
        metric, least = min(each.items(), key=lambda item: (not item[1].reached, item[1].load))
        firsts.append(least)
        if least.reached:
            breaks[metric] += 1
        over.append(np.any([curve.broken(table, *one, growing) for one in slo.items()], axis=0))
    keep = 1.0 - np.logical_or.accumulate(over, axis=1).mean(axis=0)  # that rung, and all before it
    loads = tables[0]["load"].tolist()
    kept = [float(load) for load, share in zip(loads, keep, strict=True) if share >= KEPT]
    broken = [float(load) for load, share in zip(loads, keep, strict=True) if share < 0.5]
    at = operating_point(firsts, loads[0], "an SLO is broken")
    return Crossing(
        kept_at=kept[-1] if kept else None,
        broken_at=broken[0] if broken else None,
        load=at.load if at.reached >= 0.5 else NOWHERE,
        breaks=breaks.most_common(1)[0][0] if breaks else None,
        probability=KEPT,
    )
