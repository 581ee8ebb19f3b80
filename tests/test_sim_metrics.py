"""Statistics of a window: by hand, and the same for a simulated run as for one of which every token was seen."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cluster.ladder import climb
from sim.cluster.replica import Replica
from sim.engines.tgi_0_9_4 import Flags
from sim.model.calibration import Clocks, Delay
from sim.model.errors import NotEnoughData
from sim.model.machine import Machine
from sim.model.metric import COMPARED
from sim.model.requests import REQUEST_COLUMNS
from sim.model.scenario import Load, Scenario
from sim.model.steps import Call
from sim.model.workload import Lengths, Workload
from sim.results import metrics
from sim.results.gaps import FEW, Gaps, gaps, weighted_quantiles
from sim.run import Run, Rung
from sim.steptime.linear import affine
from sim.steptime.noise_parameters import Noise


def by_hand(rows: list[tuple[float, float, list[float], str]], slo: dict[str, float] | None = None) -> Run:
    """A measured run with a window [10, 20): of each request sent, ended, token times and status."""
    times = [np.array(t, dtype=np.float64) for _, _, t, _ in rows]
    table = pd.DataFrame(
        {
            "id": range(len(rows)),
            "rung": 0,
            "user": range(len(rows)),
            "replica": -1,
            "scheduled": [sent for sent, *_ in rows],
            "sent": [sent for sent, *_ in rows],
            "ended": [ended for _, ended, *_ in rows],
            "prompt_tokens": [100 * (i + 1) for i in range(len(rows))],
            "max_new_tokens": 9,
            "output_tokens": [len(t) for t in times],
            "first_token": [t[0] if len(t) else math.nan for t in times],
            "last_token": [t[-1] if len(t) else math.nan for t in times],
            "finish_reason": None,
            "status": [status for *_, status in rows],
            "error": None,
        }
    )
    assert list(table) == list(REQUEST_COLUMNS)
    scenario = Scenario(server=Flags(), name="hand", slo=slo or {})
    rung = Rung(start=0.0, ramped=1.0, settled=10.0, end=20.0, users=3)
    return Run("measured", "hand", scenario, [rung], table, token_times=times)


ROWS = [
    (8.0, 12.0, [9.0, 10.0, 12.0], "ok"),  # began before, ended inside
    (12.0, 19.0, [13.0, 16.0, 19.0], "ok"),
    (15.0, 20.0, [16.0, 18.0, 20.0], "ok"),  # its last token is the first instant after the window
    (18.0, 18.0, [], "overloaded"),
    (1.0, 9.0, [2.0, 9.0], "ok"),  # before
    (19.0, 25.0, [19.5], "aborted"),
]


def test_who_counts_in_a_window() -> None:
    found = metrics.rung_metrics(by_hand(ROWS), by_hand(ROWS).rungs[0])
    assert found["rps"] == 0.2
    assert found["e2e_mean"] == (4.0 + 7.0) / 2
    assert (found["e2e_p50"], found["e2e_p95"]) == (4.0, 7.0)
    assert found["ttft_mean"] == pytest.approx((1.0 + 1.0 + 0.5) / 3)
    assert found["tpot_mean"] == (1.5 + 3.0) / 2
    assert found["output_tokens_per_s"] == 0.8  # 10, 12 | 13, 16, 19 | 16, 18 | 19.5
    assert found["itl_mean"] == pytest.approx((1 + 2 + 3 + 3 + 2) / 5)  # the gap that ends at 10 counts, at 20 not
    assert (found["itl_p50"], found["itl_p99"]) == (2.0, 3.0)
    assert found["input_tokens_per_s"] == (200 + 300 + 600) / 10
    assert found["error_rate"] == found["overloaded_rate"] == pytest.approx(1 / 3)
    assert found["completions"] == 2


def test_tokens_of_an_answer_in_one_piece_count_when_it_came() -> None:
    """The third answer, of 3 tokens: two of them had counted in the window, and now all do or none does."""
    run = by_hand(ROWS)
    times = [t if row != 2 else np.empty(0) for row, t in enumerate(run.token_times or [])]
    whole = replace(run, token_times=times)
    ends = float(run.requests["last_token"].iloc[2])
    assert ends == 20.0  # after the window
    assert metrics.rung_metrics(whole, run.rungs[0])["output_tokens_per_s"] == pytest.approx(0.6)
    later = replace(run.rungs[0], settled=11.0, end=21.0)
    assert metrics.rung_metrics(whole, later)["output_tokens_per_s"] == pytest.approx((1 + 3 + 3 + 1) / 10)


def test_when_prompts_were_taken_in_is_not_known_of_answers_that_were_not_streamed() -> None:
    run = by_hand(ROWS)
    assert metrics.rung_metrics(run, run.rungs[0])["input_tokens_per_s"] > 0
    blind = replace(run, requests=run.requests.assign(first_token=math.nan), token_times=None)
    assert math.isnan(metrics.rung_metrics(blind, run.rungs[0])["input_tokens_per_s"])


def test_goodput_counts_the_requests_that_met_every_slo() -> None:
    for slo, good in (
        ({"e2e_p95": 5.0}, 1),
        ({"e2e_p95": 7.0}, 2),
        ({"e2e_p95": 7.0, "tpot_mean": 2.0}, 1),
        ({"itl_p95": 2.0}, 1),
        ({}, 2),
    ):
        run = by_hand(ROWS, slo)
        assert metrics.rung_metrics(run, run.rungs[0])["goodput"] == good / 10
        assert metrics.rung_metrics(by_hand(ROWS), run.rungs[0], slo)["goodput"] == good / 10


def test_a_window_in_which_nothing_happens_has_no_latency_and_one_of_no_length_is_refused() -> None:
    run = by_hand([(1.0, 2.0, [2.0], "ok")])
    found = metrics.rung_metrics(run, run.rungs[0])
    assert found["rps"] == found["output_tokens_per_s"] == found["error_rate"] == 0.0
    assert all(math.isnan(found[name]) for name in ("e2e_mean", "ttft_p95", "itl_mean", "itl_p50", "tpot_mean"))
    with pytest.raises(NotEnoughData):
        metrics.rung_metrics(run, replace(run.rungs[0], end=10.0))
    assert metrics.table(replace(run, rungs=[replace(run.rungs[0], end=math.nan)])).empty


def both(monkeypatch: pytest.MonkeyPatch, scenario: Scenario, noise: Noise, clocks: Clocks) -> tuple[Run, Run]:
    """A simulated run, and the same as it would have been measured: with every token's time instead of steps."""
    seen: dict[tuple[int, float], list[float]] = {}

    def record(call: Call) -> None:
        if call.op != "filter":
            for r in call.members:
                seen.setdefault((r.user, r.sent), []).extend(call.ends)

    monkeypatch.setattr("sim.cluster.testbed.Replica", partial(Replica, on_call=record))
    server = Flags(max_batch_total_tokens=1500, max_concurrent_requests=12)
    step_time = affine(a0=0.01, a1=1e-4, b0=0.02, b1=1e-3, b2=2e-6, b3=1e-6, c0=0.004, f0=0.003)
    run = climb(scenario, Machine(step_time, server, noise, clocks), (3, 0))
    rows = zip(run.requests["user"], run.requests["sent"], run.requests["output_tokens"], strict=True)
    times = [np.array(seen.get((user, sent), [])[:n]) for user, sent, n in rows]
    return run, replace(run, kind="measured", token_times=times, steps=None, step_ends=None)


