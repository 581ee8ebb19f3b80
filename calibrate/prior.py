"""What is believed of step times before they are measured, as pseudo-observations.

One prompt length cannot tell a cost per token from one per prompt or per squared token, and answers of one length move
batch size and context together. Least squares alone would then choose arbitrarily, and a forecast for other lengths
would inherit the choice. So weak beliefs, all relative to what was measured, settle what the data leave open, and joint
draws scatter over it: each draw takes its own sample of the belief.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibrate.rows import Rows
from sim.forms import LEVEL

Floats = NDArray[np.float64]

PROMPT_OVERHEAD = 16.0  # tokens: what one more prompt costs besides its tokens (a launch, a sampled token)
# tokens: the prompt length at which attention costs as much as all else, about at the earliest. Padded servers here are
# those without flash attention, and small.
QUADRATIC_FROM = {False: 12000.0, True: 3000.0}
WAY = 2e-3  # s: to an idle server and back, on one machine
CONTEXT_SHARE = (0.5, 0.29)  # of what one more sequence costs, the part due to its context: anything from 0 to 1
LEVEL_SPREAD = 0.12  # how far a batch size's own time is from the smooth trend, relative


@dataclass(frozen=True)
class Prior:
    """Independent normal beliefs: coefficient `names[i]` is `mean[i]` ± `sd[i]` (infinite: nothing is believed)."""

    names: tuple[str, ...]
    mean: Floats
    sd: Floats


def prior_for(names: tuple[str, ...], rows: Rows, padded: bool) -> Prior:
    """The beliefs for these coefficients, scaled by a first look at the rows."""
    t, y, pre = rows.table, rows.seconds, rows.prefill
    n = t["sequences"].to_numpy(np.float64)
    longest = t["longest"].to_numpy(np.float64)
    believed: dict[str, tuple[float, float]] = {"u0": _way(rows), "u1": (0.0, 1e-6)}
    if pre.any():
        size, time = float(longest[pre].mean()), float(y[pre].mean())
        per_prompt = _slope(n[pre], y[pre], fallback=0.7 * time / float(n[pre].mean()))
        per_token = per_prompt / size
        believed |= {
            "a0": (0.3 * time, 0.3 * time),
            "a2": (0.0, per_token / QUADRATIC_FROM[padded]),
            "a3": (0.0, PROMPT_OVERHEAD * per_token),
        }
    if (~pre).any():
        context, time, size = float(longest[~pre].mean()), float(y[~pre].mean()), float(n[~pre].mean())
        per_sequence = _slope(n[~pre], y[~pre], fallback=0.1 * time)
        share, spread = CONTEXT_SHARE
        believed |= {
            "b1": (0.0, 0.2 * time),
            "b2": (share * per_sequence / context, spread * per_sequence / context),
            "b3": (0.0, 0.1 * time / context),
            "c0": (0.0, 0.1 * time),
            "c1": (0.0, 0.1 * time / size),
            "f0": (0.0, 0.1 * time),
            "f1": (0.0, 0.1 * time / size),
        }
        sizes, lengths = n[~pre], y[~pre]
        for name in names:
            if name.startswith(LEVEL):
                here = lengths[sizes == int(name.removeprefix(LEVEL))]
                believed[name] = (0.0, LEVEL_SPREAD * float(here.mean()))
    mean = np.array([believed.get(name, (0.0, np.inf))[0] for name in names])
    sd = np.array([believed.get(name, (0.0, np.inf))[1] for name in names])
    return Prior(names, mean, sd)


def _way(rows: Rows) -> tuple[float, float]:
    """Belief about the way to the server: some milliseconds, unless lone prefills on an idle server say much more."""
    t = rows.table
    alone = rows.prefill & (t["sequences"] == 1).to_numpy()
    idle = t["idle"].to_numpy()
    here, there = rows.seconds[alone & idle], rows.seconds[alone & ~idle]
    if not len(here) or not len(there):
        return WAY, WAY
    longer = float(np.median(here) - np.median(there))
    same = t["longest"].to_numpy()[alone]
    if np.ptp(same) > 0.1 * same.mean() or longer < 5 * WAY:
        return WAY, WAY / 2
    return longer, longer


def _slope(x: Floats, y: Floats, fallback: float) -> float:
    """By how much y grows with x, at least a tenth of `fallback`; `fallback` where x does not vary."""
    if np.ptp(x) == 0:
        return fallback
    covariance = np.cov(x, y)
    return max(float(covariance[0, 1] / covariance[0, 0]), 0.1 * fallback)
