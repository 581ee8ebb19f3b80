"""The vLLM engine in random worlds with little room: laws, and the reference, step by step and many at a time."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import event, given, reject
from hypothesis import strategies as st
from reference_vllm import Livelock
from schedule_vllm import (
    Arrival,
    CostModel,
    Recording,
    Replayed,
    by_reference,
    differences,
    request_of,
    simulated,
)

from sim.cluster.clock import Clock
from sim.cluster.replica import Replica
from sim.engines.vllm_v1 import Engine
from sim.model.request import Request
from sim.steptime.linear import affine
from sim.steptime.noise import Noise
from sim.steptime.noise_parameters import Noise as Law
from sim.steptime.work import StepWork

VERSIONS = ["0.32.0"] * 5 + ["0.25.1", "0.20.2", "0.17.1", "0.14.1", "0.11.2"]  # one of each set of rules
LENGTH = 100  # of the model
STEP_TIME = affine(a0=0.5, a1=1 / 64, b0=1.0, b1=1 / 32, b2=1 / 1024)
LAW = Law(prefill=[0.5, 1.5], decode=[0.8, 1.0, 1.2], drift=0.2, drift_seconds=24.0)


def arrivals(random: Random, requests: int) -> list[Arrival]:
    """Requests of strangers, of chats that ask again with all that was said, and of several with one system prompt.

    Times and step times share a grid, so that much happens at the very tick at which a step ends.
    """
    drawn: list[Arrival] = []
    said: dict[str, int] = {}  # tokens of each chat
    system = random.choice([0, 0, 7, 16, 40])
    time = 0
    for uid in range(requests):
        time += random.choice([0, 0, 0, 0, 5, 10, 30, 200])
        chat = random.choice(["", "", "first", "second"])
        prompt = random.randint(1, 60)
        if chat:
            prompt = min(said.get(chat, system) + random.randint(1, 20), LENGTH - 1)
        new = random.randint(1, 40)
        output = random.choice([new, random.randint(1, new)])  # fewer: by a stop token
        segments: tuple[tuple[int, str], ...] = ()
        if chat:
            said[chat] = prompt + output
            segments = ((system, "system"), (0, chat)) if system else ((0, chat),)
        elif system and random.random() < 0.5:
            segments = ((system, "system"), (0, f"{uid}"))
        leaves = time + random.choice([0, 5, 10, 35, 200]) if random.random() < 0.2 else None
        drawn.append(Arrival(uid, time, prompt, new, output, random.randrange(3), leaves, segments=segments))
    return drawn


def world(seed: int, requests: int) -> Recording:
    """Arrivals at an engine with little room, and what the reference makes of them."""
    random = Random(seed)
    size, chunked = random.choice([4, 16]), random.random() < 0.8
    cap, version = random.choice([0, 0, 1, 8]), random.choice(VERSIONS)
    newest = version == VERSIONS[0]
    config: dict[str, Any] = {
        "engine": "vllm",
        "version": version,
        "max_model_len": LENGTH,
        "max_num_seqs": random.choice([1, 2, 4, 8, 8]),
        "max_num_batched_tokens": random.choice([8, 16, 33, LENGTH, 256] if chunked else [LENGTH, 130]),
        "enable_chunked_prefill": chunked,
        "long_prefill_token_threshold": cap,
        "long_prefill_token_threshold_adaptive": newest and cap > 0 and random.random() < 0.5,
        "policy": random.choice(["fcfs", "fcfs", "priority"]),
        "max_num_active_seqs": random.choice([None] * 7 + [1]) if newest else None,
        "scheduler_reserve_full_isl": random.random() < 0.5,
        "watermark": random.choice([0.0, 0.0, 0.1, 0.3]),
        "async_scheduling": random.random() < 0.5,
        "block_size": size,
        "enable_prefix_caching": random.random() < 0.75,
        "num_gpu_blocks": 1 + -(-LENGTH // size) + random.choice([0, 0, 0, 1, 3, 8]),
    }
    costs = CostModel(10, random.choice([8, 10**9]), random.choice([2, 10**9]))
    try:
        return by_reference(Recording("world", config, costs, arrivals(random, requests), [], {}))
    except Livelock:
        reject()


# drawn by a seed, not value by value: Hypothesis prefers extreme values, with which little happens here
worlds = st.builds(world, st.integers(0, 2**40), st.integers(1, 12))


@given(worlds)
def test_every_step_is_the_reference_s(world: Recording) -> None:
    begun = {row[0]: row[3] for step in reversed(world.steps) for row in reversed(step.batch)}
    if any(begun.values()):
        event("hits")
    if any(fate.preemptions for fate in world.requests.values()):
        event("preempts")
    found = differences(world)
    assert not found, "\n".join(found[:5])


@given(worlds)
def test_many_steps_at_a_time_end_as_the_reference_does(world: Recording) -> None:
    requests, replica = simulated(world)
    for uid, fate in world.requests.items():
        request = requests[uid]
        assert request.gone == (fate.finish == "abort")
        assert request.received == len(fate.token_times) or request.gone
        if not request.gone:
            assert (request.first_token, request.last_token) == (fate.token_times[0], fate.token_times[-1])
    engine = replica.engine
    assert isinstance(engine, Engine)
    assert engine.scheduler.preemptions == sum(fate.preemptions for fate in world.requests.values())


@given(worlds)
def test_laws(world: Recording) -> None:
    config, size = world.config, world.config["block_size"]
    arrivals = {a.uid: a for a in world.arrivals}
    texts = {a.uid: _text(a) for a in world.arrivals}
    mine = Replayed(world)
    known = {uid: a.prompt_tokens for uid, a in arrivals.items()}  # a bound: counted when a token's step is scheduled
    computed: dict[int, int] = {}  # of those running
    written: set[tuple[object, ...]] = set()  # texts up to the end of each whole block that was ever computed
    usable = config["num_gpu_blocks"] - 1
    for step in mine.steps:
        rows = step["batch"]
        assert sum(tokens for _, tokens, _, _ in rows) <= config["max_num_batched_tokens"]
        assert len(rows) <= step["running"] <= config["max_num_seqs"]
        assert step["work"] == _work(rows)
        gone = [uid for uid in computed if _over(mine, arrivals[uid], step["ts"])]
        for uid in [*step["preempted"], *gone]:
            computed.pop(uid, None)
        for uid, tokens, _, before in rows:
            if uid in computed:
                assert before == computed[uid]  # nothing is skipped, and nothing computed twice
            else:
                assert not step["preempted"]  # nobody is admitted in a step that preempted
                assert before % size == 0 and before < known[uid]  # whole blocks, and never all that is known
                for end in range(size, before + 1, size):  # what a hit finds was computed once, but under priority:
                    # there a victim's tokens of the same step are taken back, and their entries stay
                    assert texts[uid][:end] in written or config["policy"] == "priority"
            computed[uid] = before + tokens
            known[uid] = max(known[uid], computed[uid] + 1)
            if config["enable_prefix_caching"]:
                written |= {texts[uid][:end] for end in range(size, computed[uid] + 1, size)}
        held = sum(-(-tokens // size) for tokens in computed.values())
        assert step["free"] >= max(usable - held, 0)  # blocks may be shared,
        if not config["enable_prefix_caching"]:
            assert step["free"] == usable - held  # but only through the cache
        if world.config["policy"] == "fcfs":
            _first_come_first_served(mine, arrivals, step)
    assert mine.engine.scheduler.blocks.free == usable  # every block is given back
    for uid, a in arrivals.items():
        room = config["max_model_len"] - a.prompt_tokens
        if mine.finish[uid] != "abort":
            assert len(mine.times[uid]) == min(a.actual_new_tokens, room)  # preempted or not


def _work(rows: list[list[int]]) -> StepWork:
    """What a step computes, pair of query and key by pair."""
    chunks = [(tokens, before) for _, tokens, is_prefill, before in rows if is_prefill]
    contexts = [before + 1 for _, _, is_prefill, before in rows if not is_prefill]
    return StepWork(
        passes=int(bool(rows)),
        prefill_tokens=sum(tokens for tokens, _ in chunks),
        prefill_sequences=len(chunks),
        prefill_attention=sum(before + i + 1 for tokens, before in chunks for i in range(tokens)),
        prefill_longest=max((tokens for tokens, _ in chunks), default=0),
        decode_sequences=len(contexts),
        decode_context=sum(contexts),
        decode_longest=max(contexts, default=0),
    )


def _text(a: Arrival) -> tuple[object, ...]:
    """The tokens of a request, prompt and answer."""
    segments = a.segments or ((0, str(a.uid)),)
    return tuple(next((name, i) for end, name in segments if not end or i < end) for i in range(LENGTH))


def _over(mine: Replayed, a: Arrival, ts: int) -> bool:
    """Whether a request had ended when a step was scheduled at `ts`, or its client had left."""
    if a.client_drop_t is not None and a.client_drop_t <= ts:
        return True
    return mine.finish[a.uid] != "abort" and mine.times[a.uid][-1] <= ts


def _first_come_first_served(mine: Replayed, arrivals: dict[int, Arrival], step: dict[str, Any]) -> None:
    """The one that came first is never preempted, and gets on with every step: nobody waits for ever."""
    uids = [row[0] for row in step["batch"]]
    assert uids == sorted(uids, key=lambda uid: (arrivals[uid].t, uid))
    here = [a for a in arrivals.values() if a.t <= step["ts"] and not _over(mine, a, step["ts"])]
    if uids and here:
        first = min(here, key=lambda a: (a.t, a.uid)).uid
        assert first not in step["preempted"]
        ends = (
            mine.finish[first] != "abort" and mine.times[first][-1] <= step["t0"]
        )  # asynchronous: is at its last step
        assert first in uids or ends


def run(world: Recording, seed: int | None, observe: bool) -> tuple[list[Request], Engine, list[str]]:
    """Simulate a world with real step times, one by one where `observe`; requests, engine, who ended or left."""
    clock, engine, told = Clock(), Engine(world.flags), list[str]()
    if observe:
        engine.observer = lambda scheduled: None
    noise = None if seed is None else Noise(LAW, seed)
    replica = Replica(clock, engine, STEP_TIME, lambda r: told.append(f"{r.id} {r.status}"), noise)
    requests = [request_of(a) for a in world.arrivals]

    def leave(request: Request) -> None:
        if request.status is None:
            replica.cancel(request)

    for a, request in zip(world.arrivals, requests, strict=True):
        if a.client_drop_t is not None:
            clock.call(a.client_drop_t / 10 + 0.1, leave, request)
    for a, request in zip(world.arrivals, requests, strict=True):
        clock.call(a.t / 10, replica.submit, request)
    clock.run()
    return requests, engine, told


@given(worlds, st.sampled_from([None, 1, 2]))
def test_many_steps_at_a_time_are_the_same_as_one_by_one(world: Recording, seed: int | None) -> None:
    jumped, engine, told = run(world, seed, observe=False)
    stepped, reference, told_by_reference = run(world, seed, observe=True)
    assert told == told_by_reference
    assert engine.counters() == reference.counters()
    for mine, theirs in zip(jumped, stepped, strict=True):
        assert mine.received == theirs.received
        if mine.status == "ok":
            assert abs(mine.first_token - theirs.first_token) <= 1e-9
            assert abs(mine.last_token - theirs.last_token) <= 1e-9
