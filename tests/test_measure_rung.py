"""What the ladder decides by: windows, precision, the phases of a rung, and when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from warned import texts

from measure.ladder.precision import CYCLES, FEWEST, half_width
from measure.ladder.progress import Progress
from measure.ladder.rung import Rung, client_limited, client_view, default_users, reason_to_stop, window_warnings
from measure.ladder.totals import Totals, Window
from measure.loadgen.messages import FinishedRequest, Report
from sim.model.scenario import Load
from sim.model.warning import Notice


def ended(
    user: int, sent: float, took: float = 1.0, tokens: int = 10, status: str = "ok", **more: Any
) -> FinishedRequest:
    first = sent + took / tokens if tokens else None
    last = sent + took if tokens else None
    told = {"max_new_tokens": tokens, "prompt_tokens": 5, "counted_prompt": None} | more
    return FinishedRequest(user, 0, sent, sent, sent + took, first, last, tokens, status, None, **told)


def watch(*reports: Report) -> Totals:
    found = Totals()
    for report in reports:
        found.add(report)
    return found


def window(**more: Any) -> Window:
    values: dict[str, Any] = {
        "start": 0.0,
        "end": 100.0,
        "completions": 100,
        "rps": 1.0,
        "tokens_per_s": 10.0,
        "ttft_p50": 0.1,
        "ttft_p95": 0.2,
        "e2e_mean": 1.0,
        "e2e_p50": 1.0,
        "e2e_p95": 1.1,
        "itl": 0.1,
        "half_width": 0.01,
        "in_flight": 1.0,
        "canary_p99": 0.001,
    }
    return Window(**(values | more))


def test_a_window_counts_events_by_their_own_time() -> None:
    w = watch(
        Report(
            worker=0,
            t=4.0,
            tokens=40,
            finished=[
                ended(0, 0.0, took=1.5),  # first token before the window, last inside
                ended(1, 1.2, took=0.5),
                ended(2, 1.8, took=1.0),  # first token inside, last after it
                ended(3, 1.1, took=0.4, tokens=0, status="overloaded"),
                ended(4, 1.1, took=0.4, status="aborted"),
            ],
            in_flight=[(0, 1.5)],
            lags=[0.001] * 99 + [0.05],
        )
    ).window(1.0, 2.0)
    assert (w.completions, w.rps) == (2, 2.0)
    assert w.e2e_mean == pytest.approx((1.5 + 0.5) / 2)
    # of the second, the third and the aborted one
    assert (w.ttft_p50, w.ttft_p95) == pytest.approx(tuple(np.quantile([0.05, 0.1, 0.04], [0.5, 0.95])))
    assert w.errors == {"overloaded": 1}
    assert w.error_rate == pytest.approx(1 / 3)
    # by area, unfinished ones included: 0.5 + 0.5 + 0.2 + 0.4 + 0.4 and, still alive, 0.5
    assert w.in_flight == pytest.approx(2.5)
    assert w.tokens_per_s == pytest.approx(10.0)
    assert np.isnan(w.canary_p99)  # lags were reported at 4.0, outside


def test_settling_waits_for_every_user_to_finish_a_request_begun_since() -> None:
    w = watch(Report(worker=0, t=5.0, finished=[ended(0, 0.5, took=2.0), ended(0, 2.5), ended(1, 1.5, took=2.5)]))
    assert w.settled(2, since=1.0) == 4.0  # user 0 at 3.5, user 1 at 4.0
    assert w.settled(2, since=2.0) is None
    assert w.users_finished(since=2.0) == 1
    w.add(Report(worker=0, t=9.0, finished=[ended(1, 4.0), ended(0, 3.5), ended(1, 5.0)]))
    assert w.settled(2, since=2.0) == 5.0  # the first of each, not the last


def steady(times: Sequence[float] | np.ndarray) -> np.ndarray:
    return 10.0 * np.asarray(times)


def test_precision_wants_batches_of_several_cycles() -> None:
    cycle = 2.0
    assert half_width(steady, 0.0, CYCLES * FEWEST * cycle - 0.1, cycle) == float("inf")
    assert half_width(steady, 0.0, CYCLES * FEWEST * cycle, cycle) == pytest.approx(0.0, abs=1e-12)
    assert half_width(steady, 0.0, 100.0, float("nan")) == float("inf")
    assert half_width(lambda t: 0.0 * t, 0.0, 1000.0, cycle) == float("inf")


def test_lock_step_is_not_mistaken_for_noise_nor_noise_for_precision() -> None:
    def lock_step(times: np.ndarray) -> np.ndarray:  # all tokens of a cycle come at its end
        return 100.0 * np.floor(times / 2.0)

    assert half_width(lock_step, 0.0, 120.0, 2.0) == pytest.approx(0.0, abs=0.01)
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        arrivals = np.sort(rng.uniform(0, 100, rng.poisson(2000)))
        w = half_width(lambda t, a=arrivals: np.searchsorted(a, t).astype(float), 0.0, 100.0, 1.0)
        covered += abs(len(arrivals) / 100 / 20.0 - 1) <= w * len(arrivals) / 2000
    assert 0.91 <= covered / 300 <= 0.985


def test_a_rung_of_a_fixed_length_has_exactly_that_length() -> None:
    climb = Rung(Load(users=[2], seconds=10.0), 1.0, 2, None)
    w = watch(Report(worker=0, t=1.5))
    assert climb.phase == "ramp"
    climb.step(w, 1.5, None)
    climb.ramped = 2.0
    assert "2 of 2 users" in climb.step(w, 2.5, None)
    w.add(Report(worker=0, t=5.0, finished=[ended(0, 2.1), ended(1, 2.2, took=2.0)]))
    climb.step(w, 5.0, None)
    assert (climb.phase, climb.settled) == ("measure", 4.2)
    climb.step(w, 14.1, window())
    assert climb.phase == "measure"
    climb.step(w, 14.4, window())
    assert climb.end == pytest.approx(14.2)
    assert climb.record(window())["status"] == "complete"
    assert climb.record()["status"] == "aborted"


def test_a_rung_without_a_length_is_measured_until_it_is_known_well_enough() -> None:
    climb = Rung(Load(users=[10], max_seconds=300.0), 0.0, 10, None)
    climb.ramped = climb.settled = 0.0
    assert "39 of 40 requests" in climb.step(Totals(), 50.0, window(completions=39))
    assert "to ±3.0%, not yet ±2%" in climb.step(Totals(), 51.0, window(half_width=0.03))
    assert "too short yet" in climb.step(Totals(), 52.0, window(half_width=float("inf")))
    climb.step(Totals(), 53.0, window(half_width=0.02, end=52.5))
    assert (climb.end, climb.status) == (52.5, "complete")  # of the window that was looked at


@pytest.mark.parametrize(
    ("load", "span", "end"),
    [
        (Load(users=[1], max_seconds=1.5), None, 6.5),  # known well enough a moment too late is too late
        (Load(users=[1], seconds=1.0, max_seconds=0.5), None, 6.0),
        (Load(trace=True, settle=2.0, max_seconds=0.5), 8.0, 8.0),
    ],
)
def test_a_window_ends_at_its_limit_however_late_that_is_reported(load: Load, span: float | None, end: float) -> None:
    climb = Rung(load, 0.0, 1 if load.users else None, None, span)
    w = watch(Report(worker=0, t=9.0, finished=[ended(0, 5.0), ended(0, 6.0), ended(0, 7.0)]))
    assert climb.window(w, 9.0) is None
    climb.settled = 5.0
    for now, expected in [(5.75, 5.75), (9.0, end)]:
        looked = climb.window(w, now)
        assert looked is not None and looked.end == expected


def test_a_rung_that_runs_into_its_limit_says_so() -> None:
    climb = Rung(Load(users=[1], max_seconds=60.0), 0.0, 1, None)
    climb.ramped = climb.settled = 5.0
    climb.step(Totals(), 65.1, window(completions=10, half_width=0.04))
    assert (climb.end, climb.status) == (65.0, "limited")
    assert "reached its limit of 60 s with 10 of 30 requests" in texts(climb.warnings)[0]
    stuck = Rung(Load(users=[1], max_seconds=60.0), 0.0, 1, None)
    stuck.ramped = 1.0
    stuck.step(Totals(), 61.5, None)
    assert (stuck.settled, stuck.status) == (61.5, "limited")
    assert "not steady" in texts(stuck.warnings)[0]


def test_a_budget_cuts_a_window_short_and_leaves_no_window_where_none_had_begun() -> None:
    climb = Rung(Load(users=[1]), 0.0, 1, None)
    climb.cut(3.0)
    assert climb.end is None
    climb.ramped = climb.settled = 5.0
    climb.cut(9.0)
    assert (climb.end, climb.status) == (9.0, "limited")
    assert texts(climb.warnings) == ["cut short: the budget was spent"]


def test_open_loop_settles_by_the_clock_and_a_trace_lasts_as_long_as_it_is() -> None:
    climb = Rung(Load(rate=[1.0], settle=30.0, seconds=60.0), 10.0, None, 1.0)
    climb.step(Totals(), 39.0, None)
    assert climb.phase == "settle"
    climb.step(Totals(), 41.0, None)
    climb.step(Totals(), 101.0, window())
    assert (climb.settled, climb.end) == (40.0, 100.0)
    trace = Rung(Load(trace=True, settle=30.0), 0.0, None, 5.0, span=20.0)
    trace.step(Totals(), 15.0, None)
    trace.step(Totals(), 20.5, window())
    assert (trace.settled, trace.end) == (10.0, 20.0)
    long = Rung(Load(trace=True, settle=30.0, seconds=90.0), 0.0, None, 5.0, span=100.0)
    for now in (30.0, 100.0):
        long.step(Totals(), now, window())
    assert (long.settled, long.end) == (30.0, 100.0)  # nobody comes after the last


def test_the_default_ladder() -> None:
    assert default_users(40) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert default_users(128)[-1] == 128
    assert default_users(2) == [1, 2]


@given(st.floats(0, 0.1), st.floats(0.001, 0.2))
def test_a_late_client_is_told_by_its_canary(lag: float, itl: float) -> None:
    w = window(canary_p99=lag, itl=itl)
    assert client_limited(w) == (lag > 0.020)
    assert client_view(w)["client_limited"] == client_limited(w)
    assert any("client-limited" in d.text for d in window_warnings(w, 1)) == client_limited(w)
    assert any("suspect" in d.text for d in window_warnings(w, 1)) == (lag > 0.005 and not client_limited(w))


def test_what_gives_reason_to_doubt() -> None:
    assert window_warnings(window(), 1) == []
    for changed, sentence in (
        ({"errors": {"reset": 3}}, "2.9% of the requests failed (3 reset)"),
        ({"in_flight": 0.97}, "0.97 requests were in flight on average, not 1"),
        ({"end": 2.0}, "the window is only 2.0 times as long as a request"),
        ({"completions": 0}, "no request was completed"),
        ({"attained": 0.9}, "answers have 90% of the tokens requested"),
        ({"attained": 0.9, "short": {"eos_token": 3}}, "of the tokens requested: the model itself ended 3"),
        ({"attained": 0.9, "short": {"length": 3, "": 1}}, "the server cut off 3 at a limit of its own"),
        ({"per_event": 3.9}, "an event carries 3.9 tokens on average"),
        ({"spread": 2}, "for 2 answers the server only counts the tokens in total"),
        ({"wrong_prompts": 1}, "1 prompts do not have the intended length"),
    ):
        assert any(sentence in d.text for d in window_warnings(window(**changed), 1)), sentence
    assert any("2 requests/s were sent and 1 answered" in d.text for d in window_warnings(window(), None, rate=2.0))
    assert window_warnings(window(), None, rate=1.1) == []  # within what a Poisson stream varies in 100 s
    assert window_warnings(window(in_flight=5.0), None) == []  # open loop has no number to be held to


def test_when_to_stop() -> None:
    good = [window(rps=r) for r in (1.0, 1.9, 3.5)]
    flat = [window(rps=r) for r in (3.5, 3.52, 3.55)]
    assert reason_to_stop(good, [1, 2, 4], 128, listed=False) is None
    assert "plateau" in (reason_to_stop(flat, [4, 8, 16], 128, listed=False) or "")
    assert reason_to_stop(flat[:2], [4, 8], 128, listed=False) is None  # one flat step is not two
    # two rungs that may still have gained more than 5 %, within what is known of them, are no plateau
    unsure = [window(rps=3.5, half_width=0.03)] * 3
    assert reason_to_stop(unsure, [4, 8, 16], 128, listed=False) is None
    assert reason_to_stop(flat, [4, 8, 16], 128, listed=True) is None  # a listed ladder is climbed
    assert "128 permits" in (reason_to_stop(good, [1, 2, 128], 128, listed=False) or "")
    failing = [*good, window(errors={"overloaded": 2})]
    assert "2.0% of the requests failed" in (reason_to_stop(failing, [1, 2, 4, 8], 128, listed=True) or "")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_person_sees_the_rungs(terminal: bool) -> None:
    console = Console(force_terminal=terminal, record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file, Progress(console) as screen:
        screen.update("1 user", "settling", None)
        screen.update("1 user", "measuring", window())
        screen.finish(
            "1 user", window(errors={"reset": 2}, half_width=float("inf")), "complete", [Notice(text="a warning")]
        )
    said = console.export_text()
    assert "1 user" in said and "0.100" in said
    assert ("1 user: complete; RPS 1" in said and ", 1 warning" in said) == (not terminal)
