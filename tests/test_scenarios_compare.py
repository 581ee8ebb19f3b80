"""Comparisons: a forecast of a measured run, its bands, what is held out, and the verdict."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from warned import texts

from calibrate.sources.streamed import calibrate_runs
from scenarios.compare.comparison import Comparison, verdict
from scenarios.compare.diagnostics import diagnose
from scenarios.compare.repeatability import read_repeats
from scenarios.compare.run_with_model import compare, forecast_run
from scenarios.compare.training_rungs import training_rungs
from scenarios.compare.two import compare_runs
from scenarios.forecast.modes import modes
from scenarios.forecast.warnings import beyond, replay_warnings
from sim.model.calibration import Calibration
from sim.model.errors import NotEnoughData
from sim.model.scenario import Hardware
from sim.results import metrics
from sim.results.gaps import gaps
from sim.run import Run, read_run

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def flash() -> Run:
    return read_run(DATA / "tgi-0.9.4-router-http" / "long")


@pytest.fixture(scope="module")
def fitted(flash) -> Calibration:
    return calibrate_runs([flash], rungs=[{0, 2, 4}])


@pytest.fixture(scope="module")
def judged(flash, fitted) -> Comparison:
    return compare(flash, forecast(flash, fitted, 39), fitted={0, 2, 4}, tolerances={"e2e_mean": 0.02})


def forecast(run: Run, calibration: Calibration, replicates: int) -> list[pd.DataFrame]:
    return forecast_run(run, calibration, replicates=replicates)


def test_loads_left_out_of_the_fit_are_forecast_within_the_goals(judged):
    assert judged.passed
    assert judged.summary["e2e_mean"].mape < 0.02
    assert judged.summary["output_tokens_per_s"].mape < 0.02
    assert judged.summary["rps"].mape < 0.03
    assert judged.summary["ttft_p50"].median < 0.06
    coverage = [s.coverage for s in judged.summary.values() if s.coverage is not None]
    assert np.mean(coverage) > 0.85


def test_only_what_was_held_out_is_judged(judged):
    assert {row.rung for row in judged.rows if row.held_out} == {1, 3, 5}
    assert judged.summary["e2e_mean"].rungs == 3
    assert 1.0 <= judged.summary["e2e_mean"].effective <= 3.0


def test_a_row_says_what_it_compares(judged, flash):
    row = next(r for r in judged.rows if r.rung == 3 and r.metric == "e2e_mean")
    measured = metrics.rung_metrics(flash, flash.rungs[3])["e2e_mean"]
    assert row.measured == pytest.approx(measured)
    assert row.users == 8
    assert row.low < row.simulated < row.high
    assert row.relative_error == pytest.approx(row.simulated / row.measured - 1)
    assert row.inside == (row.low <= row.measured <= row.high)


def test_errors_that_nobody_expected_and_that_did_not_come_hold_no_bands(judged):
    rows = [row for row in judged.rows if row.held_out]
    empty = [row for row in rows if row.metric in ("error_rate", "overloaded_rate")]
    assert all(row.inside and row.high == row.measured == 0.0 for row in empty)
    scored = [row.inside for row in rows if row not in empty]
    assert judged.coverage == np.mean(scored)
    assert len(scored) > 50


def test_a_wrong_model_fails_and_its_bands_do_not_hold(flash, fitted):
    slow = {k: msgspec.structs.replace(p, value=1.2 * p.value) for k, p in fitted.parameters.items()}
    wrong = msgspec.structs.replace(
        fitted, parameters=slow, draws={k: [1.2 * x for x in column] for k, column in fitted.draws.items()}
    )
    found = compare(flash, forecast(flash, wrong, 19), fitted={0, 2, 4}, tolerances={"e2e_mean": 0.02})
    assert found.passed is False
    assert found.summary["e2e_mean"].bias == pytest.approx(0.2, abs=0.05)
    assert found.summary["e2e_mean"].coverage == 0.0


def test_rungs_of_a_run_in_the_source_are_not_held_out(flash):
    whole = calibrate_runs([flash])
    assert training_rungs(flash, whole) == (set(range(6)), [])
    assert training_rungs(read_run(DATA / "tgi-0.9.4-router-http" / "short"), whole) == (set(), [])
    found = compare(flash, forecast(flash, whole, 3), fitted=range(6), tolerances={"rps": 0.01})
    assert found.passed is None
    assert not found.summary
    assert any("nothing to judge" in d for d in texts(found.warnings))


def test_a_run_is_not_far_from_its_repeat():
    first, again = (read_run(DATA / "tgi-0.9.4-cpu" / name) for name in ("long", "long-again"))
    found = compare_runs(first, again, {"e2e_mean": 0.08})
    assert found.passed
    assert {row.users for row in found.rows} == {1, 4, 16}
    assert sum("left out" in d for d in texts(found.warnings)) == 2
    assert all(row.low is None and row.inside is None for row in found.rows)
    assert compare_runs(first, first, {"e2e_p99": 0.0}).passed


def test_repeats_stand_beside_the_errors():
    first, again = (read_run(DATA / "tgi-0.9.4-cpu" / name) for name in ("long", "long-again"))
    found = compare(first, [metrics.table(first)], repeats=[again])
    mine = {(r.users, r.metric): r.repeat_error for r in found.rows}
    one, other = (metrics.rung_metrics(run, run.rungs[0])["e2e_mean"] for run in (first, again))
    assert mine[1, "e2e_mean"] == pytest.approx(other / one - 1)
    assert mine[2, "e2e_mean"] is None


def test_runs_without_a_common_load_cannot_be_compared():
    first, between = (read_run(DATA / "tgi-0.9.4-cpu" / name) for name in ("long", "long-between"))
    with pytest.raises(NotEnoughData, match="no load in common"):
        compare_runs(first, between)


def test_two_humps_are_seen_and_one_is_not():
    rng = np.random.default_rng(0)
    one = rng.normal(1.0, 0.02, 80)
    assert modes(one) is None
    assert modes(np.concatenate([one, rng.normal(2.0, 0.02, 30)])) == pytest.approx([1.0, 2.0], abs=0.02)
    assert modes(np.concatenate([one, [2.0]])) is None  # a stray replicate is no pattern


def test_the_verdict_needs_every_tolerance():
    rows = compare_runs(*(read_run(DATA / "tgi-0.9.4-cpu" / n) for n in ("long", "long-again"))).rows
    assert verdict(rows, "a", "b", {"e2e_mean": 0.1}, []).passed
    assert not verdict(rows, "a", "b", {"e2e_mean": 0.1, "ttft_p50": 0.001}, []).passed
    assert verdict(rows, "a", "b", {}, []).passed is None


def test_what_the_server_said_at_info_wins(flash):
    blind = replace(
        flash,
        scenario=msgspec.structs.replace(
            flash.scenario, server=msgspec.structs.replace(flash.scenario.server, max_batch_total_tokens=None)
        ),
    )
    known = calibrate_runs([flash])
    parameters = {k: p for k, p in known.parameters.items() if k != "max_batch_total_tokens"}
    draws = {k: column for k, column in known.draws.items() if k in parameters}
    calibration = msgspec.structs.replace(known, parameters=parameters, draws=draws)
    told = forecast(blind, calibration, 1)[0]
    said = forecast(flash, calibration, 1)[0]
    pd.testing.assert_frame_equal(told, said)


def test_a_comparison_keeps_what_lies_behind_it(flash, fitted):
    found = diagnose(flash, fitted)
    middle = found.shares.index(0.5)
    for rung, one in zip(flash.rungs, found.itl, strict=True):
        assert one.load == rung.load
        assert one.measured == gaps(flash, rung.settled, rung.end).quantiles(found.shares)
        assert one.measured == sorted(one.measured)
        assert all(low <= value <= high for low, value, high in zip(one.low, one.simulated, one.high, strict=True))
        assert one.simulated[middle] == pytest.approx(one.measured[middle], rel=0.05)
    for errors in (found.by_batch, found.by_time):
        assert set(errors) == {"prefill", "decode"}
        for kind, limit in (("prefill", 0.02), ("decode", 0.01)):
            steps = sum(e.steps for e in errors[kind])
            assert sum(e.steps * e.mean for e in errors[kind]) / steps == pytest.approx(0, abs=limit)
            assert all(e.low <= e.high for e in errors[kind])
    again = msgspec.json.decode(msgspec.json.encode(found), type=type(found))
    assert again == found


def test_tokens_of_answers_that_were_not_streamed_count_when_they_come_on_both_sides(flash, fitted):
    blind = replace(flash, token_times=None)
    rows = compare(blind, forecast(blind, fitted, 3)).rows
    tokens, answers = ([row for row in rows if row.metric == name] for name in ("output_tokens_per_s", "rps"))
    for measured in ("measured", "simulated", "low", "high"):
        each = [getattr(one, measured) / getattr(other, measured) for one, other in zip(tokens, answers, strict=True)]
        assert each == pytest.approx([100.0] * 6)


def test_evidence_of_a_run_that_was_not_streamed_is_empty(flash, fitted):
    found = diagnose(replace(flash, token_times=None), fitted)
    assert not (found.itl or found.by_batch or found.by_time)


def test_two_runs_show_their_gaps_at_the_loads_they_share():
    first, again = (read_run(DATA / "tgi-0.9.4-cpu" / name) for name in ("long", "long-again"))
    found = compare_runs(first, again).diagnostics
    assert found is not None
    assert [one.load for one in found.itl] == [1, 4, 16]
    last = again.rungs[2]
    assert found.itl[2].simulated == gaps(again, last.settled, last.end).quantiles(found.shares)


def test_runs_that_are_not_alike_are_compared_with_a_warning():
    long, short = (read_run(DATA / "tgi-0.9.4-router-http" / name) for name in ("long", "short"))
    padded = read_run(DATA / "tgi-0.9.4-cpu" / "long")
    assert (
        "same workload: prompt_tokens 1500 and 50, output_tokens 100 and 500"
        in texts(compare_runs(long, short).warnings)[-1]
    )
    of_both = texts(compare_runs(padded, long).warnings)
    assert any(
        "not of the same server: " in warning and "requires_padding True and False" in warning for warning in of_both
    )
    assert not any("not of the same" in warning for warning in texts(compare_runs(long, long).warnings))


def test_repeats_are_those_named_and_the_sibling():
    folder = DATA / "tgi-0.9.4-cpu"
    long, short = read_run(folder / "long"), read_run(folder / "short")
    assert [run.name for run in read_repeats(long)] == ["tgi-cpu-long-again"]
    assert len(read_repeats(long, [folder / "long-again"])) == 1
    assert len(read_repeats(long, [folder / "short"])) == 2
    assert read_repeats(read_run(folder / "mixed")) == []
    assert read_repeats(replace(long, path=None)) == []
    found = compare(long, [metrics.table(long)], repeats=[short, read_run(folder / "long-between")])
    assert all(row.repeat_error is None for row in found.rows)
    assert [text for text in texts(found.warnings) if "does not repeat" in text] == [
        "tgi-cpu-short does not repeat tgi-cpu-long: it asked for other lengths",
        "tgi-cpu-long-between does not repeat tgi-cpu-long: it has no load in common with it",
    ]


def test_of_several_repeats_the_farthest_counts():
    first, again = (read_run(DATA / "tgi-0.9.4-cpu" / name) for name in ("long", "long-again"))
    tables = [metrics.table(first)]
    alone, *both = (
        [row.repeat_error for row in compare(first, tables, repeats=repeats).rows]
        for repeats in ([again], [first, again], [again, first])
    )
    assert any(error for error in alone)
    for errors in both:
        assert [e for e, mine in zip(errors, alone, strict=True) if mine is not None] == [
            e for e in alone if e is not None
        ]


@pytest.fixture(scope="module")
def table(flash) -> pd.DataFrame:
    return metrics.table(flash)


def test_what_was_measured_but_not_forecast_fails(flash, table):
    hollow = table.assign(e2e_mean=table["e2e_mean"].where(table["rung"] == 0))
    found = compare(flash, [hollow] * 19, tolerances={"e2e_mean": 0.5})
    rows = [row for row in found.rows if row.metric == "e2e_mean"]
    assert len(rows) == 6 and found.passed is False
    assert [(row.simulated, row.relative_error, row.inside) for row in rows[1:]] == [(None, None, False)] * 5
    assert found.summary["e2e_mean"].coverage == pytest.approx(1 / 6)
    loads = [f"{load} users" for load in (2, 4, 8, 16, 32)]
    assert texts(found.warnings) == [
        *(f"measured but not forecast at {load}: e2e_mean" for load in loads),
        f"e2e_mean counts as outside its tolerance: measured but not forecast at {', '.join(loads)}",
    ]
    assert compare(flash, [hollow] * 19, tolerances={"e2e_p50": 0.5}).passed


def test_a_value_that_hardly_any_replay_has_is_not_forecast(flash, table):
    hollow = table.assign(e2e_mean=float("nan"))
    found = compare(flash, [table, *[hollow] * 18])
    assert {row.simulated for row in found.rows if row.metric == "e2e_mean"} == {None}
    found = compare(flash, [hollow, *[table] * 18])
    assert all(row.inside for row in found.rows if row.metric == "e2e_mean")


def test_a_rung_without_any_forecast_fails(flash, table):
    found = compare(flash, [table[table["rung"] < 5]] * 19, tolerances={"rps": 0.5})
    assert found.passed is False
    assert any(
        text.startswith("measured but not forecast at 32 users: e2e_mean, e2e_p50,") for text in texts(found.warnings)
    )


def test_a_tolerance_says_why_it_does_not_hold(flash, table):
    blind = replace(flash, token_times=None)  # no gaps
    found = compare(blind, [metrics.table(blind)] * 19, tolerances={"itl_p95": 0.5})
    assert found.passed is False
    assert texts(found.warnings) == [
        "itl_p95 counts as outside its tolerance: it was not measured at any load that counts"
    ]
    failing = table.assign(error_rate=0.2)
    found = compare(flash, [failing] * 19, tolerances={"error_rate": 0.5})
    assert found.passed is False
    assert found.summary["error_rate"].mape is None
    assert "outside its tolerance: none was measured at 1 user, 2 users" in texts(found.warnings)[-1]


def test_requests_that_failed_as_none_does_in_a_simulation_are_warned_about(flash, fitted):
    tables = forecast(flash, fitted, 1)

    def warnings(failed: int) -> list[str]:
        status = flash.requests["status"].copy()
        status.iloc[:failed] = "reset"
        return texts(replay_warnings(replace(flash, requests=flash.requests.assign(status=status)), fitted, tables))

    n = len(flash.requests)
    assert f"{n // 20} of {n} requests failed ({n // 20} reset); in the forecast they are answered" in warnings(n // 20)
    assert not any("failed" in d for d in warnings(1))


def test_the_calibrated_range_is_that_of_the_rungs_used(fitted):
    assert fitted.range["users"] == (1, 16)
    assert {"prompt_tokens", "batch_prefill_tokens", "sequences", "context_tokens", "users"} == set(fitted.range)
    mixed = read_run(DATA / "tgi-0.9.4-cpu" / "mixed")
    rung, of = mixed.rungs[0], mixed.requests
    begun = of[of["scheduled"].between(rung.start, rung.end)]["prompt_tokens"]
    only = calibrate_runs([mixed], rungs=[{0}]).range["prompt_tokens"]
    assert only == (begun.min(), begun.max()) != (of["prompt_tokens"].min(), of["prompt_tokens"].max())


def test_a_calibration_of_something_else_is_warned_about(flash, fitted):
    (said,) = texts(replay_warnings(flash, fitted, forecast(flash, fitted, 9)))[len(texts(fitted.warnings)) :]
    assert said.startswith("extrapolated from 32 users on: batches of 22 requests (calibrated up to 16); 34,")
    assert said.endswith(" tokens of context at once (calibrated up to 25,308); 32 users (calibrated up to 16)")
    cpu = calibrate_runs([read_run(DATA / "tgi-0.9.4-cpu" / "long")], rungs=[{1, 2}])
    short = read_run(DATA / "tgi-0.9.4-router-http" / "short")
    every = texts(replay_warnings(short, cpu, forecast(short, cpu, 1)))
    assert every[: len(texts(cpu.warnings))] == texts(cpu.warnings)
    assert "this server does not pad its batches; the calibrated one did" in every
    assert "extrapolated: 1 user (calibrated from 2 on)" in every
    assert "extrapolated: prompts of 50 tokens (calibrated from 300 on)" in every
    elsewhere = msgspec.structs.replace(fitted, machine=Hardware(gpu="H100"))
    here = replace(flash, scenario=msgspec.structs.replace(flash.scenario, machine=Hardware(gpu="A100")))
    every = texts(replay_warnings(here, elsewhere, forecast(flash, fitted, 1)))
    assert "the step times are those of another GPU: H100, not A100" in every


def test_what_leaves_the_calibrated_range_at_one_load_is_told_from_what_does_at_another(fitted):
    names = ["load", "max_prompt_tokens", "max_batch_prefill_tokens", "max_sequences", "max_context_tokens"]
    rungs = pd.DataFrame([[8.0, 1500, 13_500, 8, 9000], [24.0, 1500, 18_000, 22, 9000]], columns=names)
    assert texts(beyond(fitted, rungs, ["users", "users"])) == [
        "extrapolated from 8 users on: prefills of 18,000 tokens (calibrated up to 12,000)",
        "extrapolated from 24 users on: batches of 22 requests (calibrated up to 16); 24 users (calibrated up to 16)",
    ]


def test_two_patterns_are_said(flash, table):
    other = table.assign(ttft_p50=2 * table["ttft_p50"])
    found = compare(flash, [*[table] * 20, *[other] * 10])
    first = float(table["ttft_p50"].iloc[2])
    assert len(texts(found.warnings)) == 6
    assert (
        texts(found.warnings)[2] == f"at 4 users two patterns are stable: ttft_p50 about {first:.3g} or {2 * first:.3g}"
    )


def test_requests_of_nobody_are_replayed_as_those_of_all_users(flash, fitted):
    anonymous = replace(flash, requests=flash.requests.assign(user=-1))
    found = compare(anonymous, forecast(anonymous, fitted, 19), tolerances={"e2e_mean": 0.05, "rps": 0.05})
    assert found.passed
    assert any("do not name their user" in text for text in texts(found.warnings))


def test_a_repeat_without_a_whole_window_repeats_nothing(flash, table):
    broken = replace(flash, name="again", rungs=[replace(rung, end=float("nan")) for rung in flash.rungs])
    found = compare(flash, [table], repeats=[broken])
    assert f"again does not repeat {flash.name}: it has no whole window" in texts(found.warnings)
    assert all(row.repeat_error is None for row in found.rows)
