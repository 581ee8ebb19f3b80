"""Laws that hold whatever arrives: each is stated from the outside, over what the simulator says it did."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from reference import History, World, ceil16
from worlds import crowd, jump, worlds

from sim.cluster.clock import Clock
from sim.cluster.replica import Replica
from sim.engines.tgi_0_9_4 import Engine, Flags
from sim.model.request import Request
from sim.model.steps import Call
from sim.steptime.linear import affine

STEPS = ("prefill", "decode")


@given(worlds())
def test_laws(world: World) -> None:
    assert_laws(world)


@pytest.mark.parametrize("padded", [False, True])
def test_laws_of_crowds(padded: bool) -> None:
    for seed in range(8):
        assert_laws(crowd(seed, padded, 1.2))


def assert_laws(world: World) -> None:
    history = jump(world)
    for law in (
        every_request_ends_once_with_its_tokens,
        a_decode_gives_every_member_one_token_and_times_rise,
        the_queue_is_first_in_first_out,
        no_budget_is_exceeded,
        what_fits_is_not_left_waiting,
        steps_do_not_overlap_and_the_server_idles_only_when_nobody_is_there,
        permits_are_held_by_those_who_are_there,
    ):
        law(world, history)


def every_request_ends_once_with_its_tokens(world: World, history: History) -> None:
    assert sorted(history.came) == sorted(history.outcome) == list(range(len(world.arrivals)))
    for uid, outcome in history.outcome.items():
        asked, got = world.arrivals[uid], len(history.tokens[uid])
        if outcome == "ok":
            assert got == asked.output
            assert history.ended[uid] == history.tokens[uid][-1]
        elif outcome == "gone":
            assert asked.leaves == history.ended[uid]
            assert got < asked.output
        else:
            assert got == 0
            assert history.ended[uid] == asked.time


def a_decode_gives_every_member_one_token_and_times_rise(world: World, history: History) -> None:
    times: dict[int, list[float]] = {uid: [] for uid in history.tokens}
    for op, _, end, uids, _ in history.calls:
        assert len(set(uids)) == len(uids) > 0
        if op in STEPS:
            for uid in uids:
                if history.outcome[uid] != "gone" or end < history.ended[uid]:
                    times[uid].append(end)
    assert times == history.tokens
    assert all(a < b for received in times.values() for a, b in pairwise(received))
    first = {uid: end for op, _, end, uids, _ in history.calls if op == "prefill" for uid in uids}
    assert all(received[0] == first[uid] for uid, received in times.items() if received)


def the_queue_is_first_in_first_out(world: World, history: History) -> None:
    prefilled = [uid for op, _, _, uids, _ in history.calls if op == "prefill" for uid in uids]
    place = {uid: i for i, uid in enumerate(history.came)}
    assert [place[uid] for uid in prefilled] == sorted({place[uid] for uid in prefilled})


def charged(world: World, uids: tuple[int, ...]) -> tuple[int, int]:
    """What the router counts for a prefill, against the prefill budget and (all together) the token budget."""
    of = [world.arrivals[uid] for uid in uids]
    if world.config.requires_padding:
        prompt = len(of) * max(a.prompt for a in of)
        return prompt, prompt + sum(a.new for a in of)
    return sum(ceil16(a.prompt) for a in of), sum(ceil16(a.prompt) + ceil16(a.new) for a in of)


def blocks(world: World, uids: tuple[int, ...]) -> int:
    return sum(ceil16(world.arrivals[uid].prompt + world.arrivals[uid].new - 1) for uid in uids)


def running_before(history: History, call: int) -> tuple[int, ...]:
    """Who runs when a call begins: those of the last decode or filter of the batch that have not ended with it."""
    for op, _, end, uids, _ in reversed(history.calls[:call]):
        if op in STEPS:
            still = tuple(u for u in uids if history.ended[u] > end)
            if still or op == "decode":
                return still
    return ()


def no_budget_is_exceeded(world: World, history: History) -> None:
    config = world.config
    used = 0  # as the shard last reported it
    for i, (op, _, _, uids, reported) in enumerate(history.calls):
        if op == "prefill":
            prompt, together = charged(world, uids)
            assert prompt <= config.max_batch_prefill_tokens
            running = running_before(history, i)
            if not running:
                used = 0
            elif not config.requires_padding:
                used = blocks(world, running)
            elif history.calls[i - 1][0] == "prefill":
                continue  # of a batch just prefilled the padded shard's report is not in the history
            assert used + together <= config.token_budget or not running
            assert together <= config.token_budget
        elif op == "decode":
            assert reported is not None
            if not config.requires_padding:
                assert reported == blocks(world, uids) <= config.token_budget
            used = reported
        elif reported is not None:
            used = reported


def what_fits_is_not_left_waiting(world: World, history: History) -> None:
    """After `max_waiting_tokens - 1` decodes since the last prefill, a head that fits is prefilled (flash)."""
    if world.config.requires_padding:
        return
    since, place = 1, {uid: i for i, uid in enumerate(history.came)}
    prefilled = {uid: i for i, (op, _, _, uids, _) in enumerate(history.calls) if op == "prefill" for uid in uids}
    for i, (op, _, end, _, _) in enumerate(history.calls):
        since = 1 if op == "prefill" else since + (op == "decode")
        if (
            i + 1 == len(history.calls)
            or history.calls[i + 1][0] != "decode"
            or since < world.config.max_waiting_tokens
        ):
            continue
        if op == "prefill" or (op == "filter" and history.calls[i - 1][0] == "prefill"):
            continue  # always a decode after a prefill that joins
        waiting = [
            uid
            for uid in place
            if history.outcome[uid] in ("ok", "gone")
            and world.arrivals[uid].time <= end < history.ended[uid]
            and prefilled.get(uid, len(history.calls)) > i
        ]
        if waiting:
            _, together = charged(world, (min(waiting, key=lambda uid: place[uid]),))
            assert blocks(world, history.calls[i + 1][3]) + together > world.config.token_budget


def steps_do_not_overlap_and_the_server_idles_only_when_nobody_is_there(world: World, history: History) -> None:
    assert all(start < end or op == "filter" for op, start, end, _, _ in history.calls)
    there = [
        (world.arrivals[uid].time, history.ended[uid]) for uid, how in history.outcome.items() if how in ("ok", "gone")
    ]
    clock = 0.0
    for _, start, end, _, _ in history.calls:
        assert start >= clock - 1e-9
        if start > clock + 1e-9:  # nobody was there in between
            assert not any(
                a < start - 1e-9 and b > clock + 1e-9 and max(a, clock) < min(b, start) - 1e-9 for a, b in there
            )
        clock = end


def permits_are_held_by_those_who_are_there(world: World, history: History) -> None:
    """Little's law by area: ∫ permits held dt is the sum of all sojourns; and nobody is refused while one is free."""
    most = world.config.max_concurrent_requests
    assert all(0 <= held <= most for _, held in history.held)
    assert history.held[-1][1] == 0
    area = sum(held * (after - at) for (at, held), (after, _) in pairwise(history.held))
    stayed = sum(
        history.ended[uid] - world.arrivals[uid].time for uid, how in history.outcome.items() if how in ("ok", "gone")
    )
    assert area == pytest.approx(stayed, abs=1e-6)
    for uid, how in history.outcome.items():
        at = world.arrivals[uid].time
        before = history.came[: history.came.index(uid)]
        # at one instant clients leave first, then requests arrive, then the router acts
        still = {"ok": lambda end, at: end >= at, "gone": lambda end, at: end > at}
        there = sum(history.outcome[u] in still and still[history.outcome[u]](history.ended[u], at) for u in before)
        assert (there == most) == (how == "overloaded")


