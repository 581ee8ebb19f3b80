"""The ladder: users are added to those already running, rung by rung, as a measurement climbs it. One simulation.

Users of equal lengths fall into lock-step groups, and which grouping holds depends on how they came: rungs simulated
from empty are not what a ladder measures.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import accumulate, islice, takewhile
from operator import gt
from typing import Any

import numpy as np
from simpy import Event

from sim.cluster.sessions import foreseen
from sim.cluster.testbed import Bench
from sim.model.errors import BadInput
from sim.model.files.lengths import arrivals
from sim.model.machine import Machine
from sim.model.request import Request
from sim.model.scenario import Load, Profile, Scenario, least_completions
from sim.model.server import EngineFlags
from sim.model.status import Status
from sim.model.workload import RequestLengths, RequestSpec, arrival_gaps, source_of
from sim.randomness import ARRIVALS, BLOCK, arrivals_at
from sim.run import Run, Rung

TOLD = 50  # times that a rung of its usual length tells how far it is
MOMENT = 1e-6  # s, which files tell apart: a window begins after the answer it waited for, and ends after its last


def climb(
    scenario: Scenario,
    model: Machine,
    seed: Sequence[int],
    lengths: RequestLengths | None = None,
    *,
    members: bool = False,
    progress: Callable[[float], None] | None = None,
    groups: Sequence[Machine] = (),
) -> Run:
    """Simulate a scenario's ladder once; `lengths` are the requests of its workload's file, if it names one, and
    `groups` the machines of its fleet's groups. With `members` the steps say whose they are. `progress` hears now and
    then about what share of the work is done.

    The same scenario, model and seed give the same run. Raises `CannotFit`, or `BadInput` where every request would be
    refused, before the clock starts.
    """
    bench = Bench(
        scenario,
        model,
        seed,
        source_of(scenario.workload, seed, lengths, model.output_attained),
        members=members,
        lengths=lengths,
        groups=groups,
    )
    for machine in groups or [model]:
        check_servable(scenario, machine.server, lengths)
    load = scenario.load
    if load.trace:
        rungs = _trace(bench, load, lengths)
    elif load.profile is not None:
        rungs = _profile(bench, load, load.profile)
    elif load.users is not None:
        rungs = _closed(bench, load)
    else:
        rungs = _open(bench, load)
    if progress is not None:
        _watch(bench, load, lengths, progress)
    bench.clock.run(until=bench.clock.process(rungs))
    return bench.run()


def check_servable(scenario: Scenario, server: EngineFlags, lengths: RequestLengths | None = None) -> None:
    """Raise `CannotFit` for a workload with a request that would wait for ever, `BadInput` where all would be refused;
    `server` is the scenario's with every flag known."""
    refused = True
    for asked in _askable(scenario, server, lengths):
        server.check_fits(asked.prompt_tokens, asked.max_new_tokens)
        refused &= server.refuses(asked.prompt_tokens, asked.max_new_tokens)
    if refused:
        raise BadInput(
            f"every request would be refused ({server.declared.refused_status}): the server takes {server.longest}",
            key="workload",
        )


def _watch(bench: Bench, load: Load, lengths: RequestLengths | None, progress: Callable[[float], None]) -> None:
    """Tell about how much is done: a rung counts by its load, up to what the server lets in, and by its time within."""
    clock, permits = bench.clock, (bench.scenario.server.permits or 0) * len(bench.replicas)
    work = [float(min(users, permits or users)) for users in load.users or []] or [
        float(rate) for rate in load.rate or [1.0]
    ]
    seconds = load.settle + (load.seconds or load.max_seconds)
    if load.trace and load.seconds is None:
        seconds = float(arrivals(bench.scenario.workload, lengths)[-1])
    if load.profile is not None:
        seconds = load.profile.lasts

    def tell(_: object) -> None:
        over = len(bench.rungs)
        since = bench.rungs[-1].end if bench.rungs else 0.0
        within = min((clock.now - since) / seconds, 1.0) * work[min(over, len(work) - 1)] if over < len(work) else 0.0
        progress(min((sum(work[:over]) + within) / sum(work), 1.0))
        clock.call(clock.now + seconds / TOLD, tell)

    clock.call(seconds / TOLD, tell)


def _askable(scenario: Scenario, server: EngineFlags, lengths: RequestLengths | None) -> Iterator[RequestSpec]:
    """Every request of the workload's file, or drawn ones (a longer one, should it come, is refused when it comes)."""
    work = scenario.workload
    if lengths is not None and work.conversations is None and not work.classes:
        return map(RequestSpec, *(column.tolist() for column in lengths[:3]))
    return islice(foreseen(scenario.workload, server, lengths), 1000)


