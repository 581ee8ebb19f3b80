"""vLLM where a theory says what must come out: a queue of one server, and what chunking promises running chats."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from sim.cluster.clock import Clock
from sim.cluster.replica import Replica
from sim.engines import tgi_0_9_4
from sim.engines.engine import Engine
from sim.engines.tgi_0_9_4 import Engine as Tgi
from sim.engines.vllm_v1 import Engine as Vllm
from sim.engines.vllm_v1 import Flags
from sim.model.request import Request
from sim.steptime.linear import Linear, affine
from sim.steptime.work import StepWork

SETTLE = 300  # requests that are not counted: the server was idle when they came


def mean_sojourns(flags: Flags, step_time: Linear, output: int, new: int, rate: float, counted: int) -> list[float]:
    """Mean time from arrival to last token under Poisson arrivals of 16 tokens, in 12 independent replicates, s."""
    means = []
    for seed in range(12):
        arrivals = np.random.default_rng([7, seed]).exponential(1 / rate, SETTLE + counted).cumsum()
        clock, ended = Clock(), list[Request]()
        replica = Replica(clock, Vllm(flags), step_time, ended.append)
        for uid, at in enumerate(arrivals.tolist()):
            clock.call(at, replica.submit, Request(uid, 16, output, new, sent=at))
        clock.run()
        means.append(float(np.mean([r.last_token - r.sent for r in ended[SETTLE:]])))
    return means


def interval(values: list[float]) -> tuple[float, float]:
    """The 99.9 % interval of the mean of independent replicates (Student's t)."""
    low, high = stats.t.interval(0.999, len(values) - 1, np.mean(values), stats.sem(values))
    return float(low), float(high)


def wait(service: float, service_sq: float, rate: float) -> float:
    """Mean wait in an M/G/1 queue (Pollaczek and Khinchine)."""
    return rate * service_sq / (2 * (1 - rate * service))


def one_at_a_time(asynchronous: bool) -> Flags:
    return Flags(
        max_num_seqs=1,
        enable_chunked_prefill=False,
        max_num_batched_tokens=4096,
        num_gpu_blocks=2000,
        async_scheduling=asynchronous,
    )


@pytest.mark.parametrize(("load", "asynchronous"), [(0.5, False), (0.8, False), (0.8, True)])
def test_prompts_one_at_a_time_wait_as_in_m_d_1(load: float, asynchronous: bool) -> None:
    step_time = affine(a0=0.5, a1=1 / 32)  # a prompt: a second
    low, high = interval(mean_sojourns(one_at_a_time(asynchronous), step_time, 1, 1, load, 2000))
    assert low < 1.0 + wait(1.0, 1.0, load) < high
    assert high < 1.0 + wait(1.0, 2.0, load)  # M/M/1 waits twice as long: the interval can tell


def test_an_asynchronous_scheduler_spends_one_more_step_on_an_answer_that_stops_early() -> None:
    step_time = affine(a0=0.5, b0=0.125)  # a prompt and four steps: a second; the step for nothing: an eighth
    low, high = interval(mean_sojourns(one_at_a_time(True), step_time, 5, 9, 0.6, 600))
    assert low < 1.0 + wait(1.125, 1.125**2, 0.6) < high
    assert 1.0 + wait(1.0, 1.0, 0.6) < low
    low, high = interval(mean_sojourns(one_at_a_time(True), step_time, 5, 5, 0.6, 600))
    assert low < 1.0 + wait(1.0, 1.0, 0.6) < high


CHATS, LONG = 8, 6000
MIXED = affine(a0=0.01, a1=1e-4, a2=1e-8, b0=0.02, b1=1e-3, b2=1e-6)


def beside_a_long_prompt(engine: Engine) -> tuple[float, float, float]:
    """Chats run, and a long prompt comes at 2 s: their longest gap, its TTFT, and the longest step of `MIXED`, s."""
    chats = [Request(uid, 100, 400, 400) for uid in range(CHATS)]
    newcomer = Request(CHATS, LONG, 5, 5)
    times: dict[Request, list[float]] = {r: [] for r in [*chats, newcomer]}
    due, now, longest = [(2.0, newcomer)], 0.0, 0.0
    for chat in chats:
        engine.submit(chat)
    while (plan := engine.plan()) is not None:
        before = {r: engine.received(r, 0) for r in times}
        took = MIXED.line(plan.work).first + MIXED.line(plan.once or StepWork()).first
        longest = max(longest, took)
        now += took
        while due and due[0][0] <= now:
            engine.submit(due.pop()[1])
        outcome = engine.commit(plan, 1)
        for r in times:
            if r in outcome.finished or engine.received(r, 0) > before[r]:
                times[r].append(now)
    gaps = [b - a for chat in chats for a, b in pairwise(times[chat])]
    assert all(len(times[r]) == r.output_tokens for r in times)
    return max(gaps), times[newcomer][0] - 2.0, longest


def fullest_step(budget: int) -> float:
    """The time of the dearest step of so many tokens beside the chats: the last chunk of the long prompt, s."""
    chunk = budget - CHATS
    attention = chunk * LONG  # an upper bound
    decode = StepWork(1, decode_sequences=CHATS, decode_context=CHATS * 500, decode_longest=500)
    return MIXED.line(StepWork(1, chunk, 1, attention, chunk)).first + MIXED.line(decode).first


@pytest.mark.parametrize("asynchronous", [False, True])
def test_chunking_bounds_the_gaps_of_running_chats_and_makes_the_prompt_wait(asynchronous: bool) -> None:
    gaps, ttfts = [], []
    for budget in (128, 512, 2048):
        flags = Flags(
            max_model_len=8192,
            max_num_batched_tokens=budget,
            num_gpu_blocks=2000,
            async_scheduling=asynchronous,
        )
        gap, ttft, longest = beside_a_long_prompt(Vllm(flags))
        assert gap == pytest.approx(longest)  # no chat ever sits out a step
        assert gap <= fullest_step(budget)
        gaps.append(gap)
        ttfts.append(ttft)
    assert gaps == sorted(gaps) and ttfts == sorted(ttfts, reverse=True)  # the budget trades one for the other
    assert gaps[0] < 0.2 * gaps[-1]


def test_tgi_makes_running_chats_wait_for_a_whole_prompt() -> None:
    config = tgi_0_9_4.Flags(
        max_batch_prefill_tokens=8192, max_batch_total_tokens=50_000, max_input_length=8000, max_total_tokens=8192
    )
    gap, _, _ = beside_a_long_prompt(Tgi(config))
    prompt = MIXED.line(StepWork(1, LONG, 1, LONG * (LONG + 1) // 2, LONG)).first
    assert gap >= prompt
    chunked, ttft_of_chunked, _ = beside_a_long_prompt(
        Vllm(Flags(max_model_len=8192, max_num_batched_tokens=512, num_gpu_blocks=2000))
    )
    assert chunked < 0.3 * gap
    assert ttft_of_chunked > prompt
