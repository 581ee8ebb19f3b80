"""The schedule behind streams: against the simulator's own, and against the recorded server's counters."""

import gzip
import json
import shutil
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from streams import lengths, observe
from warned import texts

from calibrate.schedule.cross_check import cross_check
from calibrate.schedule.schedule import schedule_of, works
from sim.engines.tgi_0_9_4 import Flags
from sim.model.errors import NotEnoughData
from sim.run import Run, read_run
from sim.steptime.basis import COLUMNS
from sim.steptime.noise_parameters import Noise

DATA = Path(__file__).parent.parent / "data"
RECORDED = sorted(p.parent for p in DATA.glob("tgi-0.9.4-*/*/run.json"))
NOISY = Noise(prefill=[0.95, 1.0, 1.05], decode=[0.9, 1.0, 1.1], drift=0.05)


@pytest.mark.parametrize("users", [[1], [2, 3], [8], [24], [64]])
@pytest.mark.parametrize("workload", [lengths(300, 40), lengths((10, 900), (1, 60))])
def test_steps_found_are_the_servers(users, workload):
    seen = observe(users, workload, noise=NOISY, jitter=1e-3, seconds=15.0)
    schedule = schedule_of(seen.run)
    found = [(k, frozenset(m.tolist())) for k, m in zip(schedule.steps["kind"], schedule.steps["members"], strict=True)]
    true = seen.steps
    alike = SequenceMatcher(None, true, found, autojunk=False).get_matching_blocks()
    assert sum(block.size for block in alike) >= 0.995 * max(len(true), len(found))
    assert not texts(schedule.warnings)


