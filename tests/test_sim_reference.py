"""Jumping over runs of steps changes nothing: the same calls, members and token times as one step at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
from hypothesis import event, given
from hypothesis import strategies as st
from reference import Arrival, History, Reference, World, ceil16

from sim.calibration import Noise
from sim.clock import Clock
from sim.forms import Affine, Padded
from sim.replica import Call, Replica
from sim.request import Request
from sim.server import ServerConfig

LAW = Noise(prefill=[0.5, 1.0, 1.5], decode=[0.8, 0.9, 1.0, 1.3], drift=0.2, drift_seconds=24.0, between=0.1)
REMEMBERING = msgspec.structs.replace(LAW, memory=0.5)


def jump(world: World) -> History:
    """The simulator's history of a world, and the laws every world obeys while it runs."""
    history = History(tokens={uid: [] for uid in range(len(world.arrivals))})
    requests = [Request(uid, a.prompt, a.output, a.new) for uid, a in enumerate(world.arrivals)]

    def record(call: Call) -> None:
        uids = tuple(r.id for r in call.members)
        alone = call.op == "prefill" or (call.op == "filter" and history.calls[-1][0] == "prefill")
        start = call.start
        for step, end in enumerate(call.ends, 1):
            history.calls.append((call.op, start, end, uids, None if alone else call.used))
            start = end
            if call.op != "filter":
                for r in call.members:
                    if step < len(call.ends) or not r.gone:
                        history.tokens[r.id].append(end)

    def ended(r: Request) -> None:
        assert r.id not in history.outcome, "a request ended twice"
        history.outcome[r.id], history.ended[r.id] = r.status, r.last_token

    def leave(r: Request) -> None:
        if r.queued == r.queued and r.id not in history.outcome:
            history.outcome[r.id] = "gone"
            replica.leave(r)

    clock = Clock()
    replica = Replica(clock, world.config, world.step_time, ended, world.new_noise(), record)
    for act, times in ((leave, [a.leaves for a in world.arrivals]), (replica.submit, [a.time for a in world.arrivals])):
        for r, time in zip(requests, times, strict=True):
            if time is not None:
                clock.at(time).callbacks.append(lambda _, act=act, r=r: act(r))
    clock.run()
    history.backpressure, history.wait_exceeded = replica.batcher.backpressure, replica.batcher.wait_exceeded
    batcher = replica.batcher
    assert (batcher.in_use, batcher.gone, len(batcher.batch), batcher.batch.used) == (0, 0, 0, 0)
    return history


def assert_same(world: World) -> History:
    ours, theirs = jump(world), Reference(world).history
    for mine, reference in zip(ours.calls, theirs.calls, strict=False):
        assert (mine[0], mine[3], mine[4]) == (reference[0], reference[3], reference[4])
        assert math.isclose(mine[1], reference[1], rel_tol=0, abs_tol=1e-9)
        assert math.isclose(mine[2], reference[2], rel_tol=0, abs_tol=1e-9)
    assert len(ours.calls) == len(theirs.calls)
    assert ours.outcome == theirs.outcome
    assert ours.ended.keys() == theirs.ended.keys()
    for uid, times in theirs.tokens.items():
        assert len(ours.tokens[uid]) == len(times)
        assert all(abs(a - b) <= 1e-9 for a, b in zip(ours.tokens[uid], times, strict=True))
    assert all(abs(ours.ended[uid] - at) <= 1e-9 for uid, at in theirs.ended.items())
    assert (ours.backpressure, ours.wait_exceeded) == (theirs.backpressure, theirs.wait_exceeded)
    return theirs


def multiples(unit: float, most: int, least: int = 0) -> st.SearchStrategy[float]:
    return st.integers(least, most).map(lambda n: n * unit)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """A few requests on a server with little room, in units of which sums are exact, so that instants coincide."""
    padded = draw(st.booleans())
    most = draw(st.sampled_from([1, 5, 20, 70]))
    lengths = st.integers(1, most)
    gaps = st.sampled_from([0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 7.0, 40.0])
    faithful = draw(st.sampled_from([0, 1, 5]))  # how many stay for one that leaves; 0: all stay
    arrivals, time = [], 0.0
    for _ in range(draw(st.integers(1, 30))):
        time += draw(gaps)
        new = draw(lengths)
        output = draw(st.one_of(st.just(new), st.integers(1, new)))
        leaves = (
            time + draw(st.sampled_from([1, 2, 3, 5, 10, 30]))
            if faithful and draw(st.integers(0, faithful)) == 0
            else None
        )
        arrivals.append(Arrival(time, draw(lengths), new, output, leaves))
    size = (lambda n: n) if padded else ceil16
    room = st.one_of(st.integers(0, 40), st.integers(0, 300), st.just(10_000))
    config = ServerConfig(
        max_batch_prefill_tokens=max(size(a.prompt) for a in arrivals) + draw(room),
        max_batch_total_tokens=max(size(a.prompt) + size(a.new) for a in arrivals) + draw(room),
        waiting_served_ratio=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.2, 1.3, 2.0])),
        max_waiting_tokens=draw(st.integers(0, 20)),
        max_concurrent_requests=draw(st.sampled_from([1, 2, 4, 8, 128])),
        max_input_length=draw(st.sampled_from([most, most, max(1, most - 3)])),
        max_total_tokens=2 * most,
        requires_padding=padded,
    )
    unit = draw(st.sampled_from([1.0, 0.125, 1 / 3, 0.0173]))  # thirds round, so a boundary is not what its sum is
    form = Padded if padded and draw(st.booleans()) else Affine
    step_time = form(
        a0=draw(multiples(unit, 4, 1)),
        a1=draw(multiples(unit / 8, 2)),
        a2=draw(multiples(unit / 64, 1)),
        b0=draw(multiples(unit, 4, 1)),
        b1=draw(multiples(unit / 8, 2)),
        b2=draw(multiples(unit / 64, 2)),
        b3=draw(multiples(unit / 64, 2)),
        c0=draw(multiples(unit, 2)),
        f0=draw(multiples(unit, 2)),
        f1=draw(multiples(unit / 8, 1)),
    )
    law = draw(st.sampled_from([None, None, LAW, REMEMBERING]))
    return World(config, step_time, arrivals, None if law is None else (law, draw(st.integers(0, 99))))


@given(worlds())
def test_jump_and_reference_agree(world: World) -> None:
    history = assert_same(world)
    event("concatenates" if history.backpressure + history.wait_exceeded else "one batch at a time")


@given(worlds(), st.data())
def test_they_agree_on_arrivals_at_the_very_instant_a_step_ends_and_one_ulp_off(
    world: World, data: st.DataObject
) -> None:
    history = Reference(world).history
    ends = st.sampled_from([call[2] for call in history.calls] or [0.0])
    model = world.arrivals[0]
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(ends)
        at = data.draw(st.sampled_from([end, end, math.nextafter(end, 0.0), math.nextafter(end, math.inf)]))
        leaves = data.draw(st.sampled_from([None, None, *(call[2] for call in history.calls)]))
        new = Arrival(at, model.prompt, model.new, model.output, leaves if leaves and leaves > at else None)
        world = replace(world, arrivals=sorted([*world.arrivals, new], key=lambda a: a.time))
    assert_same(world)
