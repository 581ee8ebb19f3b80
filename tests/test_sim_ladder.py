"""A ladder is one simulation, climbed as it is measured; and a run is the same however it is repeated."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from msgspec.structs import replace
from warned import texts

from sim.cluster.clients import Patience
from sim.cluster.ladder import climb
from sim.cluster.replay import patience_of, replay, with_users
from sim.cluster.testbed import Bench
from sim.engines.tgi_0_9_4 import Flags
from sim.model.calibration import Clocks, Delay
from sim.model.errors import BadInput, CannotFit
from sim.model.fleet import Fleet
from sim.model.machine import Machine
from sim.model.scenario import Load, Scenario
from sim.model.server import Bounds
from sim.model.workload import Lengths, RequestLengths, Sampler, Workload
from sim.results import metrics
from sim.run import Run, Rung
from sim.steptime.linear import affine
from sim.steptime.noise_parameters import Noise

SERVER = Flags(max_batch_prefill_tokens=1024, max_batch_total_tokens=8000)
STEP_TIME = affine(a0=0.02, a1=1e-4, b0=0.03, b1=5e-4, b2=1e-6)
MODEL = Machine(STEP_TIME, SERVER)
FIXED = Workload(prompt_tokens=100, output_tokens=20)
SPREAD = Workload(prompt_tokens=Lengths(uniform=(10, 900)), output_tokens=Lengths(uniform=(1, 99)))


def closed(users: list[int], workload: Workload = FIXED, **load: float) -> Scenario:
    return Scenario(server=Flags(), name="closed", workload=workload, load=Load(users=users, **load))


def test_one_user_sees_a_prefill_and_its_decodes() -> None:
    row = metrics.table(climb(closed([1], seconds=30.0), MODEL, (1, 0))).iloc[0]
    prefill = STEP_TIME.prefill(1, 100, 10_000, 100)
    first, growth = STEP_TIME.decode(1, 101, 101)
    assert row["ttft_mean"] == pytest.approx(prefill)
    assert row["e2e_mean"] == pytest.approx(prefill + 19 * first + growth * 19 * 18 / 2)
    assert row["e2e_p99"] == pytest.approx(row["e2e_mean"])
    assert row["rps"] == pytest.approx(1 / row["e2e_mean"], rel=0.05)
    assert row["in_flight"] == pytest.approx(1.0)


def test_users_are_added_at_the_spawn_rate_and_those_there_go_on() -> None:
    run = climb(closed([2, 5], seconds=20.0, spawn_rate=4.0), MODEL, (1, 0))
    first, second = run.rungs
    assert second.start == first.end
    assert (first.ramped - first.start, second.ramped - second.start) == pytest.approx((0.5, 0.75))
    begun = run.requests.groupby("user")["sent"].min()
    assert begun[:2].tolist() == pytest.approx([0.0, 0.25])
    assert (begun[2:] - second.start).tolist() == pytest.approx([0.0, 0.25, 0.5])
    across = (run.requests["sent"] < second.start) & (run.requests["ended"] > second.start)
    assert across.sum() == 2  # nobody was started anew
    assert (run.requests.loc[across, "rung"] == 0).all()


def test_a_window_begins_when_every_user_has_finished_a_request_begun_since_all_were_there() -> None:
    run = climb(closed([1, 6], seconds=20.0, spawn_rate=2.0), MODEL, (1, 0))
    for rung in run.rungs:
        r = run.requests
        since = r[r["sent"] >= rung.ramped]
        assert rung.settled == pytest.approx(since.groupby("user")["ended"].min()[: rung.users].max())
        assert rung.end == rung.settled + 20.0


def test_without_a_length_a_window_has_four_requests_a_user_and_at_least_thirty() -> None:
    run = climb(closed([1, 12]), MODEL, (1, 0))
    for rung, least in zip(run.rungs, (30, 48), strict=True):
        ended = run.requests.loc[run.requests["status"] == "ok", "ended"]
        found = ((ended > rung.settled) & (ended <= rung.end)).sum()
        assert least <= found < least + (rung.users or 0)  # several end at one instant
    slow = climb(closed([1], max_seconds=5.0), MODEL, (1, 0)).rungs[0]
    assert slow.seconds == 5.0


def test_think_time_and_turnaround_come_between_a_users_requests_and_delays_into_what_he_sees() -> None:
    clocks = Clocks(
        uplink=Delay(quantiles=[0.1], per_token=0.001),
        downlink=Delay(quantiles=[0.05]),
        turnaround=Delay(quantiles=[0.3]),
    )
    bare = metrics.table(climb(closed([1], seconds=50.0), MODEL, (1, 0))).iloc[0]
    run = climb(closed([1], seconds=50.0, think=0.7), Machine(STEP_TIME, SERVER, Noise(), clocks), (1, 0))
    row = metrics.table(run).iloc[0]
    assert row["e2e_mean"] == pytest.approx(bare["e2e_mean"] + 0.2 + 0.05)
    assert row["ttft_mean"] == pytest.approx(bare["ttft_mean"] + 0.2 + 0.05)
    pause = run.requests["sent"].to_numpy()[1:] - run.requests["ended"].to_numpy()[:-1]
    assert pause[:-1] == pytest.approx(np.full(len(pause) - 1, 1.0))


def test_a_turnaround_grows_with_the_prompt_to_be_written_and_the_streams_to_be_read() -> None:
    clocks = Clocks(turnaround=Delay(quantiles=[0.01], per_token=1e-4), reading=0.5)
    lengths = Workload(prompt_tokens=100, output_tokens=Lengths(uniform=(40, 99)))
    run = climb(closed([1, 3], lengths, seconds=60.0), Machine(STEP_TIME, SERVER, Noise(), clocks), (1, 0))
    requests = run.requests.sort_values(["user", "sent"])
    back = (requests["sent"] - requests.groupby("user")["ended"].shift(1)).dropna()
    alone = back[(requests["sent"] < run.rungs[0].end) & (requests["user"] == 0)]
    assert alone.to_numpy() == pytest.approx(np.full(len(alone), 0.02))
    several = back[requests["rung"] == 1].to_numpy()
    streams = (several - 0.02) / 0.5
    assert streams == pytest.approx(np.round(streams), abs=1e-6)
    assert set(np.round(streams)) == {0, 1, 2}


def test_answers_that_end_together_are_dealt_with_one_after_another() -> None:
    model = Machine(STEP_TIME, SERVER, Noise(), Clocks(spacing=Delay(quantiles=[0.0], per_token=1e-3)))
    run = climb(closed([8], seconds=30.0, spawn_rate=1000.0), model, (1, 0))
    sent = np.sort(run.requests["sent"].to_numpy())
    assert np.diff(sent[16:]).min() == pytest.approx(0.1)


def test_the_routers_two_workers_count_the_tokens_of_one_prompt_after_another() -> None:
    """Of three who send 100 tokens together at 1 ms a token two are in the queue after 0.1 s, the third after 0.2 s."""
    clocks = Clocks(uplink=Delay(quantiles=[0.05], per_token=1e-3))
    bench = Bench(closed([2]), Machine(STEP_TIME, SERVER, Noise(), clocks), (1, 0), Sampler(FIXED, 0))
    reached = []
    bench.replicas[0].submit = lambda r: reached.append((r.user, float(bench.clock.now)))  # type: ignore[method-assign]
    for user in range(3):
        bench.clients.add_user(user)
    bench.clock.run(until=1.0)
    bench.clients.add_user(3)  # nobody is before this one any more
    bench.clock.run(until=2.0)
    assert [user for user, _ in reached] == [0, 1, 2, 3]
    assert [at for _, at in reached] == pytest.approx([0.15, 0.15, 0.25, 1.15])


def test_refused_users_try_again_after_retry_and_are_counted() -> None:
    server = replace(SERVER, max_concurrent_requests=3)
    run = climb(closed([5], seconds=20.0, retry=0.5), Machine(STEP_TIME, server), (1, 0))
    refused = run.requests[run.requests["status"] == "overloaded"]
    assert len(refused) > 10
    assert (refused["sent"] == refused["ended"]).all()
    user = run.requests[run.requests["user"] == refused["user"].iloc[0]]
    pauses = user["sent"].shift(-1) - user["ended"]
    assert pauses[user["status"] == "overloaded"].dropna().to_numpy() == pytest.approx(0.5)


@pytest.mark.parametrize("patience", [Patience(0.3), Patience(0.9, whole=True)])
def test_who_gives_up_in_a_recording_gives_up_in_its_replay_after_as_long(patience: Patience) -> None:
    """Two at a time are served: the third waits for a first token, or all of them run out of time."""
    server = replace(SERVER, max_batch_total_tokens=2 * 160)
    bench = Bench(closed([3], retry=0.3), Machine(STEP_TIME, server), (1, 0), Sampler(FIXED, 0), patience=patience)
    for user in range(3):
        bench.clients.add_user(user)
    bench.clock.run(until=60.0)
    bench.rungs.append(Rung(start=0.0, ramped=0.1, settled=10.0, end=60.0, users=3))
    run = bench.run()
    late = run.requests[run.requests["status"] == "timeout"]
    assert len(late) > 10 and (run.requests["status"] == "ok").sum() > 5
    assert (late["ended"] - late["sent"]).to_numpy() == pytest.approx(patience.seconds)
    assert (late["output_tokens"] > 0).any() == patience.whole
    user = run.requests[run.requests["user"] == late["user"].iloc[0]]
    pauses = (user["sent"].shift(-1) - user["ended"])[user["status"] == "timeout"].dropna()
    assert pauses.to_numpy() == pytest.approx(0.3)
    assert patience_of(run.requests) == pytest.approx(patience)
    ours, theirs = (metrics.table(each).iloc[0] for each in (run, replay(run, Machine(STEP_TIME, server), (5, 0))))
    for metric in ("rps", "error_rate", "e2e_mean", "ttft_p50", "output_tokens_per_s"):
        assert theirs[metric] == pytest.approx(ours[metric], rel=0.1), metric


def test_open_loop_requests_come_at_their_rate_whatever_the_answers() -> None:
    load = Load(rate=[2.0, 5.0], seconds=400.0, settle=10.0)
    run = climb(Scenario(server=Flags(), name="open", workload=FIXED, load=load), MODEL, (1, 0))
    for rung, rate in zip(run.rungs, (2.0, 5.0), strict=True):
        inside = run.requests["sent"].between(rung.settled, rung.end)
        assert inside.sum() == pytest.approx(400 * rate, rel=0.1)
        assert rung.settled == rung.start + 10.0
    steady = Scenario(
        server=Flags(),
        name="open",
        workload=FIXED,
        load=Load(rate=[2.0], arrivals="constant", seconds=50.0, settle=0.0),
    )
    gaps = np.diff(climb(steady, MODEL, (1, 0)).requests["sent"])
    assert gaps == pytest.approx(np.full(len(gaps), 0.5))


def test_a_trace_is_asked_in_its_order_at_its_times() -> None:
    times = np.array([0.0, 1.0, 1.5, 9.0, 30.0])
    lengths = RequestLengths(
        np.array([10, 20, 30, 40, 50]), np.array([1, 2, 3, 4, 5]), np.array([9, 9, 9, 9, 9]), times
    )
    scenario = Scenario(
        server=Flags(), name="trace", workload=Workload(trace="t.csv"), load=Load(trace=True, settle=2.0)
    )
    requests = climb(scenario, MODEL, (1, 0), lengths).requests
    assert requests["sent"].tolist() == [0.0, 1.0, 1.5, 9.0, 30.0]
    assert requests["prompt_tokens"].tolist() == [10, 20, 30, 40, 50]
    assert requests["output_tokens"].tolist()[:4] == [1, 2, 3, 4]


def same(a: Run, b: Run) -> bool:
    return bool(
        a.requests.equals(b.requests) and a.rungs == b.rungs and a.steps is not None and a.steps.equals(b.steps)
    )


@pytest.mark.parametrize("load", [Load(users=[2, 7], seconds=20.0), Load(rate=[3.0], seconds=60.0)])
def test_the_same_seed_gives_the_same_run_and_another_another(load: Load) -> None:
    model = Machine(STEP_TIME, SERVER, Noise(decode=[0.9, 1.0, 1.1]), Clocks(turnaround=Delay(quantiles=[0.0, 0.1])))
    scenario = Scenario(server=Flags(), name="seeds", workload=SPREAD, load=load)
    run = climb(scenario, model, (1, 0))
    assert same(run, climb(scenario, model, (1, 0)))
    assert not same(run, climb(scenario, model, (1, 1)))
    assert not same(run, climb(scenario, model, (2, 0)))


def test_everything_alive_at_the_end_is_aborted_and_counted_once() -> None:
    run = climb(closed([9], SPREAD, seconds=20.0), MODEL, (1, 0))
    alive = run.requests[run.requests["status"] == "aborted"]
    assert len(alive) == 9
    assert (alive["ended"] == run.rungs[-1].end).all()
    assert (alive["output_tokens"] < alive["max_new_tokens"]).all()
    assert run.steps is not None
    made = (run.steps["decode_sequences"] * run.steps["count"]).sum()
    prefilled = run.steps["prefill_sequences"].sum()
    assert run.requests["output_tokens"].sum() == made + prefilled  # the run of steps under way was cut at the end


def test_a_window_that_ends_in_mid_answer_has_all_tokens_up_to_its_end() -> None:
    for noise in (Noise(), Noise(decode=[1.0])):
        scenario = closed([1], Workload(prompt_tokens=50, output_tokens=500), seconds=40.0)
        run = climb(scenario, Machine(STEP_TIME, SERVER, noise), (1, 0))
        row = metrics.table(run).iloc[0]
        assert row["e2e_mean"] > 15
        step = row["itl_mean"]
        assert row["output_tokens_per_s"] == pytest.approx(1 / step, rel=0.01)
        assert row["decode_share"] + row["prefill_share"] > 0.998
        assert row["budget_share"] == pytest.approx(16 * 35 / 8000)


def test_what_can_never_fit_is_refused_before_the_clock_starts() -> None:
    small = Machine(STEP_TIME, replace(SERVER, max_batch_total_tokens=110))
    with pytest.raises(CannotFit, match="a request of 100 \\+ 20 tokens counts 144 tokens"):
        climb(closed([1]), small, (1, 0))
    with pytest.raises(CannotFit, match="max_batch_prefill_tokens 90"):
        climb(closed([1]), Machine(STEP_TIME, replace(SERVER, max_batch_prefill_tokens=90)), (1, 0))
    with pytest.raises(BadInput, match=r"fleet\.replicas: expected a number, found 1 to 2"):
        climb(replace(closed([1]), fleet=Fleet(replicas=Bounds(low=1, high=2))), MODEL, (1, 0))


def test_a_replay_of_a_run_on_its_own_model_is_the_run() -> None:
    """Closed loop: the same users at the same instants with the same lengths, so the same schedule."""
    run = climb(closed([3, 8], SPREAD, seconds=30.0), MODEL, (1, 0))
    again = replay(run, MODEL, (5, 0))
    ours, theirs = metrics.table(run), metrics.table(again)
    pd.testing.assert_frame_equal(ours, theirs, rtol=0.02)
    ended = run.requests[run.requests["status"] == "ok"]
    for name in ("sent", "first_token", "last_token"):
        assert again.requests[name].iloc[: len(ended) - 20].to_numpy() == pytest.approx(
            run.requests[name].iloc[: len(ended) - 20].to_numpy()
        )


def test_a_replay_gives_back_what_was_recorded_whatever_share_of_limits_is_attained() -> None:
    attained = dataclasses.replace(MODEL, output_attained=0.5)
    run = climb(closed([2], FIXED), MODEL, (1, 0))
    shorter, again = climb(closed([2], FIXED), attained, (1, 0)), replay(run, attained, (5, 0))
    lengths = [set(r.requests.query("status == 'ok'")["output_tokens"]) for r in (run, shorter, again)]
    assert lengths == [{FIXED.output_tokens}, {FIXED.output_tokens // 2}, {FIXED.output_tokens}]
    reasons = [set(r.requests.query("status == 'ok'")["finish_reason"]) for r in (run, shorter)]
    assert reasons == [{"length"}, {"eos_token"}]


def test_a_closed_loop_that_does_not_say_who_asked_is_replayed_with_all_its_users() -> None:
    run = climb(closed([3, 8], SPREAD, seconds=30.0), MODEL, (1, 0))
    anonymous = dataclasses.replace(run, requests=run.requests.assign(user=-1))
    again = metrics.table(replay(anonymous, MODEL, (5, 0)))
    ours = metrics.table(run)
    assert again["rps"].to_numpy() == pytest.approx(ours["rps"].to_numpy(), rel=0.05)
    assert again["in_flight"].to_numpy() == pytest.approx([3.0, 8.0], rel=0.01)
    assert with_users(run) is run
    assert texts(with_users(anonymous).warnings) == [
        f"closed: {len(run.requests)} requests do not name their user: each counts as one of a user who was free"
    ]


def test_a_stream_has_no_users_to_be_told() -> None:
    run = climb(
        Scenario(server=Flags(), name="open", workload=FIXED, load=Load(rate=[1.0], seconds=30.0)), MODEL, (1, 0)
    )
    assert with_users(run) is run


def test_what_a_late_client_sent_counts_from_when_it_was_due_in_a_replay_too() -> None:
    run = climb(
        Scenario(server=Flags(), name="open", workload=FIXED, load=Load(rate=[1.0], seconds=60.0)), MODEL, (1, 0)
    )
    late = dataclasses.replace(run, requests=run.requests.assign(scheduled=run.requests["sent"] - 0.5))
    again = replay(late, MODEL, (5, 0))
    ours, theirs = metrics.table(run).iloc[0], metrics.table(again).iloc[0]
    for metric in ("ttft_p50", "e2e_p95"):
        assert theirs[metric] == pytest.approx(ours[metric] + 0.5, abs=0.01)
    assert again.requests["sent"].to_numpy() == pytest.approx(run.requests["sent"].to_numpy())


@pytest.mark.parametrize("listed", [[1], [0, 1], [], [None]])
def test_what_came_before_the_first_segment_listed_is_replayed_too(listed: list[int | None]) -> None:
    run = climb(closed([1, 2], seconds=20.0), MODEL, (1, 0))
    segments = [{} if i is None else {"start": run.rungs[i].start, "first_rung": i} for i in listed]
    again = replay(dataclasses.replace(run, segments=segments), MODEL, (5, 0))
    assert [rung.users for rung in again.rungs] == [1, 2]
    assert len(metrics.table(again)) == 2
    assert again.requests["id"].is_unique
    assert set(again.requests["rung"]) == {0, 1}


def test_a_server_still_busy_when_the_run_began_is_busy_in_its_replay() -> None:
    """Who comes meanwhile is prefilled together, and users of equal lengths then stay together: history decides."""
    scenario = closed([3])
    bench = Bench(scenario, MODEL, (1, 0), Sampler(FIXED, 0), busy_until=1.0)
    for user in range(3):
        bench.clients.add_user(user)
        bench.clock.run(until=0.1 * (user + 1))
    bench.clock.run(until=20.0)
    bench.rungs.append(Rung(start=0.0, ramped=0.3, settled=5.0, end=20.0, users=3))
    run = bench.run()
    for each in (run, replay(run, MODEL, (5, 0))):
        assert each.steps is not None
        first = each.steps.iloc[0]
        assert (first["start"], first["prefill_sequences"]) == (pytest.approx(1.0), 3)
        assert each.steps.loc[each.steps["decode_sequences"] > 0, "decode_sequences"].min() == 3  # together ever after


def test_a_window_ends_with_so_many_answers_and_refusals_are_none() -> None:
    """Who is refused asks again at once: counted, they ended a window above the permits in two seconds."""
    few = replace(SERVER, max_concurrent_requests=4)
    run = climb(replace(closed([4, 12], retry=0.2), server=few), Machine(STEP_TIME, few), (1, 0))
    table = metrics.table(run)
    assert table["completions"].tolist() == pytest.approx([30, 48], abs=3)  # a batch ends at once
    assert table["overloaded_rate"].iloc[1] > 0.5
    assert table["rps"].iloc[1] == pytest.approx(table["rps"].iloc[0], rel=0.1)  # permits are all it has


def test_a_trace_is_measured_for_as_long_as_was_asked_after_it_has_settled() -> None:
    lengths = RequestLengths(*(np.full(36, n) for n in (100, 5, 5)), np.arange(36.0))
    for seconds, window in ((5.0, (17.5, 22.5)), (None, (17.5, 35.0)), (99.0, (17.5, 35.0))):
        load = Load(trace=True, settle=30.0, seconds=seconds)
        run = climb(
            Scenario(server=Flags(), name="trace", workload=Workload(trace="t.csv"), load=load), MODEL, (1, 0), lengths
        )
        assert (run.rungs[0].settled, run.rungs[0].end) == window


def test_a_trace_of_one_instant_has_no_rate() -> None:
    lengths = RequestLengths(*(np.full(2, n) for n in (100, 5, 5)), np.zeros(2))
    scenario = Scenario(server=Flags(), name="trace", workload=Workload(trace="t.csv"), load=Load(trace=True))
    with pytest.raises(BadInput, match=r"t\.csv: load\.trace: expected requests at several times"):
        climb(scenario, MODEL, (1, 0), lengths)


def test_the_answer_that_a_window_waited_for_came_before_it() -> None:
    """A lone user ends seven answers in a little less than the time of eight, and not eight."""
    answer = float(metrics.table(climb(closed([1], seconds=5.0), MODEL, (1, 0)))["e2e_mean"].iloc[0])
    for answers in (7.05, 7.9):
        table = metrics.table(climb(closed([1], seconds=answers * answer), MODEL, (1, 0)))
        assert table["completions"].tolist() == [7]


def test_a_replays_window_begins_as_the_recorded_one_did() -> None:
    run = climb(closed([1], seconds=60.0), MODEL, (1, 0))
    cycle = float(metrics.table(run)["e2e_mean"].iloc[0])
    for slower in (1.01, 1.02, 1.03, 1.05):
        values = {name: slower * value for name, value in STEP_TIME.parameters.items()}
        again = replay(run, Machine(affine(**values), SERVER), (5, 0))
        (rung,) = again.rungs
        last = again.requests["last_token"]
        assert last[last < rung.settled].max() == pytest.approx(rung.settled, abs=2e-6)
        assert rung.seconds == pytest.approx(60.0)
        assert metrics.table(again)["completions"].tolist() == [int(60.0 / (slower * cycle))]


def test_a_ladder_whose_every_request_is_refused_is_none() -> None:
    few = replace(SERVER, max_input_length=99, max_total_tokens=400)
    for workload in (FIXED, Workload(prompt_tokens=Lengths(uniform=(100, 900)), output_tokens=5)):
        with pytest.raises(
            BadInput, match=r"workload: every request would be refused \(422\): .* prompts of 99 tokens"
        ):
            climb(closed([1], workload), Machine(STEP_TIME, few), (1, 0))
    some = climb(closed([1], SPREAD, seconds=20.0), Machine(STEP_TIME, few), (1, 0))
    assert 0 < metrics.table(some)["error_rate"].iloc[0] < 1
