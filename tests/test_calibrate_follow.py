"""Step ends from token times, and engines driven by them: against recorded runs of real servers and simulated ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from streams import lengths, observe
from warned import texts

from calibrate.schedule.align import align
from calibrate.schedule.schedule import schedule_of
from calibrate.sources.streamed import calibrate_runs
from sim.engines.vllm_v1.flags import Flags
from sim.run import Run, read_run
from sim.steptime.linear import step_time
from sim.steptime.work import StepWork

DATA = Path(__file__).parent.parent / "data"
MIXED = {"s0": 0.008, "s1": 6e-5, "s2": 8e-10, "s3": 2e-4, "s4": 9e-5, "s5": 1.5e-7}
VLLM = Flags(version="0.32.0", max_num_seqs=24, max_num_batched_tokens=512, num_gpu_blocks=700, max_model_len=4096)


def test_tokens_within_nearly_half_a_step_share_it():
    first, second = np.array([1.0, 1.1, 1.2, 1.3]), np.array([1.104, 1.196, 1.303])
    found = align([first, second])
    assert found.step.tolist() == [0, 1, 2, 3, 1, 2, 3]
    np.testing.assert_allclose(found.ends, [1.0, 1.1, 1.196, 1.3])  # lower medians
    np.testing.assert_allclose(found.earliest, [1.0, 1.1, 1.196, 1.3])


def test_a_first_token_beside_decodes_and_one_of_its_own_are_told_apart():
    running = np.arange(10.0, 10.6, 0.1)
    beside, between = running[2:5] + 0.003, np.array([10.25, 10.3, 10.4])
    assert align([running, beside]).step.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4]
    assert align([running, between]).step.tolist() == [0, 1, 2, 4, 5, 6, 3, 4, 5]


def test_a_token_that_is_late_by_more_than_half_a_step_stays_in_its_step():
    streams = [np.arange(5.0, 6.0, 0.1) + shift for shift in (0.0, 0.001, 0.002)]
    streams[1][4] += 0.07
    assert align(streams).step.tolist() == [*range(10)] * 3


@pytest.mark.parametrize("events", [None, [None, np.array([1, 3, 1, 1]), None]])
def test_tokens_read_at_once_belong_to_the_steps_before(events: list[np.ndarray | None] | None):
    streams = [np.arange(5.0, 5.6, 0.1) + shift for shift in (0.0, 0.001, 0.002)]
    streams[1][1:3] = streams[1][3]  # as one event, or as three that a stalled client read together
    assert align(streams, events).step.tolist() == [*range(6)] * 3


@pytest.mark.parametrize(
    ("run", "least"),
    [
        ("tgi-0.9.4-router-http/long", 1.0),
        ("tgi-0.9.4-cpu/mixed", 1.0),
        ("vllm-cpu/long-chunk", 1.0),
        ("vllm-cpu/mixed-tight", 0.99),  # preempts 54 times
        ("vllm-cpu/short-roomy", 0.985),
    ],
)
def test_real_servers_decided_as_their_rules_say(run: str, least: float):
    schedule = schedule_of(read_run(DATA / run))
    assert schedule.followed.agreement >= least
    assert schedule.followed.decisions >= schedule.steps["prefill_sequences"].astype(bool).sum() / 4
    assert schedule.followed.misplaced < 1e-3 * schedule.followed.tokens
    assert "several-servers" not in [w.code for w in schedule.warnings]


def _true_steps(run: Run) -> int:
    return len({t for times in run.token_times or [] for t in times.tolist()})


@pytest.mark.parametrize("users", [[1, 2, 4], [16, 40]], ids=["few", "queued"])
def test_a_simulated_vllm_is_followed_and_its_step_times_are_found(users: list[int]):
    seen = observe(
        users, lengths((50, 1500), (20, 200)), server=VLLM, truth=MIXED, model="mixed", jitter=1e-3, seconds=25.0
    )
    schedule = schedule_of(seen.run)
    assert schedule.followed.decisions > 50
    assert schedule.followed.agreement >= 0.995
    assert len(schedule.extra) > 0 or users[0] > 1  # chunks of prompts while nothing decoded
    fitted = calibrate_runs([seen.run])
    form, truth = step_time(fitted.model, fitted.values), step_time("mixed", MIXED)
    steps = schedule.steps[schedule.steps["used"] & schedule.steps["seen"]].sample(200, random_state=1)
    works = [StepWork(*map(int, row)) for row in steps[list(StepWork.__struct_fields__)].to_numpy()]
    off = np.array([form.line(work).first / truth.line(work).first - 1 for work in works])
    assert np.abs(off).mean() < 0.02, off
    assert "scheduling decisions as the engine's rules say" in fitted.source.note


def test_a_flag_that_the_server_does_not_have_is_contradicted():
    seen = observe([16], lengths((50, 1500), (20, 200)), server=VLLM, truth=MIXED, model="mixed", jitter=1e-3)
    server = msgspec.structs.replace(VLLM, max_num_seqs=6)
    wrong = replace(seen.run, scenario=msgspec.structs.replace(seen.run.scenario, server=server))
    assert any("scheduling decisions are not those of vllm-v1" in w for w in texts(schedule_of(wrong).warnings))
    assert not any("scheduling decisions" in w for w in texts(schedule_of(seen.run).warnings))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ahead", [False, True])
def test_any_times_of_tokens_are_followed_to_the_end(seed: int, ahead: bool):
    """Streams of no engine, and flags with which some requests would wait for ever."""
    rng = np.random.default_rng(seed)
    seen = observe([6], lengths((50, 1500), (5, 60)), server=VLLM, truth=MIXED, model="mixed", seconds=4.0)
    server = msgspec.structs.replace(VLLM, async_scheduling=ahead, num_gpu_blocks=60)
    scenario = msgspec.structs.replace(seen.run.scenario, server=server)
    times = [t[0] + np.sort(rng.uniform(0.0, 1.0, len(t))).round(2) for t in seen.run.token_times or []]
    schedule = schedule_of(replace(seen.run, token_times=times, scenario=scenario))
    assert len(schedule.steps) == len(schedule.followed.works) == schedule.step.max() + 1
    assert schedule.followed.agreement < 0.98 or schedule.followed.misplaced
