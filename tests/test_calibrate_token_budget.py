"""The token budget is read from what a recorded router let in and what it left in its queue."""

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from warned import texts

from calibrate.schedule.schedule import schedule_of
from calibrate.schedule.token_budget import AdmissionEvidence, budget_bounds, fit_budget, known_budget
from calibrate.sources.streamed import calibrate_runs
from scenarios.compare.run_with_model import compare, forecast_run
from sim.engines.tgi_0_9_4 import Flags
from sim.run import Run, read_run

DATA = Path(__file__).parent.parent / "data"


def hidden(name: str) -> Run:
    """A recorded run whose budget nobody tells."""
    run = read_run(DATA / name)
    server = msgspec.structs.replace(run.scenario.server, max_batch_total_tokens=None)
    return replace(run, info=None, scenario=msgspec.structs.replace(run.scenario, server=server))


def found(*runs: Run, rungs=None) -> tuple[float, float, list[str]]:
    """The least and the largest budget drawn, and the warnings."""
    schedules = [schedule_of(run, rungs) for run in runs]
    fitted = fit_budget(runs, schedules, np.random.default_rng(0), 400)
    assert fitted is not None
    _, draws, warnings = fitted
    return min(draws), max(draws), texts(warnings)


@pytest.mark.parametrize(
    ("name", "truth", "within"), [("tgi-0.9.4-router-http/long", 36000, 0.05), ("tgi-0.9.4-cpu/mixed", 4800, 0.002)]
)
def test_a_prefill_that_left_the_head_of_the_queue_bounds_it_from_above(name, truth, within):
    assert known_budget(hidden(name)) is None
    low, high, warnings = found(hidden(name))
    assert low <= truth <= high
    assert high - low < within * truth
    assert warnings == [d for d in warnings if "is between" in d]


@pytest.mark.parametrize(
    "name", ["router-http/short", "cpu/long", "cpu/long-between", "cpu/short", "cpu/short-between"]
)
def test_where_it_never_bound_nothing_bounds_it_from_above(name):
    _, _, warnings = found(hidden(f"tgi-0.9.4-{name}"))
    assert len(warnings) == 1
    assert "never bound" in warnings[0]


def test_rungs_held_out_are_not_looked_at():
    run = hidden("tgi-0.9.4-router-http/long")
    low, high, warnings = found(run, rungs=[0, 1, 2])
    said = re.match(r"max_batch_total_tokens is at least (\d+); it never bound", warnings[0])
    assert said is not None and int(said[1]) < 8000  # what four users may hold
    assert low >= run.server.max_batch_prefill_tokens  # the warm-up's, which had room
    assert low <= 36000 <= high


def test_a_budget_that_never_bound_does_not_bind_what_was_not_measured():
    """Fitted on up to four users, with a budget of twice what they held, 32 users got a fifth of their throughput."""
    run = hidden("tgi-0.9.4-router-http/short")
    calibration = calibrate_runs([run], rungs=[{0, 1, 2}])
    budget = calibration.parameters["max_batch_total_tokens"]
    assert budget.low <= 36000 <= budget.high
    rows = compare(run, forecast_run(run, calibration, replicates=39)).rows
    at_32 = {row.metric: row for row in rows if row.load == 32}
    assert abs(at_32["output_tokens_per_s"].relative_error or 0.0) < 0.1
    assert abs(at_32["e2e_mean"].relative_error or 0.0) < 0.1
    assert at_32["rps"].inside  # its window counts ± a whole batch of users in lock-step


def test_a_server_that_pads_and_never_bound_has_the_routers_default():
    low, high, _ = found(hidden("tgi-0.9.4-cpu/short"))
    assert (low, high) == (16000, 16000)


def test_of_several_servers_the_budget_is_what_any_of_them_may_have():
    small = Flags(max_batch_prefill_tokens=1024, max_input_length=512, max_total_tokens=1000)
    large = Flags(max_batch_prefill_tokens=8192, max_concurrent_requests=64)
    assert budget_bounds([small], 300) == (1024, 128 * 1024)  # 1,008 in whole blocks, and one more for the answer's own
    assert budget_bounds([small, large], 2000) == (2000, 64 * 2064)
    assert budget_bounds([large], 300) == (8192, 64 * 2064)
    assert budget_bounds([small], 10**6) == (10**6, 10**6)


def test_requests_that_were_not_yet_there_do_not_outvote_the_rest():
    run = hidden("tgi-0.9.4-router-http/long")
    sent = run.requests["sent"].copy()
    late = run.requests.index[run.requests["rung"] == 3][:40:8]
    sent[late] -= 0.4  # as if their network latency were long: they were not queued yet
    low, high, warnings = found(replace(run, requests=run.requests.assign(sent=sent)))
    assert (low, high) == pytest.approx(found(run)[:2])
    assert "contradict" in warnings[1]


def test_who_never_came_into_the_queue_did_not_wait_in_it():
    run = hidden("tgi-0.9.4-router-http/short")
    requests = run.requests.copy()
    refused = requests.index[10]
    times = list(run.token_times or [])
    times[refused] = np.array([])
    requests.loc[refused, ["status", "output_tokens"]] = ["overloaded", 0]
    assert "never bound" in found(replace(run, requests=requests, token_times=times))[2][0]


def test_of_budgets_that_were_told_and_differ_a_forecast_that_is_not_told_takes_any():
    runs = [read_run(DATA / "tgi-0.9.4-cpu" / name) for name in ("short-again", "long-again")]
    server = msgspec.structs.replace(runs[0].scenario.server, max_batch_total_tokens=3600)
    runs[0] = replace(runs[0], info=None, scenario=msgspec.structs.replace(runs[0].scenario, server=server))
    found = calibrate_runs(runs)
    assert set(found.draws["max_batch_total_tokens"]) == {3600.0, 4800.0}
    said = "max_batch_total_tokens was 3600, 4800: a forecast that is not told draws one of them"
    assert texts(found.warnings).count(said) == 1


def test_the_bounds_are_those_the_fewest_looks_speak_against():
    assert AdmissionEvidence(fitted=[10, 30], refused=[50, 90]).least_contradicted() == (30, 49, 0)
    assert AdmissionEvidence(fitted=[10, 30]).least_contradicted() == (30, None, 0)
    assert AdmissionEvidence(fitted=[10, 30, 30, 31], refused=[20, 50, 50]).least_contradicted() == (31, 49, 1)
    assert AdmissionEvidence(fitted=[10, 30, 60], refused=[50, 50, 52]).least_contradicted() == (30, 49, 1)
    assert AdmissionEvidence(fitted=[100], refused=[50, 60, 70]).least_contradicted() == (
        100,
        None,
        3,
    )  # something was let in
