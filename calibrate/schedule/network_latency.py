"""Bounds on the network latency to the server, from the scheduling points at which requests were not yet queued.

A router whose requests have waited long enough admits all that are queued at every scheduling point, before each decode
step (`docs/engines.md`). So a request that is prefilled now was not queued at the scheduling point before, a step ago:
it arrived in between. A near client shows only that its latency is below a step; a far one is bounded closely by steps
that end at all phases.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calibrate.schedule.rebuild import Schedule
from calibrate.schedule.rules import server_of
from sim.run import Run

Floats = NDArray[np.float64]

TAIL = 0.05  # share of the requests that may mislead: a budget kept them waiting, or their client was delayed
_ENOUGH = 10


def latency_bounds(runs: Sequence[Run], schedules: Sequence[Schedule]) -> tuple[float, float] | None:
    """A lower and an upper bound of the latency, s, that nearly all requests agree with; None where too few say
    anything. They may cross, since latencies vary."""
    pairs = [_bounds(run, schedule) for run, schedule in zip(runs, schedules, strict=True)]
    least, most = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    if len(least) < _ENOUGH:
        return None
    return float(np.quantile(least, 1 - TAIL)), float(np.quantile(most, TAIL))


def _bounds(run: Run, schedule: Schedule) -> tuple[Floats, Floats]:
    """For every request that tells: how long before the last two scheduling points before its prefill it was sent,
    s."""
    steps = schedule.steps
    step = np.maximum(schedule.first, 2)
    decode, ended = (steps["kind"] == "decode").to_numpy(), steps["ended"].to_numpy()
    end, known = steps["end"].to_numpy(), (steps["seen"] & steps["used"]).to_numpy()
    open_to_all = steps["since"].to_numpy() >= server_of(run).max_waiting_tokens - 1
    tells = (
        (schedule.first >= 2)
        & known[step]
        & known[step - 1]
        & decode[step - 1]
        & decode[step - 2]
        & open_to_all[step - 2]
    )
    tells &= ended[step - 1] == 0  # no answer ended in between and made room
    return (end[step - 2] - schedule.written)[tells], (end[step - 1] - schedule.written)[tells]
