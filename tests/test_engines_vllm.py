"""The vLLM engine schedules what the real engine core scheduled: every step, with the same rows, at the same ticks."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace
from schedule_vllm import Recording, differences, read_recordings, simulated

from sim.cluster.clock import Clock
from sim.cluster.frontend import FrontEnd
from sim.cluster.replica import Replica
from sim.engines.vllm_v1 import Engine, Flags
from sim.model.request import Request
from sim.model.status import Status
from sim.steptime.linear import affine

SHIPPED = Path(__file__).parent.parent / "data" / "vllm-v1-schedules.jsonl.gz"


def test_schedule_of_the_real_engine_core(recording: Recording) -> None:
    found = differences(recording)
    assert not found, "\n".join(found[:10])


def test_schedule_of_the_real_engine_core_simulated_many_steps_at_a_time(recording: Recording) -> None:
    requests, replica = simulated(recording)
    for uid, fate in recording.requests.items():
        request = requests[uid]
        if fate.finish == "abort":
            assert request.gone
        else:
            assert (request.first_token, request.last_token) == (fate.token_times[0], fate.token_times[-1])
    engine = replica.engine
    assert isinstance(engine, Engine)
    assert engine.scheduler.preemptions == sum(fate.preemptions for fate in recording.requests.values())
    state = engine.state()
    assert (state.waiting, state.running, state.kv_used) == (0, 0, 0)


def test_decode_steps_that_nothing_changes_are_one_plan() -> None:
    engine = Engine(Flags(async_scheduling=False, num_gpu_blocks=100, max_num_batched_tokens=64))
    first, second = Request(0, 100, 50, 50), Request(1, 20, 30, 30)
    engine.submit(first)
    engine.submit(second)
    shapes = []
    while (plan := engine.plan()) is not None:
        shapes.append((plan.work.prefill_tokens, plan.work.decode_sequences, plan.steps))
        engine.commit(plan, plan.steps)
    # 64 of 100 tokens; the other 36, which end the prompt, and 20 of the second; 29 steps of both; 20 of the first
    assert shapes == [(64, 0, 1), (56, 0, 1), (0, 2, 29), (0, 1, 20)]


def test_the_end_of_the_cache_ends_a_plan_and_then_preempts() -> None:
    engine = Engine(Flags(async_scheduling=False, num_gpu_blocks=6, enable_prefix_caching=False))
    for uid in range(2):
        engine.submit(Request(uid, 16, 64, 64))  # a block each at first, of five
    preempted = []
    while (plan := engine.plan()) is not None:
        preempted += [(r.id, engine.received(r, 0)) for r in plan.preempted]
        engine.commit(plan, plan.steps)
    # with 32 tokens computed both hold two blocks; for the next one the first takes the fifth, the second finds none
    assert preempted == [(1, 17)]


def test_a_prompt_as_long_as_the_model_is_refused_and_a_longer_answer_is_cut() -> None:
    engine = Engine(Flags(max_model_len=100, num_gpu_blocks=100))
    assert engine.submit(Request(0, 100, 1, 1)) == Status.VALIDATION
    request = Request(1, 98, 30, 40)
    assert engine.submit(request) is None
    assert (request.output_tokens, request.max_new_tokens) == (2, 2)


def test_up_to_0_11_2_a_prompt_over_the_budget_left_is_skipped_where_chunking_is_off() -> None:
    for version, admitted in (("0.9.2", [0, 2]), ("0.11.2", [0, 2]), ("0.14.1", [0]), ("0.32.0", [0])):
        flags = Flags(
            version=version,
            enable_chunked_prefill=False,
            async_scheduling=False,
            max_model_len=64,
            max_num_batched_tokens=64,
            max_num_seqs=8,
            num_gpu_blocks=50,
        )
        engine = Engine(flags)
        for uid, tokens in enumerate((40, 40, 10)):  # of 64 tokens a step
            engine.submit(Request(uid, tokens, 2, 2))
        plan = engine.plan()
        assert plan is not None and [r.id for r in plan.admitted] == admitted


def test_up_to_0_20_2_blocks_without_a_cache_entry_go_to_the_back_of_the_free_list() -> None:
    for version, hit in (("0.17.1", 0), ("0.20.2", 0), ("0.25.1", 16), ("0.32.0", 16)):
        engine = Engine(Flags(async_scheduling=False, num_gpu_blocks=4, max_model_len=48, version=version))
        # of three blocks, a and b each leave one with an entry and one without, which c takes if it is in front
        for uid, (text, tokens) in enumerate((("a", 17), ("b", 17), ("c", 10), ("a", 17))):
            request = Request(uid, tokens, 1, 1)
            request.text = ((0, text),)
            engine.submit(request)
            while (plan := engine.plan()) is not None:
                engine.commit(plan, plan.steps)
        assert engine.counters()["vllm:prefix_cache_hits_total"] == hit


def test_versions_before_0_32_refuse_what_is_too_long_together() -> None:
    for version, refuses in (("0.9.2", True), ("0.17.1", True), ("0.25.1", True), ("0.32.0", False)):
        flags = Flags(max_model_len=100, num_gpu_blocks=100, version=version)
        clock, ended = Clock(), []
        front = FrontEnd(clock, ended.append, permits=3, allowed=flags.allowed)
        front.replica = Replica(clock, Engine(flags), affine(a0=1.0, b0=1.0), front.ended)
        for uid, more in enumerate((0, 1)):
            clock.call(0.0, front.submit, Request(uid, 60, 40 + more, 40 + more))
        clock.run()
        found = {r.id: (str(r.status), r.output_tokens) for r in ended}
        assert found == {0: ("ok", 40), 1: ("validation", 41) if refuses else ("ok", 40)}
        assert front.in_use == 0


def test_of_equal_priority_requests_of_the_same_moment_do_not_preempt_each_other_for_ever() -> None:
    # both prompts fit by their first chunks, but not whole: the victim is the one that came last, not each in turn
    flags = Flags(
        scheduling_policy="priority",
        scheduler_reserve_full_isl=False,
        async_scheduling=False,
        num_gpu_blocks=7,
        max_model_len=96,
        max_num_batched_tokens=32,
        max_num_seqs=4,
        enable_prefix_caching=False,
    )
    clock, ended = Clock(), []
    front = FrontEnd(clock, ended.append)
    front.replica = Replica(clock, Engine(flags), affine(a0=1.0, b0=1.0), front.ended)
    for uid in range(3):
        clock.call(0.0, front.submit, Request(uid, 80, 4, 4))
    clock.run(until=500.0)
    assert [r.id for r in ended] == [0, 1, 2]


def test_of_equal_priority_the_one_that_came_first_goes_first() -> None:
    clock, ended = Clock(), []
    flags = Flags(scheduling_policy="priority", max_num_seqs=1, async_scheduling=False, num_gpu_blocks=2000)
    replica = Replica(clock, Engine(flags), affine(a0=1.0, b0=1.0), ended.append)
    for uid, at in ((3, 0.0), (2, 0.5), (10, 1.0)):  # the first runs when the others come; as text "10" < "2"
        clock.call(at, replica.submit, Request(uid, 10, 5, 5))
    clock.run()
    assert [(r.id, r.arrived) for r in ended] == [(3, 0.0), (2, 0.5), (10, 1.0)]


def test_the_shipped_file_has_60_schedules_that_bind() -> None:
    recordings = read_recordings(SHIPPED)
    assert len(recordings) == len({r.name for r in recordings}) == 60
    assert {r.config["async_scheduling"] for r in recordings} == {False, True}
    assert {f.finish for r in recordings for f in r.requests.values()} == {"length", "stop", "abort"}
    assert sum(f.preemptions for r in recordings for f in r.requests.values()) == 460


def test_differences_sees_one_tick_one_row_and_one_block_that_are_not_as_recorded() -> None:
    recording = read_recordings(SHIPPED)[0]
    step = recording.steps[5]
    for wrong in (
        replace(step, t0=(step.t0 or 0) + 1),
        replace(step, batch=[*step.batch, [99, 1, 0, 5]]),
        replace(step, free=step.free + 1),
        replace(step, preempted=[1]),
    ):
        doctored = replace(recording, steps=[*recording.steps[:5], wrong, *recording.steps[6:]])
        assert [d.split(":")[0] for d in differences(doctored)] == ["step 5"]
    uid, fate = next(iter(recording.requests.items()))
    shorter = replace(fate, token_times=fate.token_times[:-1])
    assert differences(replace(recording, requests=recording.requests | {uid: shorter}))
