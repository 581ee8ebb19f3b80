"""Replay: the requests of a measured run are sent to the model, with the same users, lengths and points of the
server's round.

Resampled lengths, or rungs that start from an empty server, would add an error of 10-40 % that is sampling and not the
model's: a window has few requests, and history decides which users share a prefill.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Any

import numpy as np
import pandas as pd
from simpy import Event

from sim.cluster.clients import FOR_EVER, Patience
from sim.cluster.synchroniser import Synchroniser
from sim.cluster.testbed import Bench
from sim.model.errors import BadInput, NotEnoughData
from sim.model.machine import Machine
from sim.model.status import Status
from sim.model.warning import notice
from sim.model.workload import RequestSpec
from sim.randomness import BLOCK, Kind, Randomness
from sim.run import Run, Rung
from sim.steptime.work import StepWork

_TOGETHER = 0.005  # s: first tokens no further apart come from one prefill
ROUNDED = 1e-3  # s: where latencies are rounded to it, a user's next request may seem to begin before the last ended
_PROMPTLY = 0.05  # s: a server that takes up its first request within this, or within a prefill, was idle


class Recorded:
    """Each user's k-th request is the recorded one. Requests beyond the record are drawn from all that were *begun*:
    those that finished inside a window are biased towards short ones."""

    def __init__(self, requests: pd.DataFrame, seed: Sequence[int]):
        asked = list(asked_of(requests))
        self._of: dict[int, list[RequestSpec]] = {}
        for user, one in zip(requests["user"].tolist(), asked, strict=True):
            self._of.setdefault(user, []).append(one)
        self._all, self._random = asked, Randomness(seed)

    def requests(self, owner: int) -> Iterator[RequestSpec]:
        """See `Source.requests`."""
        drawn = (self._draw(owner, block) for block in count())
        return chain(self._of.get(owner, ()), chain.from_iterable(drawn))

    def _draw(self, owner: int, block: int) -> list[RequestSpec]:
        at = self._random.block(Kind.LENGTHS, owner, block).integers(len(self._all), size=BLOCK)
        return [self._all[i] for i in at.tolist()]


def replay(run: Run, model: Machine, seed: Sequence[int]) -> Run:
    """Simulate the ladder of a measured run. Rungs without a complete window are left out.

    Arrivals come at their recorded instants, and a late client's requests still count from when they were due. Users
    come, and windows begin, at the recorded points of the server's round (`Synchroniser`); windows are as long as the
    recorded ones. Each segment of a resumed run begins anew. Clients give up after as long as the recorded ones did.
    Raises `NotEnoughData` if no rung was finished.
    """
    run.scenario.check_alone("replayed")
    if run.scenario.workload.conversations is not None:
        raise BadInput("a run of sessions is not replayed: its requests do not name their sessions", path=run.name)
    run = with_users(run)
    parts = []
    for number, (start, ladder, requests) in enumerate(_segments(run)):
        source = Recorded(requests, (*seed, number))
        busy, patience = _busy_until(requests, model), patience_of(run.requests)
        bench = Bench(run.scenario, model, (*seed, number), source, start, busy, patience=patience)
        if any(rung.users is not None for rung in ladder):
            bench.clock.run(until=bench.clock.process(_climb(bench, ladder, requests)))
        else:
            sent, due = (iter(requests[name].tolist()) for name in ("sent", "scheduled"))
            bench.clients.arrive(sent, asked_of(requests), scheduled=due)
            bench.rungs.extend(rung for rung in ladder if rung.end > rung.settled)
            bench.clock.run(until=bench.rungs[-1].end)
        parts.append(bench.run())
    if not parts:
        raise NotEnoughData(f"{run.name}: no rung has a complete window")
    return parts[0] if len(parts) == 1 else _joined(parts)


def _climb(bench: Bench, ladder: Sequence[Rung], requests: pd.DataFrame) -> Generator[Event, Any, None]:
    """Climb a recorded ladder again: who came on each rung, and a window as long as the recorded one, if it has one."""
    clock, synchroniser = bench.clock, Synchroniser(bench.clock, bench.clients, requests)
    begun = requests.groupby("user")["sent"].min()
    came = np.searchsorted([rung.start for rung in ladder[1:]], begun, side="right")
    for number, rung in enumerate(ladder):
        yield from synchroniser.reach(rung.start)
        late = synchroniser.late
        for user, sent in begun[came == number].items():
            clock.call(float(sent) + late, bench.clients.add_user, int(str(user)))
        if not rung.end > rung.settled:
            continue
        yield from synchroniser.reach(rung.settled)
        settled, ramped = clock.now, rung.ramped + late
        yield clock.at(rung.end + synchroniser.late)
        bench.rungs.append(replace(rung, start=rung.start + late, ramped=ramped, settled=settled, end=clock.now))


def with_users(run: Run) -> Run:
    """The run with a user for every request. In a closed loop without users, each request is given to a user who was
    free; otherwise all requests would be those of one user.
    """
    unknown = run.requests["user"].to_numpy() < 0
    if not unknown.any() or not any(rung.users for rung in run.rungs):
        return run
    sent, ended = (run.requests[name].to_numpy(np.float64) for name in ("sent", "ended"))
    users = run.requests["user"].to_numpy().copy()
    for start, end in run.stretches:
        most = max((rung.users or 0 for rung in run.rungs if start <= rung.start < end), default=0)
        here = np.flatnonzero((sent >= start) & (sent < end))
        users[here] = lanes(sent[here].tolist(), ended[here].tolist(), most) if most else -1
    said = notice(
        "unknown-user",
        f"{run.name}: {int(unknown.sum())} requests do not name their user: each counts as one of a user who was free",
    )
    return replace(run, requests=run.requests.assign(user=users), warnings=[*run.warnings, said])


def lanes(sent: Sequence[float], ended: Sequence[float], users: int) -> list[int]:
    """Which of `users` sent each request: the one who became free last before it, or one who has not sent any yet.

    In a closed loop a request is sent because another has ended. One without an end keeps its user for good.
    """
    free: list[float] = []
    lane = [0] * len(sent)
    for i in sorted(range(len(sent)), key=sent.__getitem__):
        idle = [u for u, t in enumerate(free) if t <= sent[i] + ROUNDED]
        if not idle and len(free) < users:
            free.append(0.0)
            idle = [len(free) - 1]
        lane[i] = max(idle, key=free.__getitem__) if idle else min(range(users), key=free.__getitem__)
        free[lane[i]] = ended[i] if ended[i] == ended[i] else float("inf")
    return lane


def asked_of(requests: pd.DataFrame) -> Iterator[RequestSpec]:
    """The lengths of each request; one that did not end would have had an answer of full length."""
    back = np.where(requests["status"] == Status.OK, requests["output_tokens"], requests["max_new_tokens"])
    columns = (requests["prompt_tokens"].to_numpy(), np.maximum(back, 1), requests["max_new_tokens"].to_numpy())
    return map(RequestSpec, *(column.tolist() for column in columns))


def patience_of(requests: pd.DataFrame) -> Patience:
    """How long the clients of these requests waited before they gave one up; for ever, if they gave up none."""
    late = requests[requests["status"] == Status.TIMEOUT]
    if late.empty:
        return FOR_EVER
    return Patience(float((late["ended"] - late["sent"]).median()), whole=bool((late["output_tokens"] > 0).any()))


def _busy_until(requests: pd.DataFrame, model: Machine) -> float:
    """When the server began with the first of these requests, s, if it was busy with something else; else 0.

    Requests that arrive while a server is busy are prefilled together, and users of equal lengths stay together from
    then on.
    """
    earliest = float(requests["first_token"].min())
    first = requests[requests["first_token"] <= earliest + _TOGETHER]
    if first.empty:
        return 0.0
    prompts = first["prompt_tokens"].to_numpy(np.int64)
    attention = int((prompts * (prompts + 1) // 2).sum())
    took = model.step_time.line(StepWork(1, int(prompts.sum()), len(prompts), attention, int(prompts.max()))).first
    waited = earliest - took - float(first["sent"].min())
    return earliest - took if waited > max(_PROMPTLY, took) else 0.0


def _segments(run: Run) -> Iterator[tuple[float, list[Rung], pd.DataFrame]]:
    """Start, rungs up to the last complete one, and requests of each stretch in which the users ran without a break."""
    for start, end in run.stretches:
        rungs = [rung for rung in run.rungs if start <= rung.start < end]
        while rungs and not rungs[-1].end > rungs[-1].settled:
            rungs.pop()
        sent = run.requests["sent"]
        if rungs:
            yield start, rungs, run.requests[(sent >= start) & (sent < min(end, rungs[-1].end))]


def _joined(parts: list[Run]) -> Run:
    """One run of several segments; requests and rungs are numbered throughout."""
    first = parts[0]
    numbered, ids, rungs = [], 0, 0
    for part in parts:
        r = part.requests
        numbered.append(r.assign(id=r["id"] + ids, rung=r["rung"] + rungs))
        ids, rungs = ids + int(r["id"].to_numpy().max(initial=0)), rungs + len(part.rungs)
    return Run(
        kind=first.kind,
        name=first.name,
        scenario=first.scenario,
        rungs=[rung for part in parts for rung in part.rungs],
        requests=pd.concat(numbered, ignore_index=True),
        steps=pd.concat([part.steps for part in parts if part.steps is not None], ignore_index=True),
        step_ends=[ends for part in parts for ends in part.step_ends or []],
        stopped=first.stopped,
        engine=first.engine,
    )
