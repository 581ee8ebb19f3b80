"""Whether a simulation can run on this machine: lower bounds of its memory and time, before anything starts.

Lower bounds, so that nothing is refused that would have run. The least number of requests is what a single user would
send in the windows, or what a rate sends; speeds and sizes are the best that `make bench` has printed.
"""

from __future__ import annotations

import os
from itertools import islice
from typing import NamedTuple

import numpy as np

from sim.cluster.sessions import foreseen
from sim.model.calibration import Calibration
from sim.model.errors import BadInput
from sim.model.machine import Machine, draw_machine
from sim.model.scenario import Scenario, least_completions
from sim.model.workload import RequestLengths

FREE_USERS, FREE_TOKENS = 10**6, 10**7  # up to here nothing is refused, however long it takes
SPEED = 150_000.0  # requests a second of one core (`make bench`: 123,110 of a load without noise)
REQUEST, USER, STEP = 400.0, 1_000.0, 8.0  # bytes: 450 a request by `make bench`; a user's process; a step's end
REPLICATE = 10_000.0  # bytes of its tables, which are kept until all are done
TIME = 8.0  # bytes of a time at which a request is due
LONGEST = 30 * 86400.0  # s: a month
LATEST = 1e9  # s, thirty years: a float that counts more of them no longer tells 0.1 us, and then no step passes


class Size(NamedTuple):
    """The least that one replicate of a ladder holds and does."""

    users: int
    requests: float
    tokens: float
    steps: float  # of one uninterrupted decode run, whose ends are laid out together if there is noise

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.users * USER + self.requests * REQUEST + self.steps * STEP


def least_size(scenario: Scenario, model: Machine, lengths: RequestLengths | None = None) -> Size:
    """The least size of one replicate."""
    asked = list(islice(foreseen(scenario.workload, model.server, lengths, model.output_attained), 100))
    prompt, output = (float(np.mean([getattr(a, n) for a in asked])) for n in ("prompt_tokens", "output_tokens"))
    load = scenario.load
    window = load.seconds or 0.0
    if load.trace and lengths is not None:
        requests, users = float(len(lengths.prompt_tokens)), 0
        if load.seconds is not None and lengths.times is not None:
            requests = float((lengths.times <= load.settle + load.seconds).sum())
    elif load.profile is not None:
        requests, users = float(load.profile.cumulated[1][-1]), 0
    elif load.users is not None:
        users = max(load.users)
        step, _ = model.step_time.decode(1, int(prompt), int(prompt))
        alone = model.step_time.prefill(1, int(prompt), int(prompt) ** 2, int(prompt)) + max(output - 1, 0.0) * step
        sessions = scenario.workload.sessions
        pause = load.think if sessions is None else max(load.think, sessions.think)
        each = [window / (alone + pause) if window else float(least_completions(n)) for n in load.users]
        capped = [min(n, load.max_seconds / alone) for n in each] if not window else each
        before = max(0, users - 1) / load.spawn_rate / (alone + pause)  # while users are added
        requests = max(float(users), sum(capped) + before)
    else:
        users = 0
        requests = sum(rate * (load.settle + (load.seconds or load.max_seconds)) for rate in load.rate or [])
    steps = 0.0 if model.noise.silent else output
    return Size(users, requests, requests * (prompt + output), steps)


def check_size(
    scenario: Scenario, calibration: Calibration, replicates: int, lengths: RequestLengths | None = None
) -> None:
    """Raise `BadInput`, with the estimate, for a simulation that cannot run on this machine."""
    size = least_size(scenario, draw_machine(calibration, scenario.server, None, scenario.machine), lengths)
    if size.users <= FREE_USERS and size.tokens * replicates <= FREE_TOKENS:
        return _check_clock(scenario)
    memory = size.memory + replicates * REPLICATE
    seconds = max(size.requests, size.users) * replicates / SPEED / (os.cpu_count() or 1)
    there = _there()
    if memory <= there and seconds <= LONGEST:
        return _check_clock(scenario)
    many = "replicates" if replicates > 1e6 else _largest(scenario, size)
    raise BadInput(
        f"expected a simulation that can run here: {_words(size, replicates)} take at least {memory / 1e9:,.3g} GB of "
        f"memory (this machine has {there / 1e9:,.3g}) and {_duration(seconds)}",
        path=f"--{many}" if many == "replicates" else scenario.name,
        key=None if many == "replicates" else many,
    )


def check_measurable(scenario: Scenario) -> None:
    """Raise `BadInput` for a ladder whose users, or requests of an open loop, this machine cannot hold at once."""
    load = scenario.load
    key, most, each = "load.users", float(max(load.users or [0])), USER
    if load.rate is not None:  # the times of a rung are laid out before it begins
        key, most, each = "load.rate", max(load.rate) * (load.settle + (load.seconds or load.max_seconds)), TIME
    memory, there = most * each, _there()
    if most > FREE_USERS and memory > there:
        raise BadInput(
            f"expected a load that can be sent from here: {most:,.0f} {'requests' if load.rate else 'users'} take at "
            f"least {memory / 1e9:,.3g} GB of memory (this machine has {there / 1e9:,.3g})",
            path=scenario.name,
            key=key,
        )
    _check_clock(scenario)


def _check_clock(scenario: Scenario) -> None:
    """Raise `BadInput` for a ladder that lasts longer than the clock can resolve, naming the key that causes it."""
    load = scenario.load
    rungs = len(load.users or load.rate or [0])
    lasts = {"load.seconds": rungs * (load.seconds or 0.0), "load.max_seconds": rungs * load.max_seconds}
    if load.users is not None:
        lasts |= {"load.spawn_rate": max(load.users) / load.spawn_rate, "load.think": load.think}
        lasts |= {"load.retry": load.retry}
    else:
        lasts |= {"load.settle": rungs * load.settle}
    if scenario.workload.sessions is not None:
        lasts["workload.sessions.think"] = scenario.workload.sessions.think
    if load.seconds is not None or load.trace:
        del lasts["load.max_seconds"]
    key = max(lasts, key=lasts.__getitem__)
    if lasts[key] > LATEST:
        message = f"expected a ladder of at most {LATEST:,.0f} s, found one of {lasts[key]:.3g} s"
        raise BadInput(message, path=scenario.name, key=key)


def check_replicates(replicates: int) -> None:
    """Raise `BadInput` for more replicates than this machine holds the results of."""
    memory, there = replicates * REPLICATE, _there()
    if memory > there:
        raise BadInput(
            f"expected fewer: {replicates:,} take at least {memory / 1e9:,.3g} GB of memory (this machine has "
            f"{there / 1e9:,.3g})",
            path="--replicates",
        )


def _there() -> float:
    """The memory of this machine, bytes."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _largest(scenario: Scenario, size: Size) -> str:
    """The key of the scenario that contributes most."""
    load = scenario.load
    if load.trace:
        return "workload.trace"
    if load.users is not None and size.users > FREE_USERS:
        return "load.users"
    if size.steps * STEP > size.requests * REQUEST:
        return "workload.output_tokens"
    return "load.seconds" if load.rate is None or max(load.rate) < FREE_USERS else "load.rate"


def _words(size: Size, replicates: int) -> str:
    users = f"{size.users:,} users, " if size.users else ""
    return f"{users}{size.requests:.3g} requests and {size.tokens:.3g} tokens in each of {replicates:,} replicates"


def _duration(seconds: float) -> str:
    for unit, length in (("years", 365 * 86400.0), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:.3g} s"
