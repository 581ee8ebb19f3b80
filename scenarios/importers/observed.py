"""The load that the requests themselves show, by when they were sent and when they ended.

Closed loop: the users are the requests in flight. Open loop: the rate is that of the arrivals, and a changing rate is
reported (Laplace's test for a trend, Cox and Lewis, The Statistical Analysis of Series of Events, 1966, §3.3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sim.cluster.replay import ROUNDED
from sim.model.warning import Notice, notice
from sim.model.workload import Cv, Gamma

Floats = NDArray[np.float64]

BRIEF = 0.01  # of the time: more in flight for less time is an end that the tool recorded late, not another user
ALWAYS = 0.95  # of the users in flight on average: an open loop's numbers vary more
AS_SAID = 0.01  # relative: a rate this close to the tool's setting is taken to be the setting
BURST = 0.1  # of the time measured: requests that were sent within less came all at once
TREND = 2.576  # standard deviations: 1 % of steady streams look as if their rate changed


@dataclass(frozen=True, kw_only=True)
class Load:
    """Users (closed loop), or requests/s (open loop) with how they arrive; what is to be said about it."""

    users: int | None = None
    rate: float | None = None
    arrivals: str | Gamma = "poisson"
    warnings: tuple[Notice, ...] = ()


@dataclass(frozen=True)
class RequestTimes:
    """When each request was due (open loop; else sent), sent and over, s; `known` where the end is."""

    due: Floats
    sent: Floats
    ended: Floats
    known: NDArray[np.bool_]


def closed_loop(requests: RequestTimes, said: int | None) -> Load:
    """The load of users who wait for their answers; `said` is the number that the tool states."""
    most, held = _in_flight(requests)
    if said is None:
        return Load(users=max(1, most))
    users = most if most < said and requests.known.all() else max(said, held)
    if users == said or not users:
        return Load(users=said)
    warning = notice(
        "load-differs",
        f"the file says {said} users, but {users} requests were in flight at most: the load is {users} users",
    )
    return Load(users=users, warnings=(warning,))


def open_loop(
    requests: RequestTimes,
    said: float | None = None,
    arrivals: str | Gamma | None = None,
    window: tuple[float, float] = (-np.inf, np.inf),
) -> Load:
    """The load of arrivals that wait for no answer; `said` and `arrivals` are what the tool states, and `window` is
    what it measured, without warm-up."""
    due = np.sort(requests.due)
    inside = due[(due >= window[0]) & (due < window[1])]
    due = inside if len(inside) > 1 else due
    span = float(due[-1] - due[0]) if len(due) else 0.0
    if not span > ROUNDED:
        if said is not None and len(due) < 2:
            return Load(rate=said, arrivals=arrivals or "poisson")
        return replace(
            closed_loop(requests, None),
            warnings=(notice("burst", "all requests were sent at the same time, so they are one burst of users"),),
        )
    rate = (len(due) - 1) / span
    warnings = []
    if said is not None and abs(rate / said - 1) <= AS_SAID:
        rate = said
    elif said is not None:
        warnings.append(
            notice("load-differs", f"the file says {said:.4g} requests/s, but {rate:.4g}/s came: that is the load")
        )
    changed = _trend(due)
    if changed is not None:
        warnings.append(
            notice(
                "rate-changed",
                f"the rate changed, from {changed[0]:.3g} requests/s in the first third to {changed[1]:.3g}/s in the "
                "last: no steady load, but a trace, which is replayed as it was recorded",
            )
        )
    return Load(rate=float(f"{rate:.6g}"), arrivals=arrivals or _regularity(due), warnings=tuple(warnings))


def unstated_load(requests: RequestTimes) -> Load:
    """The load where the tool does not state whether users waited for their answers."""
    most, _ = _in_flight(requests)
    sent, ended = requests.sent[requests.known], requests.ended[requests.known]
    if len(sent) > 2 * most and most:
        low, high = float(np.sort(sent)[most - 1]), float(np.max(sent))  # between ramp and drain
        busy = np.maximum(0.0, np.minimum(ended, high) - np.maximum(sent, low)).sum()
        busy += (~requests.known).sum() * float(np.mean(ended - sent))  # as long as the others took, for want of an end
        if high > low and busy >= ALWAYS * most * (high - low):
            return Load(
                users=most,
                warnings=(
                    notice("load-guessed", f"the load is not stated; {most} requests were in flight all the time"),
                ),
            )
    if len(sent) <= 1 or float(np.ptp(requests.due)) <= BURST * float(ended.max() - sent.min()):
        return Load(
            users=max(1, most),
            warnings=(notice("load-guessed", f"the load is not stated; {most} requests were sent at once"),),
        )
    load = open_loop(requests)
    said = notice(
        "load-guessed", f"the load is not stated; requests came at {load.rate:.4g}/s, whether or not others had ended"
    )
    return replace(load, warnings=(said, *load.warnings))


def at_once(requests: RequestTimes, seconds: float) -> bool:
    """Whether all requests of a test that took so long were sent together."""
    return float(np.ptp(requests.sent)) <= BURST * seconds


def gamma_arrivals(burstiness: float) -> str | Gamma:
    """Arrivals by vLLM's burstiness: the shape of gamma-distributed gaps, 1 for Poisson arrivals."""
    if not np.isfinite(burstiness):
        return "constant"
    return "poisson" if burstiness == 1 else Gamma(gamma=Cv(cv=round(burstiness**-0.5, 6)))


def _in_flight(requests: RequestTimes) -> tuple[int, int]:
    """The most requests in flight, ever and for longer than `BRIEF`; ends count early by what times are rounded to."""
    sent, ended = requests.sent[requests.known], requests.ended[requests.known]
    ended = np.maximum(sent, ended - ROUNDED)
    times = np.concatenate([sent, ended])
    change = np.concatenate([np.ones(len(sent)), -np.ones(len(ended))])
    order = np.lexsort((change, times))
    level = np.cumsum(change[order])
    if not len(level):
        return 0, 0
    lasting = np.diff(times[order], append=times[order][-1])
    most = int(level.max())
    needed = BRIEF * lasting.sum()
    held = next((n for n in range(most, 0, -1) if lasting[level >= n].sum() > needed), most)
    return max(most, 1), held


def _trend(due: Floats) -> tuple[float, float] | None:
    """The rates of the first and the last third, if arrivals moved through the time; None for a steady stream."""
    at = (due - due[0]) / (due[-1] - due[0])
    inside = at[1:-1]
    if len(inside) < 10 or abs(float(inside.mean()) - 0.5) * (12 * len(inside)) ** 0.5 <= TREND:
        return None
    third = (due[-1] - due[0]) / 3
    return float((at < 1 / 3).sum() / third), float((at > 2 / 3).sum() / third)


def _regularity(due: Floats) -> str:
    gaps = np.diff(due)
    return "constant" if len(gaps) > 2 and gaps.std() < 0.1 * gaps.mean() else "poisson"
