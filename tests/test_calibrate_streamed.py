"""Calibration from streams: what is put into a simulated server comes out again, with intervals that hold it."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from streams import CLOCKS, SERVER, TRUTH, lengths, observe, questions
from warned import texts

from calibrate.regression.variance_components import DEFAULT_RUN_EFFECT
from calibrate.schedule.admission_timing import LATENCY_BETWEEN_RUNS, UPLINK_SPREAD, admission_rows, admission_timings
from calibrate.schedule.schedule import schedule_of
from calibrate.schedule.token_budget import known_budget
from calibrate.sources.streamed import calibrate_runs
from sim.model.calibration import Calibration, Delay, read_calibration
from sim.model.errors import NotEnoughData
from sim.model.files.atomic import write_file
from sim.model.scenario import Hardware
from sim.run import Run, read_run
from sim.steptime.linear import step_time
from sim.steptime.noise_parameters import Noise
from sim.steptime.work import StepWork

DATA = Path(__file__).parent.parent / "data"
NOISE = Noise(prefill=[0.97, 1.0, 1.03], decode=[0.95, 1.0, 1.05], drift=0.01, drift_seconds=8.0)
LADDER = [1, 2, 4, 8, 16, 32]


def drawn(calibration: Calibration) -> np.ndarray:
    """The answers of every draw, (draws, 3)."""
    columns = calibration.draws
    rows = [{name: column[i] for name, column in columns.items()} for i in range(calibration.n_draws)]
    return np.array([questions(row, calibration.model) for row in rows])


def two_profiles(seed: int) -> list[Run]:
    return [
        observe(LADDER, lengths(1500, 100), noise=NOISE, seconds=14.0, seed=seed).run,
        observe(LADDER, lengths(50, 500), noise=NOISE, seconds=14.0, seed=seed + 1000).run,
    ]


@pytest.fixture(scope="module")
def fits() -> list[Calibration]:
    """Eight machines with the same truth, each on a day of its own."""
    return [calibrate_runs(two_profiles(seed), seed) for seed in range(8)]


def test_step_times_are_recovered_within_two_percent(fits):
    true = questions(TRUTH)
    errors = np.array([questions(c.values) / true - 1 for c in fits])
    assert np.abs(np.median(errors, axis=0)).max() < 0.01  # no bias
    assert np.abs(errors).mean(axis=0).max() < 0.02


def test_intervals_hold_the_truth_about_as_often_as_they_say(fits):
    true = questions(TRUTH)
    held = []
    for c in fits:
        low, high = np.quantile(drawn(c), [0.025, 0.975], axis=0)
        held += ((low <= true) & (true <= high)).tolist()
        assert ((high - low) / true < 0.12).all()  # and not by being wide
    assert np.mean(held) >= 0.87  # 24 answers, of which 19 of 20 should be held


def test_noise_is_taken_apart(fits):
    spread = [np.std(c.noise.decode) for c in fits]
    assert np.median(spread) == pytest.approx(0.0289, rel=0.15)  # of a uniform table ±5 %
    assert np.median([c.noise.drift for c in fits]) == pytest.approx(0.01, rel=0.5)
    assert all(np.mean(c.noise.decode) == pytest.approx(1.0, abs=0.003) for c in fits)


def test_memory_from_step_to_step_is_seen():
    law = Noise(decode=[0.8, 1.0, 1.2], memory=0.8, memory_steps=6.0)
    noise = calibrate_runs([observe([1, 4, 8], lengths(100, 200), noise=law, seconds=20.0).run]).noise
    assert noise.memory == pytest.approx(0.8, abs=0.15)
    assert noise.memory_steps == pytest.approx(6.0, rel=0.4)


def test_a_time_for_every_batch_size_is_not_taken_where_a_line_is_as_good():
    """The loads left out say 1.5 and 1.4 %: less than one of them tells."""
    runs = [read_run(DATA / "tgi-0.9.4-router-http" / name) for name in ("long", "short")]
    found = calibrate_runs(runs, rungs=[None, {0, 2, 4}])
    assert found.model == "affine"
    assert "affine 1.5%" in found.source.note and "affine_levels 1.4%" in found.source.note


def test_random_effects_are_not_fitted_as_a_time_for_every_batch_size():
    """Two days on which errors at loads left out were a half with it, as long as the machine passed for steady."""
    assert [calibrate_runs(two_profiles(seed), seed).model for seed in (8, 10)] == ["affine", "affine"]


def test_clocks_are_recovered(fits):
    clocks = fits[0].clocks
    assert np.mean(clocks.uplink.quantiles) == pytest.approx(0.00165, rel=0.4)
    assert clocks.spacing.quantiles[0] == pytest.approx(CLOCKS.spacing.quantiles[0], rel=0.35)
    # the turnaround is seen from token to request, so it holds the downlink's jitter
    assert np.median(clocks.turnaround.quantiles) == pytest.approx(0.00035, abs=1.5e-4)
    assert np.mean(fits[0].draws["uplink"]) == pytest.approx(np.mean(clocks.uplink.quantiles), rel=0.2)


def test_the_way_of_another_day_is_drawn_longer_or_shorter(fits):
    """Of one run it is known within some hundredths; who shares a prefill depends on no more than that."""
    for fit in fits:
        spread = np.std(fit.draws["uplink"]) / np.mean(fit.draws["uplink"])
        assert LATENCY_BETWEEN_RUNS * 0.8 < spread < 0.5


def test_the_second_scheduling_point_tells_how_long_the_router_counts_tokens():
    """Requests of 1,500 tokens, up to eight together, scheduled at a point 5 to 25 ms after they were written."""
    rng = np.random.default_rng(0)
    tokens, after = 1500.0 * rng.integers(1, 9, 600), rng.uniform(0.005, 0.025, 600)
    latency = (1.5e-3 + 1.3e-6 * tokens) * (1 + UPLINK_SPREAD * rng.standard_normal(600))
    nothing = {"dropped": 0, "kept": 0, "decode_longest": 0, "weight": 1.0}
    table = pd.DataFrame({"x": -after, "tokens": tokens, "won": latency < after, **nothing})
    assert 100 < table["won"].sum() < 500
    names, found, prior = ("f0", "u0", "u1"), np.array([0.0, 1.5e-3, 1e-6]), np.diag([1e3, 1e3, 1e6])
    for _ in range(8):
        rows, target = admission_rows(table, names, found, spread=0.1)
        both = np.vstack([rows, prior]), np.concatenate([target, prior @ [0.0, 1.5e-3, 1e-6]])
        found = np.linalg.lstsq(*both, rcond=None)[0]
    assert found == pytest.approx([0.0, 1.5e-3, 1.3e-6], rel=0.15)


@pytest.mark.parametrize(
    ("output", "budget", "lost"),
    [(40, {}, 4), ((20, 80), {"max_batch_total_tokens": 14500}, 0), ((20, 80), {"max_batch_prefill_tokens": 3100}, 0)],
)
def test_who_came_too_late_for_the_second_look_is_told_from_whom_a_budget_kept_out(output, budget, lost):
    clocks = msgspec.structs.replace(CLOCKS, uplink=Delay(quantiles=[0.0016], per_token=4e-6))
    server = msgspec.structs.replace(SERVER, **budget)
    run = observe([6, 12, 20], lengths(1500, output), clocks=clocks, server=server, seconds=40.0).run
    table = admission_timings([run], [schedule_of(run)])
    late = table[(table["dropped"] == 0) & ~table["won"]]
    assert len(late) == lost
    assert (0.0016 + 4e-6 * 4500 + late["x"] > 0).all()  # six came together, and the last of them was not counted yet
    assert set(late["tokens"]) <= {3000, 4500}  # each waits for what its own worker counts, not for all that came


def test_filter_and_joining_are_told_from_the_steps_they_lie_in(fits):
    form = [step_time("affine", c.values) for c in fits]
    for work, seconds, tolerance in (
        (StepWork(kept=8, dropped=1, decode_longest=1500), 1.78e-3, 0.3),
        (StepWork(kept=8, joined=1, decode_longest=1500), 7e-4, 0.4),
    ):
        assert np.median([f.line(work).first for f in form]) == pytest.approx(seconds, rel=tolerance)


def test_the_budget_is_read_from_behaviour():
    hidden = replace(observe([40], lengths(1500, 100), seconds=40.0).run, info=None)
    hidden = replace(hidden, scenario=_without_budget(hidden))
    assert known_budget(hidden) is None
    calibration = calibrate_runs([hidden])
    budget = calibration.parameters["max_batch_total_tokens"]
    assert budget.low <= 36000 <= budget.high * 1.02
    assert budget.high - budget.low < 3300  # two requests of 1,504 + 112
    assert any("max_batch_total_tokens is between" in d for d in texts(calibration.warnings))


def test_a_budget_that_never_bound_is_only_bounded_below():
    hidden = observe([2], lengths(300, 50), seconds=10.0).run
    calibration = calibrate_runs([replace(hidden, scenario=_without_budget(hidden))])
    assert any("never bound" in d for d in texts(calibration.warnings))
    budget = calibration.parameters["max_batch_total_tokens"]
    assert 1.5 * 700 < budget.low <= hidden.server.token_budget <= budget.high


def test_info_wins_over_behaviour():
    run = observe([2], lengths(300, 50), seconds=10.0).run
    told = replace(run, scenario=_without_budget(run), info={"max_batch_total_tokens": 36000})
    budget = calibrate_runs([told]).parameters["max_batch_total_tokens"]
    assert (budget.value, budget.stderr, budget.low, budget.high) == (36000, 0.0, 36000, 36000)


def test_a_slow_first_request_is_not_taken_for_the_server():
    run = observe([1, 2, 4], lengths(200, 40), seconds=8.0).run
    requests = run.requests.copy()
    requests.loc[0, "sent"] -= 3.0  # the server had something else to finish
    slow = replace(run, requests=requests)
    assert calibrate_runs([slow]).values["a0"] == pytest.approx(calibrate_runs([run]).values["a0"], rel=0.02)


def test_some_rungs_can_be_held_out():
    run = read_run(DATA / "tgi-0.9.4-router-http" / "long")
    part = calibrate_runs([run], rungs=[{0, 2, 4}])
    assert part.residuals["decode"].rows < 0.7 * calibrate_runs([run]).residuals["decode"].rows


def test_the_padded_server_gets_a_form_of_its_own():
    runs = [read_run(DATA / "tgi-0.9.4-cpu" / name) for name in ("short", "long-between")]
    calibration = calibrate_runs(runs)
    assert calibration.model == "levels"
    form = step_time("levels", calibration.values)
    one, three, sixteen = (form.decode(n, 80 * n, 80)[0] for n in (1, 3, 16))
    assert 0.014 < one < 0.018
    assert 1.15 < three / one < 1.6  # three rows cost little more than one
    assert sixteen / one < 3.6
    assert form.prefill(1, 300, 90000, 300) == pytest.approx(0.174, rel=0.05)  # as its /metrics say


def test_the_trend_goes_on_beyond_the_batch_sizes_that_were_seen():
    """Up to 16 were. It flattens, so that a line beyond them would be flat: 128 rows would take as long as 24."""
    fit = calibrate_runs([read_run(DATA / "tgi-0.9.4-cpu" / "short")])
    draws = [{name: column[i] for name, column in fit.draws.items()} for i in range(fit.n_draws)]
    times = np.array([[step_time("levels", of).decode(n, n, 1)[0] for n in (24, 64, 128)] for of in draws])
    assert (np.diff(np.median(times, axis=0)) > 0.002).all()
    spread = times.std(axis=0) / times.mean(axis=0)
    assert spread[0] < spread[1] < spread[2]


def test_what_two_prompt_lengths_cannot_tell_apart_is_said(fits):
    """Two lengths settle two costs, and a prefill has three; of a mix of lengths all can be told."""
    assert sum("hardly told apart (a1 and a2" in warning for warning in texts(fits[0].warnings)) == 1
    mixed = observe([1, 4, 16], lengths((50, 2500), (20, 80)), noise=NOISE, seconds=20.0).run
    assert not any("hardly told apart" in warning for warning in texts(calibrate_runs([mixed]).warnings))
    opened = [replace(run, rungs=[replace(g, users=None, rate=1.0) for g in run.rungs]) for run in two_profiles(0)]
    said = "".join(texts(calibrate_runs(opened).warnings))
    assert (
        "hardly told apart" in said and "requests did not wait for answers" in said
    )  # one warning does not silence another


def test_runs_say_what_they_were_measured_on():
    run = observe([1, 2, 4], lengths(200, 40), seconds=8.0).run
    here, there = (
        replace(run, name=gpu, scenario=msgspec.structs.replace(run.scenario, machine=Hardware(gpu=gpu)))
        for gpu in ("A100", "H100")
    )
    assert not any("machine" in d for d in texts(calibrate_runs([here]).warnings))
    both = calibrate_runs([here, there])
    assert both.machine == Hardware(gpu="A100")
    assert texts(both.warnings)[0] == "H100: not of the machine that A100 says it is of; fitted as one all the same"


def test_flags_are_those_the_server_says_it_has():
    run = observe([1, 2], lengths(200, 40), seconds=5.0).run
    assert calibrate_runs([replace(run, info={"max_waiting_tokens": 7})]).server[0]["max_waiting_tokens"] == 7


def test_a_run_too_short_to_show_random_effects_has_a_default_one():
    run = observe([1], lengths(20, 30), noise=NOISE, seconds=1.5).run
    noise = calibrate_runs([run]).noise
    assert noise.between == pytest.approx(DEFAULT_RUN_EFFECT, rel=0.5) and len(noise.decode) > 1


def test_a_server_whose_kernels_change_with_the_batch_gets_a_form_of_its_own():
    steps = {1: 0.0164, 8: 0.0171, 9: 0.029, 16: 0.030, 17: 0.050, 32: 0.0515}
    truth = {k: v for k, v in TRUTH.items() if k != "b0"} | {f"level_{n}": v for n, v in steps.items()}
    asked = lengths((100, 1000), (20, 150))
    loads = [1, 2, 4, 8, 9, 12, 16, 32]  # every level is seen
    run = observe(loads, asked, truth=truth, model="affine_levels", noise=NOISE, seconds=12.0).run
    found = calibrate_runs([run])
    assert found.model == "affine_levels"
    form, true = step_time(found.model, found.values), step_time("affine_levels", truth)
    for n in (1, 4, 8, 9, 12, 16, 32):
        assert form.decode(n, 400 * n, 600)[0] == pytest.approx(true.decode(n, 400 * n, 600)[0], rel=0.04)
    assert calibrate_runs([observe(LADDER, asked, noise=NOISE, seconds=12.0).run]).model == "affine"


def test_a_load_that_counts_for_less_is_named():
    runs = [read_run(DATA / "tgi-0.9.4-cpu" / name) for name in ("short", "short-again", "long", "long-again", "mixed")]
    said = [
        d for d in texts(calibrate_runs(runs).warnings) if "quicker than the rest" in d or "slower than the rest" in d
    ]
    assert len(said) == 1
    assert said[0].startswith("tgi-cpu-mixed: at load 1 the machine was 1")


def test_repeatable_and_written_and_read(tmp_path):
    run = read_run(DATA / "tgi-0.9.4-cpu" / "long-again")
    one, two = calibrate_runs([run], seed=3), calibrate_runs([run], seed=3)
    assert msgspec.json.encode(one) == msgspec.json.encode(two)
    write_file(tmp_path / "calibration.json", msgspec.json.encode(one))
    assert read_calibration(tmp_path / "calibration.json") == one
    assert {f.path for f in one.source.files} == {"long-again/run.json", "long-again/requests.jsonl.gz"}


def test_padded_and_unpadded_servers_are_not_one_machine():
    run = observe([1], lengths(20, 5), seconds=2.0).run
    padded = observe([1], lengths(20, 5), seconds=2.0, server=_padded()).run
    with pytest.raises(NotEnoughData, match="not one machine"):
        calibrate_runs([run, padded])


@pytest.mark.parametrize(("uplink", "users"), [(0.005, [1, 2, 4, 8]), (0.06, [1, 2, 4, 8]), (0.06, [2, 8, 16])])
def test_the_way_of_a_client_is_seen(uplink, users):
    there = replace_clocks(uplink=uplink)
    run = observe(users, lengths((100, 1500), (20, 80)), clocks=there, noise=NOISE, seconds=20.0).run
    assert np.mean(calibrate_runs([run]).clocks.uplink.quantiles) == pytest.approx(uplink, rel=0.25)


def test_who_came_back_in_time_tells_the_filter_from_the_way():
    # recorded: beside one other request a user who is back 0.3 ms after the step is in time about every second time
    runs = [read_run(DATA / "tgi-0.9.4-cpu" / name) for name in ("short", "short-between", "short-again")]
    calibration = calibrate_runs(runs)
    form = step_time(calibration.model, calibration.values)
    one, twelve = (
        form.line(StepWork(kept=n, dropped=1, decode_longest=longest)).first - calibration.values["uplink"]
        for n, longest in ((1, 90), (12, 110))
    )
    assert 0.0 < one < 0.0009
    assert twelve > 0.003  # beside twelve everybody is


def replace_clocks(uplink: float):
    return msgspec.structs.replace(CLOCKS, uplink=Delay(quantiles=[uplink]))


def _without_budget(run: Run):
    server = msgspec.structs.replace(run.scenario.server, max_batch_total_tokens=None)
    return msgspec.structs.replace(run.scenario, server=server)


def _padded():
    return msgspec.structs.replace(SERVER, requires_padding=True)


def test_the_noise_of_a_slow_server_is_as_wide_as_it_is():
    """A cell of three seconds holds a handful of its steps, whose mean takes a good part of their deviations."""
    slow = {name: 20 * value for name, value in TRUTH.items()}
    law = Noise(decode=[0.85, 1.0, 1.15], drift=0.03, drift_seconds=20.0)
    runs = [observe([1, 2, 4], lengths(200, 30), noise=law, seconds=60.0, truth=slow, seed=i).run for i in range(3)]
    found = calibrate_runs(runs).noise
    assert np.std(found.decode) == pytest.approx(0.15 / np.sqrt(3), rel=0.04)


def test_rungs_that_show_no_steps_are_refused():
    run = observe([1, 2], lengths(200, 30), seconds=8.0).run
    second = run.rungs[1]
    nothing = [
        replace(run.rungs[0], start=0.0, end=second.start),
        replace(second, start=second.end, end=second.end + 9),
    ]
    with pytest.raises(NotEnoughData, match="seen: no load to be fitted shows a decode step"):
        calibrate_runs([replace(run, rungs=nothing)], rungs=[{1}])


def test_a_clients_jitter_is_not_taken_for_noise_of_the_machine():
    """It makes one step long and the next one short, and answers no longer: their spread must not grow with it."""
    still = Noise(decode=[0.999, 1.001])
    run = observe([1, 4], lengths(200, 100), noise=still, jitter=2e-3, seconds=20.0).run
    noise = calibrate_runs([run]).noise
    assert noise.returned > 0.8
    assert noise.memory < 0.1
    rough = calibrate_runs([observe([1, 4], lengths(200, 100), noise=NOISE, seconds=20.0).run]).noise
    assert rough.returned == 0.0