LADDER = Scenario(
    server=Flags(),
    name="ladder",
    workload=Workload(prompt_tokens=Lengths(uniform=(10, 200)), output_tokens=Lengths(uniform=(1, 60))),
    load=Load(users=[1, 4, 16], seconds=37.0),
    slo={"e2e_p95": 2.0, "ttft_p95": 0.5},
)


@pytest.mark.parametrize("noise", [Noise(), Noise(prefill=[0.8, 1.2], decode=[0.7, 1.0, 1.3], drift=0.1)])
def test_simulated_and_measured_statistics_are_the_same(monkeypatch: pytest.MonkeyPatch, noise: Noise) -> None:
    simulated, measured = both(monkeypatch, LADDER, noise, Clocks(turnaround=Delay(quantiles=[0.001, 0.03])))
    ours, theirs = metrics.table(simulated), metrics.table(measured)
    assert set(COMPARED) <= set(ours.columns)
    for name in theirs.columns:
        assert ours[name].to_numpy() == pytest.approx(theirs[name].to_numpy(), rel=1e-9, abs=1e-9), name
    assert ours["overloaded_rate"].iloc[-1] > 0  # sixteen users, twelve permits
    assert (ours["itl_p99"] > 1.2 * ours["itl_p50"])[1:].all()  # joining prefills stall those that run
    edges = [(0.0, simulated.rungs[-1].end), *((rung.start, rung.settled) for rung in simulated.rungs)]
    for low, high in edges:  # windows that cut through runs of steps
        assert gaps(simulated, low, high).tokens == gaps(measured, low, high).tokens