def test_sizes_contexts_and_neighbours_of_a_hand_made_schedule():
    # r0 is prefilled alone, r1 joins it after one decode step and ends at the same time; then r1's third is filtered
    times = [np.array([1.0, 1.1, 1.5, 1.6]), np.array([1.4, 1.5, 1.6, 1.72])]
    steps = schedule_of(_run(times, prompt=[100, 200], sent=[0.5, 1.05])).steps
    assert steps["kind"].tolist() == ["prefill", "decode", "prefill", "decode", "decode", "decode"]
    assert steps["sequences"].tolist() == [1, 1, 1, 2, 2, 1]
    passes, joins, filters = (pd.DataFrame(work) for work in works(steps))
    assert set(passes) | set(joins) | set(filters) == set(COLUMNS)
    assert passes["prefill_tokens"].tolist() == [100, 0, 200, 0, 0, 0]
    assert passes["prefill_attention"].tolist() == [100 * 101 / 2, 0, 200 * 201 / 2, 0, 0, 0]
    assert passes["decode_context"].tolist() == [0, 101, 0, 102 + 201, 103 + 202, 203]
    assert (passes["prefill_longest"] + passes["decode_longest"]).tolist() == [100, 101, 200, 201, 202, 203]
    assert joins.to_numpy().tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [201, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert filters.to_numpy().tolist() == [[0, 0, 0]] * 5 + [[203, 1, 1]]
    assert steps["seen"].tolist() == [False] + [True] * 5
    assert steps["seconds"].to_numpy()[1:] == pytest.approx([0.1, 0.3, 0.1, 0.1, 0.12])
    assert steps["since"].tolist() == [0, 1, 0, 1, 2, 3]


def test_on_an_idle_server_the_first_of_a_burst_is_prefilled_alone():
    times = [np.array([1.2, 1.6, 1.7]), np.array([1.5, 1.6, 1.7]), np.array([1.5001, 1.6, 1.7])]
    steps = schedule_of(_run(times, prompt=[50, 50, 50], sent=[1.0, 1.0, 1.0])).steps
    assert steps["kind"].tolist() == ["prefill", "prefill", "decode", "decode"]
    assert steps["sequences"].tolist() == [1, 2, 3, 3]
    assert steps["once_joined"].tolist() == [0, 0, 2, 0]
    assert steps["once_kept"].tolist() == [0, 0, 1, 0]


def test_beside_running_requests_there_is_one_prefill_between_two_steps():
    # the first tokens of r1 and r2 are seen 6 ms apart, but r0 runs on: the router does not prefill twice in a row
    times = [np.array([1.0, 1.1, 1.5, 1.6]), np.array([1.4, 1.5, 1.6]), np.array([1.406, 1.5, 1.6])]
    steps = schedule_of(_run(times, prompt=[50, 50, 50], sent=[0.5, 1.05, 1.06])).steps
    assert steps["kind"].tolist() == ["prefill", "decode", "prefill", "decode", "decode"]
    assert steps["sequences"].tolist() == [1, 1, 2, 3, 3]


def test_one_late_token_moves_no_stream():
    seen = observe([4], lengths(200, 50), seconds=10.0)
    late = [t.copy() for t in seen.run.token_times or []]
    for t in late[::3]:
        t[5] = t[8]  # a stalled read: three tokens arrive with the fourth
        t[6] = t[7] = t[8]
    clean, shaken = schedule_of(seen.run).steps, schedule_of(replace(seen.run, token_times=late)).steps
    assert clean["kind"].tolist() == shaken["kind"].tolist()
    assert clean["sequences"].tolist() == shaken["sequences"].tolist()


@pytest.mark.parametrize("keep", [lambda u: u % 16 != 3, lambda u: u < 8, lambda u: u % 3 != 0])
def test_users_that_a_run_does_not_show_are_missed(keep):
    run = observe([4, 32], lengths((100, 800), (20, 80)), seconds=10.0).run
    kept = np.flatnonzero([keep(u) for u in run.requests["user"]])
    part = replace(
        run,
        requests=run.requests.iloc[kept].reset_index(drop=True),
        token_times=[(run.token_times or [])[i] for i in kept],
    )
    assert not texts(schedule_of(run).warnings)
    assert any("shows only" in d and "of 32 users" in d for d in texts(schedule_of(part).warnings))


def test_lost_streams_leave_gaps_that_are_warned_about():
    run = observe([1, 4, 16], lengths((400, 1500), (20, 80)), seconds=15.0).run
    kept = np.flatnonzero(np.random.default_rng(0).random(len(run.requests)) > 0.15)
    part = replace(
        run,
        requests=run.requests.iloc[kept].reset_index(drop=True),
        token_times=[(run.token_times or [])[i] for i in kept],
    )
    assert any("other clients' requests" in d for d in texts(schedule_of(part).warnings))


def test_gathered_tokens_are_warned_about():
    seen = observe([3], lengths(200, 60), seconds=10.0)
    gathered = [t[np.minimum(np.arange(len(t)) // 4 * 4 + 3, len(t) - 1)] for t in seen.run.token_times or []]
    assert any("buffers" in d for d in texts(schedule_of(replace(seen.run, token_times=gathered)).warnings))


def test_a_client_that_sees_part_of_the_traffic_is_told_so():
    seen = observe([12], lengths(800, 40), seconds=30.0)
    mine = seen.run.requests["user"].to_numpy() < 4
    times = [t for t, m in zip(seen.run.token_times or [], mine, strict=True) if m]
    part = replace(seen.run, requests=seen.run.requests[mine].reset_index(drop=True), token_times=times)
    assert any("other clients" in d for d in texts(schedule_of(part).warnings))


def test_several_servers_behind_one_address_are_warned_about():
    one = observe([4], lengths(200, 80), seconds=12.0).run
    two = observe([4], lengths(200, 80), seconds=12.0, truth={"a0": 0.02, "a1": 1e-4, "b0": 0.0231}, seed=1).run
    both = replace(
        one,
        requests=_stacked(one, two),
        token_times=[*(one.token_times or []), *(t + 0.007 for t in two.token_times or [])],
    )
    assert any("several servers" in d for d in texts(schedule_of(both).warnings))


def test_an_aborted_run_and_resumed_segments_make_no_long_steps():
    seen = observe([6], lengths(200, 40), seconds=10.0)
    again = replace(seen.run, segments=[{"start": 0.0, "first_rung": 0}, {"start": 5.0, "first_rung": 0}])
    steps = schedule_of(again).steps
    across = (steps["end"].shift(fill_value=-1.0) < 5.0) & (steps["end"] >= 5.0)
    assert across.sum() == 1
    assert not steps["seen"][across].any()


def test_without_token_times_there_is_nothing_to_follow():
    seen = observe([2], lengths(200, 40), seconds=5.0)
    with pytest.raises(NotEnoughData, match="no token times, or none"):
        schedule_of(replace(seen.run, token_times=None))


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_recorded_runs_agree_with_the_servers_counters(path):
    run = read_run(path)
    schedule = schedule_of(run)
    assert texts(schedule.warnings) == []
    assert texts(cross_check(run, schedule)) == []
    # laws: no request twice in a step; a stream's decode steps follow one another without a gap
    pairs = np.stack([schedule.request, schedule.step])
    assert len(np.unique(pairs, axis=1).T) == len(schedule.request)
    decode = np.cumsum((schedule.steps["kind"] == "decode").to_numpy())[schedule.step]
    inside = (schedule.token[1:] > 1) & (schedule.request[1:] == schedule.request[:-1])
    assert (np.diff(decode)[inside] == 1).all()
    assert (np.diff(schedule.steps["end"]) >= 0).all()


def test_counters_that_disagree_are_warned_about():
    run = read_run(DATA / "tgi-0.9.4-cpu" / "short")
    few = run.requests["user"].to_numpy() < 3
    times = [t for t, m in zip(run.token_times or [], few, strict=True) if m]
    part = replace(run, requests=run.requests[few].reset_index(drop=True), token_times=times)
    assert any("other traffic" in d for d in texts(cross_check(part, schedule_of(part))))


def test_time_that_the_server_says_was_spent_on_the_other_kind_of_step_is_warned_about():
    run = read_run(DATA / "tgi-0.9.4-router-http" / "long")
    schedule = schedule_of(run)
    steps = schedule.steps.copy()
    prefill = (steps["kind"] == "prefill").to_numpy()
    moved = 0.2 * steps.loc[prefill, "seconds"].sum()
    steps.loc[prefill, "seconds"] *= 0.8
    steps.loc[~prefill, "seconds"] += moved / (~prefill).sum()
    warnings = texts(cross_check(run, replace(schedule, steps=steps)))
    assert len(warnings) == 2
    assert "the streams show prefill steps of 307" in warnings[0] and "the server says 383.7 ms" in warnings[0]
    assert "decode steps" in warnings[1]


@pytest.mark.parametrize("name", ["long-chunk", "mixed-tight"])
def test_steps_and_requests_of_vllm_are_those_that_it_counts(name, tmp_path):
    run = read_run(shutil.copytree(DATA / "vllm-cpu" / name, tmp_path / "run"))
    schedule = schedule_of(run)
    assert texts(cross_check(run, schedule)) == []
    packed = tmp_path / "run" / "server.jsonl.gz"
    text = gzip.decompress(packed.read_bytes()).decode()
    # as servecast scrapes them, with labels
    packed.with_suffix("").write_text(
        text.replace('iteration_tokens_total_count"', 'iteration_tokens_total_count{e=0}"')
    )
    assert texts(cross_check(run, schedule)) == []
    half = replace(schedule, steps=schedule.steps.iloc[::2])
    assert any("steps, the server counted" in said for said in texts(cross_check(run, half)))
    packed.with_suffix("").unlink()
    packed.write_bytes(packed.read_bytes()[:200])
    assert texts(cross_check(run, schedule)) == []


def test_counters_of_a_server_started_anew_are_counted_from_there(tmp_path):
    """A run that was resumed: the warm-ups of either segment are on no record, and counters begin at nothing again."""
    run = read_run(shutil.copytree(DATA / "tgi-0.9.4-cpu" / "short", tmp_path / "run"))
    schedule = schedule_of(run)
    again = run.rungs[2].start
    scrapes = [json.loads(line) for line in (tmp_path / "run" / "server.jsonl").read_text().splitlines()]
    before = max((s for s in scrapes if s["t"] < again), key=lambda s: s["t"])["metrics"]
    for scrape in scrapes:
        if scrape["t"] >= again:
            scrape["metrics"] = {name: value - before.get(name, 0.0) for name, value in scrape["metrics"].items()}
    (tmp_path / "run" / "server.jsonl").write_text("".join(json.dumps(s) + "\n" for s in scrapes))
    assert texts(cross_check(run, schedule)) != []
    resumed = replace(run, segments=[{"start": 0.0, "first_rung": 0}, {"start": again, "first_rung": 2}])
    assert texts(cross_check(resumed, schedule_of(resumed))) == []


def _run(times: list[np.ndarray], prompt: list[int], sent: list[float]) -> Run:
    seen = observe([1], lengths(10, 2), seconds=0.5, server=Flags(max_batch_total_tokens=36000)).run
    requests = seen.requests.iloc[[0] * len(times)].reset_index(drop=True)
    requests["user"] = range(len(times))
    requests["prompt_tokens"] = prompt
    requests["sent"] = requests["scheduled"] = sent
    requests["last_token"] = [t[-1] for t in times]
    return replace(seen, requests=requests, token_times=times)


def _stacked(one: Run, two: Run):
    import pandas as pd

    return pd.concat([one.requests, two.requests.assign(user=two.requests["user"] + 100)], ignore_index=True)