def test_who_comes_back_at_the_instant_of_the_answer_misses_that_boundary() -> None:
    """The router has looked by then, as the real one has: in no case does it look twice at one boundary."""
    clock = Clock()
    calls: list[Call] = []

    def again(r: Request) -> None:
        if r.id < 40:
            clock.at(clock.now, value=Request(r.id + 4, 10, 3 + r.id % 4, 9)).callbacks.append(
                lambda event: replica.submit(event.value)
            )

    config = Flags(max_batch_total_tokens=10_000, max_waiting_tokens=0)
    replica = Replica(clock, Engine(config), affine(a0=1.0, b0=1.0), again, on_call=calls.append)
    for i in range(4):
        replica.submit(Request(i, 10, 3 + i, 9))
    clock.run()
    assert all(call.start < call.ends[0] for call in calls if call.op in STEPS)
    assert (replica.step_table()["count"] > 0).all()
    came_back = 0
    for before, after in pairwise(c for c in calls if c.op in STEPS):
        ended = {r.id for r in before.members if r.last_token == before.ends[-1]}
        going_on = len(ended) < len(before.members)
        if after.op == "prefill" and before.op == "decode" and going_on:
            came_back += 1
            assert not {r.id - 4 for r in after.members} & ended
    assert came_back > 3


def test_the_worlds_drawn_reach_every_branch() -> None:
    """A law over worlds in which nothing happens would kill no mutant: what must be common is counted."""
    seen: Counter[str] = Counter()

    @settings(max_examples=300)
    @given(worlds())
    def look(world: World) -> None:
        history = jump(world)
        seen["worlds"] += 1
        seen.update({f"outcome {how}" for how in history.outcome.values()})
        seen["backpressure"] += history.backpressure > 0
        seen["wait exceeded"] += history.wait_exceeded > 0
        seen["padded"] += world.config.requires_padding
        seen["noise"] += world.noise is not None
        seen["early stop"] += any(a.output < a.new for a in world.arrivals)
        seen["ties"] += len({a.time for a in world.arrivals}) < len(world.arrivals)
        ends = {call[2] for call in history.calls}
        seen["arrival at a step's end"] += any(a.time in ends for a in world.arrivals)

    look()
    assert len(seen) == 12
    assert min(seen.values()) >= 0.03 * seen["worlds"]
