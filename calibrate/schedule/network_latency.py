"""How long a request is on its way to the server, from when the router had not seen it yet.

Once it has waited long enough a router takes whoever is in its queue whenever it looks, before every decode step
(router/src/infer.rs:246-354). So a request that is prefilled now was not there at the look before, a step ago: between
the two its way ended. A near client shows only that its way is shorter than a step; a far one is pinned down by steps
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

TAIL = 0.05  # of the requests may say what is not so: a budget kept them out, or their client was held up
_ENOUGH = 10


def latency_bounds(runs: Sequence[Run], schedules: Sequence[Schedule]) -> tuple[float, float] | None:
    """The least and the most that the way takes, s, by nearly all requests; None where too few say so. They may cross,
    as ways differ."""
    pairs = [_between(run, schedule) for run, schedule in zip(runs, schedules, strict=True)]
    least, most = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    if len(least) < _ENOUGH:
        return None
    return float(np.quantile(least, 1 - TAIL)), float(np.quantile(most, TAIL))


def _between(run: Run, schedule: Schedule) -> tuple[Floats, Floats]:
    """For every request that says so: how long it was under way at the look before it came in, and at the one then."""
    steps = schedule.steps
    step = np.maximum(schedule.first, 2)
    decode, ended = (steps["kind"] == "decode").to_numpy(), steps["ended"].to_numpy()
    end, known = steps["end"].to_numpy(), (steps["seen"] & steps["used"]).to_numpy()
    open_to_all = steps["since"].to_numpy() >= server_of(run).max_waiting_tokens - 1
    says = (
        (schedule.first >= 2)
        & known[step]
        & known[step - 1]
        & decode[step - 1]
        & decode[step - 2]
        & open_to_all[step - 2]
    )
    says &= ended[step - 1] == 0  # nobody made room in between
    return (end[step - 2] - schedule.written)[says], (end[step - 1] - schedule.written)[says]
