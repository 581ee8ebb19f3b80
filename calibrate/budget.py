"""The effective `max_batch_total_tokens`, read from what the router admitted and what it let wait.

A flash server ignores the flag and takes what its warm-up found free (`tgi-0.9.4.md` §2.2). Where `/info` was not
asked, behaviour tells: every batch it admitted fits (a lower bound), and a head of the queue that waited although
nothing else stood in its way did not (an upper bound).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibrate.draws import parameter
from calibrate.steps import Schedule
from sim.batch import Batch
from sim.calibration import Parameter
from sim.request import Request
from sim.run import Run
from sim.server import ServerConfig

_ON_THE_WAY = 0.02  # s: sent so long before a look, a request was in the queue by then
MEANING = "tokens all running requests may hold"
_BEYOND = 2.0  # an unseen upper bound is drawn up to so many times the largest batch seen


def fit_budget(
    runs: Sequence[Run], schedules: Sequence[Schedule], rng: np.random.Generator, n: int
) -> tuple[Parameter, list[float], list[str]] | None:
    """The parameter, its draws and doubts: what every run's `/info` (or scenario) says, if they agree, else what shows
    in the behaviour of those that do not say; None when they all say, and differ (then it was set for each of them)."""
    unknown = [(r, s) for r, s in zip(runs, schedules, strict=True) if known_budget(r) is None]
    if not unknown:
        said = {known_budget(r) for r in runs}
        told = said.pop()
        if said or told is None:
            return None
        return parameter(told, np.full(n, float(told)), "tokens", MEANING), [float(told)] * n, []
    bounds = [_bounds(run, schedule) for run, schedule in unknown]
    low = max(b[0] for b in bounds)
    high = min((b[1] for b in bounds if b[1] is not None and b[1] > low), default=None)
    top = high if high is not None else _BEYOND * low
    drawn = rng.uniform(low, top, n)
    doubt = f"max_batch_total_tokens is between {low} and {high} by what was admitted and what had to wait"
    if high is None:
        doubt = f"max_batch_total_tokens is at least {low}; it never bound, so how much more is not seen"
    draws = [float(round(x)) for x in drawn.tolist()]
    return parameter((low + top) / 2, drawn, "tokens", MEANING), draws, [doubt]


def known_budget(run: Run) -> int | None:
    """What the server said at `/info`, else what the scenario says."""
    told = run.server.max_batch_total_tokens
    return told if isinstance(told, int) else None


def _bounds(run: Run, schedule: Schedule) -> tuple[int, int | None]:
    """The largest use that was admitted, and the least that was not though nothing else stood in its way."""
    config = run.server
    asked = (run.requests[c].tolist() for c in ("prompt_tokens", "output_tokens", "max_new_tokens", "sent"))
    requests = [Request(i, p, max(o, 1), new, sent=s) for i, (p, o, new, s) in enumerate(zip(*asked, strict=True))]
    waiting = sorted(requests, key=lambda r: r.sent)
    batch = Batch(padded=config.requires_padding)
    low, high, since, head = 0, None, 1, 0
    taken: set[int] = set()
    steps = schedule.steps
    rows = (steps["kind"].tolist(), steps["members"].tolist(), steps["start"].tolist())
    for kind, members, start in zip(*rows, strict=True):
        if kind == "prefill":
            new = [requests[m] for m in members.tolist()]
            low = max(low, batch.used + _charged(new, config))
            batch.join(new)
            taken.update(r.id for r in new)
            since = 1
            continue
        while head < len(waiting) and waiting[head].id in taken:
            head += 1
        if head < len(waiting) and since >= config.max_waiting_tokens and waiting[head].sent + _ON_THE_WAY < start:
            wanted = batch.used + _charged([waiting[head]], config)
            high = wanted - 1 if high is None else min(high, wanted - 1)
        if len(batch):
            batch.advance(min(1, batch.steps_to_finish))
        since += 1
    return low, high


def _charged(new: Sequence[Request], config: ServerConfig) -> int:
    """What the router charges a prefill (queue.rs:197-230)."""
    if config.requires_padding:
        return len(new) * max(r.prompt_tokens for r in new) + sum(r.max_new_tokens for r in new)
    return sum(r.prompt_blocks + r.new_blocks for r in new)
