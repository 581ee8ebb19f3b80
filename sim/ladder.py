"""The ladder: users are added to those already running, rung by rung, as a measurement climbs it. One simulation.

Users of equal lengths fall into lock-step groups, and which grouping holds depends on how they came: rungs simulated
from empty are not what a ladder measures. `climb` decides its own rungs as `measure` does; `replay` repeats the users,
lengths and rung edges of a run that was measured.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from simpy import Event

from sim.clients import Clients
from sim.clock import Clock
from sim.errors import BadInput
from sim.model import Model
from sim.noise import Noise
from sim.replica import Replica
from sim.request import Request
from sim.run import Run, Rung
from sim.scenario import Load, Scenario
from sim.workload import Asked, Drawn, InOrder, Pairs, Source, arrival_gaps

LEAST_COMPLETIONS = 30  # of a window whose length is not given, and at least four a user (measuring.md, The ladder)


@dataclass(frozen=True)
class Start:
    """A user who begins at `time`, s since the run (or its segment) began."""

    time: float
    user: int


def climb(scenario: Scenario, model: Model, seed: Sequence[int], pairs: Pairs | None = None) -> Run:
    """Simulate a scenario's ladder once; `pairs` are the requests of its workload's file, if it names one.

    The same scenario, model and seed give the same run. Raises `CannotFit` before the clock starts.
    """
    bench = _Bench(scenario, model, seed, pairs)
    bench.check(pairs)
    load = scenario.load
    if load.trace:
        bench.process(_trace(bench, load, pairs))
    elif load.users is not None:
        bench.process(_closed(bench, load))
    else:
        bench.process(_open(bench, load))
    return bench.run()


def replay(
    scenario: Scenario,
    model: Model,
    seed: Sequence[int],
    rungs: Sequence[Rung],
    starts: Sequence[Start],
    source: Source,
    arrivals: Sequence[tuple[float, Asked]] = (),
) -> Run:
    """Simulate what was measured: `starts` of closed-loop users and `arrivals` of open-loop requests at their recorded
    instants, lengths from `source`, the windows of `rungs` unchanged."""
    bench = _Bench(scenario, model, seed, None)
    bench.clients.source = source
    for start in starts:
        event = bench.clock.at(start.time, value=start.user)
        assert event.callbacks is not None
        event.callbacks.append(lambda e: bench.clients.add_user(e._value))
    bench.clients.arrive(iter(arrivals))
    bench.rungs.extend(rungs)
    bench.clock.run(until=max(rung.end for rung in rungs))
    return bench.run()


class _Bench:
    """One server, its clients, and the rungs so far."""

    def __init__(self, scenario: Scenario, model: Model, seed: Sequence[int], pairs: Pairs | None):
        if scenario.replicas != 1:
            raise BadInput(f"expected 1, found {scenario.replicas}: fleets are not simulated yet", key="replicas")
        self.scenario, self.model = scenario, model
        lengths, delays, self.rng = (np.random.default_rng([*seed, stream]) for stream in range(3))
        self.clock = Clock()
        in_order = pairs is not None and scenario.workload.trace is not None
        source: Source = InOrder(pairs) if in_order and pairs else Drawn(scenario.workload, lengths, pairs)
        self.clients = Clients(
            self.clock,
            source,
            model.clocks,
            delays,
            think=scenario.load.think,
            retry=scenario.load.retry,
            output_attained=model.output_attained,
        )
        noise = None if model.noise.silent else Noise(model.noise, int(self.rng.integers(2**63)))
        self.replica = Replica(self.clock, model.server, model.step_time, self.clients.ended, noise)
        self.clients.replica = self.replica
        self.rungs: list[Rung] = []

    def check(self, pairs: Pairs | None) -> None:
        """Raise `CannotFit` if any request this workload can ask would starve the queue."""
        for asked in self._extremes(pairs):
            self.model.server.check_fits(asked.prompt_tokens, asked.max_new_tokens)

    def _extremes(self, pairs: Pairs | None) -> Iterator[Asked]:
        if pairs is not None:
            yield from map(
                Asked, *(c.tolist() for c in (pairs.prompt_tokens, pairs.output_tokens, pairs.max_new_tokens))
            )
            return
        probe = Drawn(self.scenario.workload, np.random.default_rng(0))
        for _ in range(10_000):
            yield probe.next(0)

    def process(self, rungs: Generator[Event, Any, None]) -> None:
        self.clock.run(until=self.clock.process(rungs))

    def run(self) -> Run:
        self.clients.abort()
        return Run(
            kind="simulated",
            name=self.scenario.name,
            scenario=msgspec.structs.replace(self.scenario, server=self.model.server),
            rungs=self.rungs,
            requests=self.clients.log.table([rung.start for rung in self.rungs]),
            steps=self.replica.step_table(),
            step_ends=self.replica.step_ends,
            stopped="all rungs of the list are done",
        )


def _closed(bench: _Bench, load: Load) -> Generator[Event, Any, None]:
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
        yield _settle(bench, start, users)
        settled = clock.now
        yield from _window(bench, load, users)
        bench.rungs.append(Rung(start=start, ramped=ramped, settled=settled, end=clock.now, users=users))


def _settle(bench: _Bench, start: float, users: int) -> Event:
    """Happens when every user has finished a request begun at this rung."""
    clock, clients = bench.clock, bench.clients
    missing = set(range(users))
    settled = clock.event()
    latest = start

    def ended(r: Request, at: float) -> None:
        nonlocal latest
        if r.sent >= start and r.user in missing:
            missing.discard(r.user)
            latest = max(latest, at)
            if not missing:
                clients.on_ended = _ignore
                _happen(settled, clock.at(max(latest, clock.now)))

    clients.on_ended = ended
    return settled


def _window(bench: _Bench, load: Load, users: int) -> Generator[Event, Any, None]:
    """Pass the steady window: `seconds`, or until enough requests have ended, but no longer than `max_seconds`."""
    clock = bench.clock
    if load.seconds is not None:
        yield clock.at(clock.now + load.seconds)
        return
    enough = clock.event()
    wanted = max(LEAST_COMPLETIONS, 4 * users)
    count = 0

    def ended(r: Request, at: float) -> None:
        nonlocal count
        count += 1
        if count == wanted:
            bench.clients.on_ended = _ignore
            _happen(enough, clock.at(max(at, clock.now)))

    bench.clients.on_ended = ended
    yield enough | clock.at(clock.now + load.max_seconds)
    bench.clients.on_ended = _ignore


def _open(bench: _Bench, load: Load) -> Generator[Event, Any, None]:
    clock, clients = bench.clock, bench.clients
    assert load.rate is not None
    for rate in load.rate:
        start = clock.now
        end = start + load.settle + (load.seconds or load.max_seconds)
        clients.arrive(_stream(load, rate, start, end, bench.rng, clients.source))
        yield clock.at(start + load.settle)
        settled = clock.now
        yield clock.at(end)
        bench.rungs.append(Rung(start=start, ramped=start, settled=settled, end=end, rate=rate))


def _stream(
    load: Load, rate: float, start: float, end: float, rng: np.random.Generator, source: Source
) -> Iterator[tuple[float, Asked]]:
    due = start
    while True:
        for gap in arrival_gaps(load.arrivals, rate, rng, 256).tolist():
            due += gap
            if due >= end:
                return
            yield due, source.next(-1)


def _trace(bench: _Bench, load: Load, pairs: Pairs | None) -> Generator[Event, Any, None]:
    clock = bench.clock
    if pairs is None or pairs.times is None:
        raise BadInput("expected a workload.trace with arrival times", key="load.trace")
    end = float(pairs.times[-1])
    if load.seconds is not None:
        end = min(end, load.settle + load.seconds)
    settled = min(load.settle, end / 2)
    times = pairs.times[pairs.times < end].tolist()
    bench.clients.arrive((due, bench.clients.source.next(-1)) for due in times)
    yield clock.at(end)
    rate = len(times) / end
    bench.rungs.append(Rung(start=0.0, ramped=0.0, settled=settled, end=end, rate=rate))


def _happen(what: Event, when: Event) -> None:
    assert when.callbacks is not None
    when.callbacks.append(what.trigger)


def _ignore(request: Request, ended: float) -> None:
    pass