@pytest.mark.parametrize("rate", [None, 4.0])
def test_littles_law_holds_by_area_in_every_window(monkeypatch: pytest.MonkeyPatch, rate: float | None) -> None:
    load = LADDER.load if rate is None else Load(rate=[rate], seconds=60.0)
    scenario = Scenario(server=Flags(), name="little", workload=LADDER.workload, load=load)
    run, _ = both(monkeypatch, scenario, Noise(), Clocks())
    for rung, (_, row) in zip(run.rungs, metrics.table(run).iterrows(), strict=True):
        present = sorted([(t, 1) for t in run.requests["sent"]] + [(t, -1) for t in run.requests["ended"]])
        area, n = 0.0, 0
        for (at, change), (after, _) in pairwise([*present, (rung.end, 0)]):
            n += change
            area += n * max(0.0, min(after, rung.end) - max(at, rung.settled))
        assert row["in_flight"] == pytest.approx(area / rung.seconds, rel=1e-9)
        if rung.users == 4:  # nobody is refused, and nobody thinks
            assert row["in_flight"] == pytest.approx(4.0, rel=1e-9)
        assert row["queue"] <= row["in_flight"]
        assert row["prefill_share"] + row["decode_share"] + row["idle_share"] == pytest.approx(1.0)


lines = st.lists(
    st.tuples(st.floats(0.01, 1), st.sampled_from([0.0, 1e-4, 0.01]), st.integers(1, 60), st.integers(1, 5)),
    min_size=1,
    max_size=30,
)


@given(lines, st.integers(1, 400))
def test_lines_of_gaps_have_the_mean_and_quantiles_of_their_gaps(
    drawn: list[tuple[float, float, int, int]], many: int
) -> None:
    first, growth, count, weight = (np.array(column) for column in zip(*drawn, strict=True))
    count = count * many  # far above what is laid out one by one
    made = Gaps(first, growth, count, weight.astype(float), 0.0)
    every = np.concatenate([f + g * np.arange(n) for f, g, n in zip(first, growth, count, strict=True)])
    weights = np.repeat(weight.astype(float), count)
    shares = [0.001, 0.5, 0.95, 0.99, 1.0]
    assert made.mean() == pytest.approx(np.average(every, weights=weights), rel=1e-9)
    assert made.quantiles(shares) == pytest.approx(weighted_quantiles(every, weights, shares), rel=1e-9)


def test_quantiles_are_the_least_value_that_enough_lies_below() -> None:
    values = np.array([3.0, 1.0, 2.0])
    assert weighted_quantiles(values, np.ones(3), [1 / 3, 0.34, 2 / 3, 0.67, 1.0]) == [1.0, 2.0, 2.0, 3.0, 3.0]
    assert weighted_quantiles(values, np.array([8.0, 1.0, 1.0]), [0.1, 0.2, 0.21]) == [1.0, 2.0, 3.0]
    assert all(map(math.isnan, weighted_quantiles(np.empty(0), np.empty(0), [0.5])))
    assert FEW < 60 * 400 * 30
