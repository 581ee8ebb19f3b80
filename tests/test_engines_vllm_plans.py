"""Plans of the vLLM engine: how many steps are one, what differs by version, and decisions that are not its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_vllm import differences, read_recordings

from sim.engines.decoders import Decoders
from sim.engines.engine import Decision, Plan
from sim.engines.kv_cache import Blocks
from sim.engines.vllm_v1 import Engine, Flags
from sim.engines.vllm_v1.versions import KNOWN_VERSIONS, known_version
from sim.model.request import Request

SHIPPED = Path(__file__).parent.parent / "data" / "vllm-v1-schedules.jsonl.gz"


def engine_of(*lengths: tuple[int, int], **flags: Any) -> Engine:
    """An engine to which requests of these prompts and answers have come, with ids from 0."""
    engine = Engine(Flags(**{"async_scheduling": False, "max_num_batched_tokens": 64, "num_gpu_blocks": 2000, **flags}))
    for uid, (prompt, output) in enumerate(lengths):
        engine.submit(Request(uid, prompt, output, output))
    return engine


def plans(engine: Engine) -> Iterator[Plan]:
    """All plans from now on, each committed whole after it was looked at."""
    while (plan := engine.plan()) is not None:
        yield plan
        engine.commit(plan, plan.steps)


def shapes(engine: Engine) -> list[tuple[int, int, int]]:
    return [(plan.work.prefill_tokens, plan.work.decode_sequences, plan.steps) for plan in plans(engine)]


def test_asynchronous_decode_steps_are_one_plan() -> None:
    # 64 and 36 + 20 tokens of prompts; 29 decodes of both; 20 of the first, which the scheduler knows to be alone from
    # the first of them on, since both end by their limit
    assert shapes(engine_of((100, 50), (20, 30), async_scheduling=True)) == [
        (64, 0, 1),
        (56, 0, 1),
        (0, 2, 29),
        (0, 1, 20),
        (0, 0, 1),  # scheduled while the last token was under way
    ]


def test_asynchronous_a_stop_token_costs_one_step_more() -> None:
    engine = Engine(Flags(async_scheduling=True, num_gpu_blocks=2000))
    engine.submit(Request(0, 20, 5, 50))
    assert shapes(engine) == [(20, 0, 1), (0, 1, 4), (0, 1, 1)]


@pytest.mark.parametrize("ahead", [False, True])
def test_chunks_of_a_prompt_beside_decodes_are_one_plan(ahead: bool) -> None:
    engine = engine_of((4, 100), (4, 100), async_scheduling=ahead)
    assert engine.plan() is not None
    engine.submit(Request(2, 1000, 3, 3))
    found = list(plans(engine))
    chunks = next(plan for plan in found if plan.work.prefill_tokens == 62)
    # 16 chunks of 64 - 2 tokens, the last of which, of 8, is a plan of its own
    assert [(p.work.prefill_tokens, p.work.decode_sequences) for p in found if p.work.prefill_tokens] == [
        (8, 0),
        (62, 2),
        (8, 2),
    ]
    assert chunks.steps == 16
    assert (chunks.growth.prefill_attention, chunks.growth.decode_context) == (62 * 62, 2)


def test_steps_are_single_while_two_requests_have_the_text_that_is_decoded() -> None:
    """What one of them decodes the other may find in the cache, block by block."""
    engine = engine_of(enable_prefix_caching=True)
    for uid, output in enumerate((50, 90)):
        request = Request(uid, 40, output, output)
        request.text = ((0, "the same"),)
        engine.submit(request)
    found = [(plan.work.decode_sequences, plan.steps) for plan in plans(engine) if plan.work.decode_sequences]
    assert {steps for decodes, steps in found if decodes == 2} == {1}
    assert found[-1] == (1, 40)  # the other is over


def test_an_arrival_is_scheduled_at_the_next_boundary_or_asynchronously_at_the_one_after() -> None:
    for ahead, valid in ((False, 4), (True, 5)):
        engine = engine_of((4, 100), async_scheduling=ahead)
        found = plans(engine)
        while (plan := next(found)).steps < 10:
            pass
        newcomer = Request(1, 10, 10, 10)
        engine.submit(newcomer, 3)
        assert engine.valid_steps(plan, 3) == valid
        engine.cancel(newcomer, 3)
        engine.commit(plan, valid)


def test_a_client_that_leaves_counts_from_the_end_of_the_step_under_way() -> None:
    for ahead in (False, True):
        first, second = Request(0, 4, 100, 100), Request(1, 4, 100, 100)
        engine = Engine(Flags(async_scheduling=ahead, num_gpu_blocks=2000))
        engine.submit(first)
        engine.submit(second)
        found = plans(engine)
        while (plan := next(found)).steps < 10:
            pass
        before = engine.received(first, 0)
        engine.cancel(second, 3)
        assert engine.valid_steps(plan, 3) == 4
        engine.commit(plan, 4)
        assert (engine.received(first, 0), engine.received(second, 0)) == (before + 4, 0)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_number_of_plans_does_not_depend_on_the_length_of_answers(ahead: bool, caching: bool) -> None:
    flags: dict[str, Any] = {"async_scheduling": ahead, "enable_prefix_caching": caching, "max_model_len": 5000}
    counts = [
        len(shapes(engine_of((50, output), (30, 2 * output), num_gpu_blocks=1000, **flags))) for output in (100, 2000)
    ]
    assert counts[0] == counts[1] <= 6


@dataclass
class Member:
    line: int
    last: int


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=9), st.integers(1, 9), st.integers(51, 80), st.data())
def test_how_many_steps_the_free_blocks_last(lines: list[int], size: int, first: int, data: st.DataObject) -> None:
    decoders = Decoders[Member](size)
    for line in lines:
        decoders.join(Member(line, 1000))
    steps, free = data.draw(st.integers(1, 60)), data.draw(st.integers(0, 60))
    taken = [
        sum(-(-(line + step) // size) - -(-(line + step - 1) // size) for line in lines)
        for step in range(first, first + steps)
    ]
    assert decoders.blocks(first, steps) == sum(taken)
    assert decoders.fitting(first, steps, free) == max(n for n in range(steps + 1) if sum(taken[:n]) <= free)


def test_a_parked_text_is_evicted_from_its_end_and_after_what_has_no_entry() -> None:
    blocks = Blocks(10)
    blocks.take(6)
    blocks.give_back(0, 2)  # of a request that ended
    run = blocks.park(1, 3)
    assert blocks.free == 10
    blocks.take(5 + 2)  # those without entry first, then the older ones
    assert run.blocks == 3
    blocks.take(2)
    assert run.blocks == 1
    blocks.claim(run)
    assert blocks.free == 0


@pytest.mark.parametrize(
    ("version", "known"),
    [(v, v) for v in KNOWN_VERSIONS]
    + [("0.18.0", "0.17.1"), ("0.40.0", "0.32.0"), ("1.0", "0.32.0"), ("nightly", "0.32.0"), ("0.6.3", "0.9.2")]
    + [("v0.32.0", "0.32.0"), ("0.32.1.dev3+g12", "0.32.0")],
)
def test_known_version(version: str, known: str) -> None:
    assert known_version(version) == known


def admitted_first(version: str, *lengths: tuple[int, int], **flags: Any) -> list[int]:
    plan = engine_of(*lengths, version=version, **flags).plan()
    assert plan is not None
    return [r.id for r in plan.admitted]


def test_older_versions_ask_for_the_first_chunk_only() -> None:
    # 6 usable blocks: the first prompt takes 2, the second 5, of which its first chunk needs 2
    flags = {"num_gpu_blocks": 7, "max_num_batched_tokens": 64}
    assert admitted_first("0.17.1", (32, 5), (80, 5), **flags) == [0, 1]
    assert admitted_first("0.20.2", (32, 5), (80, 5), **flags) == [0]


def test_the_watermark_is_known_from_0_25_1_on() -> None:
    flags = {"num_gpu_blocks": 11, "watermark": 0.7}
    assert admitted_first("0.20.2", (32, 5), (32, 5), **flags) == [0, 1]
    assert admitted_first("0.25.1", (32, 5), (32, 5), **flags) == [0]


def test_a_lone_prompt_is_capped_in_older_versions() -> None:
    for version, tokens in (("0.25.1", 8), ("0.32.0", 60)):
        plan = engine_of((60, 5), version=version, long_prefill_token_threshold=8).plan()
        assert plan is not None
        assert plan.work.prefill_tokens == tokens


def test_without_chunks_the_oldest_versions_let_shorter_prompts_pass() -> None:
    flags: dict[str, Any] = {"enable_chunked_prefill": False, "max_num_batched_tokens": 100, "max_model_len": 100}
    assert admitted_first("0.11.2", (60, 5), (60, 5), (30, 5), **flags) == [0, 2]
    assert admitted_first("0.14.1", (60, 5), (60, 5), (30, 5), **flags) == [0]


def test_blocks_without_entry_are_reused_last_in_older_versions() -> None:
    for blank_first, left in ((True, 2), (False, 1)):
        blocks = Blocks(4, blank_first)
        blocks.take(4)
        run = blocks.park(0, 2)  # the older one
        blocks.give_back(1, 0)
        blocks.take(1)
        assert run.blocks == left


def test_decisions_that_are_the_rules_own_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    recordings = sorted(read_recordings(SHIPPED), key=lambda r: -sum(f.preemptions for f in r.requests.values()))[:3]
    recordings += [r for r in read_recordings(SHIPPED) if r.config["enable_prefix_caching"]][:2]
    heard: list[Decision] = []

    def decide(rules: Decision) -> Decision:
        heard.append(rules)
        return rules

    def decided(flags: Flags) -> Engine:
        engine = Engine(flags)
        engine.decide = decide
        return engine

    monkeypatch.setattr("schedule_vllm.Engine", decided)
    for recording in recordings:
        assert not differences(recording)
    assert sum(len(rules.preempted) for rules in heard) > 30
    assert sum(len(rules.admitted) for rules in heard) > 60


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_can_be_held_back_or_preempted_against_the_rules(ahead: bool) -> None:
    engine = engine_of((20, 9), (20, 9), async_scheduling=ahead)
    said: list[Decision] = []

    def decide(rules: Decision) -> Decision:
        said.append(rules)
        if len(said) == 1:
            return Decision(rules.admitted[:1])
        return Decision((), [said[0].admitted[0]]) if len(said) == 4 else rules

    engine.decide = decide
    found = [(len(p.admitted), len(p.preempted)) for p in plans(engine)]
    assert [(len(rules.admitted), len(rules.preempted)) for rules in said[:5]] == [
        (2, 0),  # both could go, one does
        (1, 0),
        (0, 0),
        (0, 0),  # the first is preempted all the same
        (1, 0),
    ]
    assert found[:5] == [(1, 0), (1, 0), (0, 0), (0, 1), (1, 0)]


def test_blocks_that_a_decision_takes_beyond_what_there_is_are_owed() -> None:
    engine = engine_of((30, 20), (30, 20), (30, 20), num_gpu_blocks=5, max_num_batched_tokens=100)
    decisions = iter([lambda rules: Decision([*rules.admitted, third])])
    third = next(r for r, _, _ in engine._inbox if r.id == 2)
    engine.decide = lambda rules: next(decisions, lambda same: same)(rules)
    plan = engine.plan()
    assert plan is not None
    assert [r.id for r in plan.admitted] == [0, 1, 2]
    assert engine.state().kv_free == -2 * 16
    engine.commit(plan, 1)
    preempted = [(r.id, engine.received(r, 0)) for p in plans(engine) for r in p.preempted]
    assert preempted[:2] == [(2, 3), (1, 3)]  # with 32 tokens computed the first needs a block, and then the second
    assert engine.scheduler.blocks.free == 4
