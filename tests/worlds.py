"""Random worlds - a server with little room, and who comes - and what the simulator makes of one."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import strategies as st
from reference import Arrival, History, World, ceil16

from sim.cluster.clock import Clock
from sim.cluster.frontend import FrontEnd
from sim.cluster.replica import Replica
from sim.engines.tgi_0_9_4 import Engine, Flags
from sim.model.request import Request
from sim.model.steps import Call
from sim.steptime.linear import Linear, affine
from sim.steptime.noise_parameters import Noise

LAW = Noise(
    prefill=[0.5, 1.0, 1.5],
    decode=[0.8, 0.9, 1.0, 1.3],
    drift=0.2,
    drift_seconds=24.0,
    drift_skew=0.8,
    between=0.1,
    prefill_share=0.6,
)
REMEMBERING = msgspec.structs.replace(LAW, memory=0.5)


def jump(world: World) -> History:
    """The simulator's history of a world."""
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

    def count() -> None:
        history.held.append((clock.now, front.in_use))

    def ended(r: Request) -> None:
        count()
        assert r.id not in history.outcome, "a request ended twice"
        history.outcome[r.id], history.ended[r.id] = r.status, r.last_token

    def leave(r: Request) -> None:
        if r.queued == r.queued and r.id not in history.outcome:
            history.outcome[r.id], history.ended[r.id] = "gone", clock.now
            front.cancel(r)
            count()

    def submit(r: Request) -> None:
        history.came.append(r.id)
        front.submit(r)
        count()

    clock = Clock()
    engine = Engine(world.config)
    front = FrontEnd(clock, ended, world.config.permits)
    front.replica = Replica(clock, engine, world.step_time, front.ended, world.new_noise(), record)
    for act, times in ((leave, [a.leaves for a in world.arrivals]), (submit, [a.time for a in world.arrivals])):
        for r, time in zip(requests, times, strict=True):
            if time is not None:
                clock.at(time).callbacks.append(lambda _, act=act, r=r: act(r))
    clock.run()
    count()
    history.backpressure, history.wait_exceeded = engine.backpressure, engine.wait_exceeded
    assert front.in_use == 0
    state = engine.state()
    assert (state.waiting, state.queued_tokens, state.running, state.kv_used) == (0, 0, 0, 0)
    return history


def multiples(unit: float, most: int, least: int = 0) -> st.SearchStrategy[float]:
    return st.integers(least, most).map(lambda n: n * unit)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """A few requests on a server with little room, in units of which sums are exact, so that instants coincide."""
    padded = draw(st.booleans())
    most = draw(st.sampled_from([1, 5, 20, 20, 70]))
    lengths = st.integers(1, most)
    gaps = st.sampled_from([0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 7.0, 40.0])
    faithful = draw(st.sampled_from([0, 1, 5]))  # how many stay for one that leaves; 0: all stay
    arrivals, time = [], 0.0
    for _ in range(draw(st.integers(1, 30))):
        time += draw(gaps)
        new = draw(lengths)
        output = draw(st.one_of(st.just(new), st.integers(1, new)))
        unfaithful = faithful > 0 and draw(st.integers(0, faithful)) == 0
        leaves = time + draw(st.sampled_from([1, 2, 3, 5, 10, 30])) if unfaithful else None
        arrivals.append(Arrival(time, draw(lengths), new, output, leaves))
    size = (lambda n: n) if padded else ceil16
    room = st.one_of(st.integers(0, 40), st.integers(0, 300), st.just(10_000))
    config = Flags(
        max_batch_prefill_tokens=max(size(a.prompt) for a in arrivals) + draw(room),
        max_batch_total_tokens=max(size(a.prompt) + size(a.new) for a in arrivals) + draw(room),
        waiting_served_ratio=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.2, 1.3, 2.0])),
        max_waiting_tokens=draw(st.integers(0, 20)),
        max_concurrent_requests=draw(st.sampled_from([1, 2, 4, 8, 128, 128, 128])),
        max_input_length=draw(st.sampled_from([most, max(1, most - 3), max(1, most // 2)])),
        max_total_tokens=2 * most,
        requires_padding=padded,
    )
    unit = draw(st.sampled_from([1.0, 0.125, 1 / 3, 0.0173]))  # thirds round, so a boundary is not what its sum is
    slope = draw(st.sampled_from([0, 2]))  # 0: whole times, so that arrivals meet the ends of steps
    form = "padded" if padded and draw(st.booleans()) else "affine"
    coefficients = {
        "a0": draw(multiples(unit, 4, 1)),
        "a1": draw(multiples(unit / 8, slope)),
        "a2": draw(multiples(unit / 64, slope // 2)),
        "b0": draw(multiples(unit, 4, 1)),
        "b1": draw(multiples(unit / 8, slope)),
        "b2": draw(multiples(unit / 64, slope)),
        "b3": draw(multiples(unit / 64, slope)),
        "c0": draw(multiples(unit, 2)),
        "f0": draw(multiples(unit, 2)),
        "f1": draw(multiples(unit / 8, slope // 2)),
    }
    if form == "padded":
        coefficients |= {name: draw(multiples(unit / 64, slope // 2)) for name in ("a4", "c2", "f2")}
    step_time = Linear(form, coefficients)
    law = draw(st.sampled_from([None, None, LAW, REMEMBERING]))
    return World(config, step_time, arrivals, None if law is None else (law, draw(st.integers(0, 99))))


def crowd(seed: int, padded: bool, ratio: float, n: int = 400) -> World:
    """Many requests on a server with room for some hundred of them: more than hypothesis would draw."""
    rng = np.random.default_rng(seed)
    config = Flags(
        max_batch_prefill_tokens=1_500,
        max_batch_total_tokens=700_000 if padded else 14_000,
        waiting_served_ratio=ratio,
        max_waiting_tokens=12,
        max_concurrent_requests=200,
        requires_padding=padded,
    )
    times = np.cumsum(rng.integers(0, 4, n)).tolist()
    new = rng.integers(1, 120, n)
    lengths = zip(times, rng.integers(1, 40, n).tolist(), new.tolist(), rng.integers(1, new + 1).tolist(), strict=True)
    arrivals = [Arrival(float(t), p, m, o, t + 50.0 if rng.random() < 0.05 else None) for t, p, m, o in lengths]
    return World(config, affine(a0=1.0, a1=1 / 64, b0=8.0, b1=1 / 16, b2=1 / 512, c0=1.0, f0=1.0), arrivals)