def _closed(bench: Bench, load: Load) -> Generator[Event, Any, None]:
    clock, clients = bench.clock, bench.clients
    assert load.users is not None
    present = 0
    for users in load.users:
        start = clock.now
        for user in range(present, users):
            clients.add_user(user)
            yield clock.at(clock.now + 1.0 / load.spawn_rate)
        present = users
        ramped = clock.now
        yield _settle(bench, ramped, users)
        settled = clock.now
        yield from _window(bench, load, users)
        bench.rungs.append(Rung(start=start, ramped=ramped, settled=settled, end=clock.now, users=users))


def _settle(bench: Bench, ramped: float, users: int) -> Event:
    """Happens when every user has finished a request begun since all were there, as a measurement has it."""
    clock, clients = bench.clock, bench.clients
    missing = set(range(users))
    settled = clock.event()
    latest = ramped

    def ended(r: Request, at: float) -> None:
        nonlocal latest
        if r.sent >= ramped and r.user in missing:
            missing.discard(r.user)
            latest = max(latest, at)
            if not missing:
                clients.on_ended = _ignore
                _happen(settled, clock.at(max(latest, clock.now) + MOMENT))

    clients.on_ended = ended
    return settled


def _window(bench: Bench, load: Load, users: int) -> Generator[Event, Any, None]:
    """Pass the steady window: `seconds`, or until enough requests have ended, but no longer than `max_seconds`."""
    clock = bench.clock
    if load.seconds is not None:
        yield clock.at(clock.now + load.seconds)
        return
    enough = clock.event()
    wanted = least_completions(users)
    count = 0

    def ended(r: Request, at: float) -> None:
        nonlocal count
        count += r.status == Status.OK  # a user who is refused asks five times a second
        if count == wanted:
            bench.clients.on_ended = _ignore
            _happen(enough, clock.at(max(at, clock.now) + MOMENT))

    bench.clients.on_ended = ended
    yield enough | clock.at(clock.now + load.max_seconds)
    bench.clients.on_ended = _ignore


def _open(bench: Bench, load: Load) -> Generator[Event, Any, None]:
    clock, clients = bench.clock, bench.clients
    assert load.rate is not None
    for number, rate in enumerate(load.rate):
        start = clock.now
        end = start + load.settle + (load.seconds or load.max_seconds)
        before = load.rate[:number].count(rate)
        owner, gaps = arrivals_at(rate, before), arrival_gaps(load.arrivals, rate, bench.seed, before)
        due = takewhile(partial(gt, end), islice(accumulate(gaps, initial=start), 1, None))
        clients.arrive(due, clients.source.requests(owner), owner)
        yield clock.at(start + load.settle)
        settled = clock.now
        yield clock.at(end)
        bench.rungs.append(Rung(start=start, ramped=start, settled=settled, end=end, rate=rate))


def _profile(bench: Bench, load: Load, profile: Profile) -> Generator[Event, Any, None]:
    """Arrivals of unit rate on a clock that runs with the profile: another level of it keeps them in order."""
    clock, clients = bench.clock, bench.clients
    edges, due = profile.cumulated
    owner, gaps = arrivals_at(1.0), arrival_gaps(load.arrivals, 1.0, bench.seed)
    whole = float(due[-1])

    def sent() -> Iterator[float]:
        passed = 0.0
        while passed < whole:
            block = passed + np.cumsum(list(islice(gaps, BLOCK)))
            passed = float(block[-1])
            yield from np.interp(block[block < whole], due, edges).tolist()

    clients.arrive(sent(), clients.source.requests(owner), owner)
    end = float(edges[-1])
    yield clock.at(end)
    settled = min(load.settle, end / 2)
    bench.rungs.append(Rung(start=0.0, ramped=0.0, settled=settled, end=end, rate=whole / end))


def _trace(bench: Bench, load: Load, lengths: RequestLengths | None) -> Generator[Event, Any, None]:
    clock = bench.clock
    due = arrivals(bench.scenario.workload, lengths)
    end = float(due[-1])
    settled = min(load.settle, end / 2)
    if load.seconds is not None:
        end = min(end, settled + load.seconds)
    sent = due[due <= end].tolist()
    bench.clients.arrive(iter(sent), bench.clients.source.requests(ARRIVALS))
    yield clock.at(end + MOMENT)  # the last one is sent, too
    rate = int((due < end).sum()) / end
    bench.rungs.append(Rung(start=0.0, ramped=0.0, settled=settled, end=end, rate=rate))


def _happen(what: Event, when: Event) -> None:
    assert when.callbacks is not None
    when.callbacks.append(what.trigger)


def _ignore(request: Request, ended: float) -> None:
    pass
