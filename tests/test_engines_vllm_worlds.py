"""Laws of the vLLM engine in random worlds with little room, and: many steps at a time change nothing."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import event, given, settings
from hypothesis import strategies as st

from sim.cluster.clock import Clock
from sim.cluster.replica import Replica
from sim.engines.engine import Scheduled
from sim.engines.vllm_v1 import Engine, Flags
from sim.model.calibration import Noise as Law
from sim.model.request import Request
from sim.steptime.linear import affine
from sim.steptime.noise import Noise

STEP_TIME = affine(a0=0.5, a1=1 / 64, b0=1.0, b1=1 / 32, b2=1 / 1024)
LAW = Law(prefill=[0.5, 1.5], decode=[0.8, 1.0, 1.2], drift=0.2, drift_seconds=24.0)


@dataclass(frozen=True)
class Arrival:
    time: float
    prompt: int
    new: int
    output: int
    shared: int  # tokens that it begins with as others do; -1: all, the answer too
    leaves: float | None
    priority: int


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Flags, list[Arrival], int | None]:
    size = draw(st.sampled_from([4, 16]))
    arrivals, time = [], 0.0
    for _ in range(draw(st.integers(1, 12))):
        time += draw(st.sampled_from([0.0, 0.0, 1.0, 3.0, 20.0]))
        prompt, new = draw(st.integers(1, 60)), draw(st.integers(1, 40))
        leaves = time + draw(st.sampled_from([0.5, 5.0, 30.0])) if draw(st.integers(0, 5)) == 0 else None
        output = draw(st.one_of(st.just(new), st.integers(1, new)))
        shared = draw(st.sampled_from([0, 0, prompt // 2, prompt, -1]))
        arrivals.append(Arrival(time, prompt, new, output, shared, leaves, draw(st.integers(0, 2))))
    flags = Flags(
        max_model_len=100,
        max_num_seqs=draw(st.sampled_from([1, 2, 4, 16])),
        max_num_batched_tokens=draw(st.sampled_from([16, 33, 100, 256])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 8])),
        scheduling_policy=draw(st.sampled_from(["fcfs", "fcfs", "priority"])),
        scheduler_reserve_full_isl=draw(st.booleans()),
        async_scheduling=draw(st.booleans()),
        enable_prefix_caching=draw(st.booleans()),
        block_size=size,
        num_gpu_blocks=1 + -(-100 // size) + draw(st.sampled_from([0, 1, 3, 50])),
    )
    return flags, arrivals, draw(st.sampled_from([None, None, 1, 2]))


def run(
    world: tuple[Flags, list[Arrival], int | None], observe: bool
) -> tuple[list[Request], Engine, list[Scheduled], list[str]]:
    """Simulate a world, one step at a time where `observe`; requests, engine, steps, and who came, ended or left."""
    flags, arrivals, seed = world
    clock, engine, steps, told = Clock(), Engine(flags), [], []
    if observe:
        engine.observer = steps.append
    noise = None if seed is None else Noise(LAW, seed)
    replica = Replica(clock, engine, STEP_TIME, lambda r: told.append(f"{r.id} {r.status}"), noise)
    requests = []
    for uid, a in enumerate(arrivals):
        request = Request(uid, a.prompt, a.output, a.new)
        request.priority, request.arrived = a.priority, a.time
        if a.shared:
            request.text = ((a.shared, "text"), (0, uid)) if a.shared > 0 else ((0, "text"),)
        requests.append(request)

    def leave(request: Request) -> None:
        if request.status == "":
            replica.cancel(request)

    for act, times in ((leave, [a.leaves for a in arrivals]), (replica.submit, [a.time for a in arrivals])):
        for request, at in zip(requests, times, strict=True):
            if at is not None:
                clock.call(at, act, request)
    clock.run()
    return requests, engine, steps, told


@given(worlds())
@settings(max_examples=120)
def test_many_steps_at_a_time_are_the_same_as_one_by_one(world: tuple[Flags, list[Arrival], int | None]) -> None:
    jumped, engine, _, told = run(world, observe=False)
    stepped, reference, _, told_by_reference = run(world, observe=True)
    event("preempts" if engine.preemptions else "has room")
    assert told == told_by_reference
    assert (engine.preemptions, engine.hit_tokens) == (reference.preemptions, reference.hit_tokens)
    for mine, theirs in zip(jumped, stepped, strict=True):
        assert mine.received == theirs.received
        if mine.status == "ok":
            assert abs(mine.first_token - theirs.first_token) <= 1e-9
            assert abs(mine.last_token - theirs.last_token) <= 1e-9


@given(worlds())
@settings(max_examples=120)
def test_laws(world: tuple[Flags, list[Arrival], int | None]) -> None:
    flags, arrivals, _ = world
    requests, engine, steps, _ = run(world, observe=True)
    ended = [r for r in requests if r.status == "ok"]
    assert len(ended) + sum(r.gone for r in requests) == len(requests)  # everybody ends, or left
    for r in ended:
        assert r.received == min(r.output_tokens, flags.max_model_len - r.prompt_tokens)
    state = engine.state()
    assert (state.waiting, state.running, state.kv_used) == (0, 0, 0)  # every block is given back
    computed: dict[int, int] = {}
    for step in steps:
        assert sum(row.tokens for row in step.rows) <= flags.max_num_batched_tokens
        assert len(step.rows) <= step.state.running <= flags.max_num_seqs
        assert step.state.kv_used + step.state.kv_free == (flags.num_gpu_blocks - 1) * flags.block_size
        for preempted in step.preempted:
            computed[preempted.id] = 0
        for row in step.rows:
            before = computed.get(row.request.id, 0)
            if before:
                assert row.computed == before  # nothing is skipped
            else:
                assert row.computed % flags.block_size == 0  # hits are whole blocks
                assert row.computed == 0 or flags.enable_prefix_caching
                assert not step.preempted  # nobody is admitted in a step that preempted
            computed[row.request.id] = row.computed + row.tokens
    if flags.scheduling_policy == "fcfs":  # first come, first admitted
        order = list(dict.fromkeys(row.request.id for step in steps for row in step.rows))
        came = sorted(order, key=lambda uid: (arrivals[uid].time, uid))
        assert order == came
