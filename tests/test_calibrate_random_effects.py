"""How far a machine is from itself, told apart: drift, what a rung keeps, what a run keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import skew
from streams import SERVER, TRUTH, lengths, observe

from calibrate.regression.design import Rows, build_rows
from calibrate.regression.fit import Regression, regress
from calibrate.regression.posterior import draw_coefficients
from calibrate.regression.random_effects import NO_EFFECTS, RandomEffects
from calibrate.regression.step_noise import fit_noise
from calibrate.regression.variance_components import DEFAULT_RUN_EFFECT, DRIFT_SECONDS, EFFECT_SCALE, fit_random_effects
from calibrate.schedule.admission_timing import admission_timings
from calibrate.schedule.schedule import schedule_of
from calibrate.sources.streamed import candidate_forms
from sim.run import Run, read_run
from sim.steptime.linear import affine
from sim.steptime.noise_parameters import Noise

DATA = Path(__file__).parent.parent / "data"
LADDER = [1, 4, 16]
FIXED = lengths(200, 60)


def days(noise: Noise, n: int, ladder: list[int] = LADDER) -> list[Run]:
    return [observe(ladder, FIXED, noise=noise, seconds=20.0, seed=seed).run for seed in range(n)]


def fitted(
    runs: list[Run], slower: dict[int, float] | None = None, effects: RandomEffects = NO_EFFECTS
) -> tuple[Regression, Rows]:
    """The simplest form fitted to runs of a machine with these random effects; `slower` multiplies the times of whole
    rungs, numbered over all runs."""
    schedules = [schedule_of(run) for run in runs]
    rows = build_rows(runs, schedules)
    factor = np.ones(len(rows.seconds))
    for rung, by in (slower or {}).items():
        factor[rows.rung == rung] = by
    rows = replace(rows, seconds=rows.seconds * factor)
    return regress(rows, candidate_forms(SERVER)[0], admission_timings(runs, schedules), effects), rows


def effects(runs: list[Run], slower: dict[int, float] | None = None) -> RandomEffects:
    regression, rows = fitted(runs, slower)
    return fit_random_effects(regression, rows)


def test_what_whole_runs_keep_is_told_from_the_drift_within_them():
    found = effects(days(Noise(decode=[0.95, 1.05], drift=0.01, drift_seconds=5.0, between=0.06), 8))
    assert found.run == pytest.approx(0.06, rel=0.5)
    assert found.rung < 0.01
    assert found.drift == pytest.approx(0.01, rel=0.4)
    assert found.between == pytest.approx(np.hypot(found.run, found.rung))


def test_days_that_are_alike_are_not_made_unlike_by_their_drift():
    found = effects(days(Noise(decode=[0.95, 1.05], drift=0.02, drift_seconds=4.0), 8))
    assert found.drift == pytest.approx(0.02, rel=0.3)
    assert 2.5 < found.seconds < 8.0
    assert found.between < 0.5 * found.drift  # the posterior mean of a variance is never 0


def test_what_whole_rungs_keep_is_neither_drift_nor_the_run():
    rng = np.random.default_rng(1)
    slower = {rung: float(np.exp(0.06 * rng.standard_normal())) for rung in range(24)}
    found = effects(days(Noise(decode=[0.95, 1.05], drift=0.01, drift_seconds=4.0), 8), slower)
    assert found.rung == pytest.approx(0.06, rel=0.5)
    assert found.drift < 0.02
    assert found.run < 0.04


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_how_much_prefills_feel_is_told_from_how_much_decode_steps_do(share: float):
    law = Noise(
        prefill=[0.98, 1.02], decode=[0.95, 1.05], drift=0.05, drift_seconds=8.0, between=0.03, prefill_share=share
    )
    found = effects(days(law, 6))
    assert found.prefill == pytest.approx(share, abs=0.15)
    assert found.drift == pytest.approx(0.05, rel=0.4)


@pytest.mark.parametrize("shape", [2.0, 1e6])  # of a gamma distribution: skewness 1.4, and none
def test_a_machine_that_is_slowed_now_and_then_is_told_from_one_that_swings(shape: float):
    runs = days(Noise(decode=[0.95, 1.05]), 8)
    regression, rows = fitted(runs)
    drawn = np.random.default_rng(0).gamma(shape, size=int(rows.block.max()) + 1)
    block = np.exp(0.06 * (drawn - shape) / np.sqrt(shape))
    found = fit_random_effects(regression, replace(rows, seconds=rows.seconds * block[rows.block]))
    assert found.skew == pytest.approx(skew(drawn), abs=0.4)


def test_draws_and_noise_give_prefills_their_share():
    runs = [run for width in (0.02, 0.1) for run in days(Noise(prefill=[0.9, 1.1], decode=[1 - width, 1 + width]), 2)]
    regression, rows = fitted(runs)
    known, _ = fitted(runs, effects=RandomEffects(rung=0.1, prefill=0.2))
    drawn = draw_coefficients(known, rows, np.random.default_rng(0), 400)
    of = [regression.names.index(name) for name in regression.names if name[0] in "ab"]
    form = [dict(zip([regression.names[i] for i in of], row[of], strict=True)) for row in drawn]
    prefill = np.std([affine(**each).prefill(1, 200, 200**2, 200) for each in form])
    decode = np.std([affine(**each).decode(4, 900, 250)[0] for each in form])
    usual = affine(**{regression.names[i]: float(regression.coefficients[i]) for i in of})
    relative = prefill / usual.prefill(1, 200, 200**2, 200), decode / usual.decode(4, 900, 250)[0]
    assert relative[0] < 0.5 * relative[1]
    calm, felt = (
        fit_noise(rows, regression.predicted, RandomEffects(drift=0.1, prefill=share)) for share in (1.0, 0.2)
    )
    assert np.std(calm.prefill) < 0.8 * np.std(felt.prefill)  # the more is the drift's, the less is left over


def test_draws_are_half_the_opposites_of_the_others():
    runs = days(Noise(decode=[0.9, 1.1]), 2)
    regression, rows = fitted(runs)
    for n in (20, 21):
        drawn = draw_coefficients(regression, rows, np.random.default_rng(0), n)
        assert len(drawn) == n
        b0 = drawn[:, regression.names.index("b0")] - drawn[:, regression.names.index("b0")].mean()
        assert np.corrcoef(b0[: n // 2], b0[(n + 1) // 2 :])[0, 1] < -0.5


def test_what_coefficients_explain_as_well_is_no_mood_of_loads():
    """Three loads of a server whose step times are given: a drift of a tenth was as likely as none."""
    run = read_run(DATA / "tgi-0.9.4-router-http" / "short")
    schedule = schedule_of(run, {0, 1, 2})
    rows = build_rows([run], [schedule])
    found = fit_random_effects(regress(rows, candidate_forms(SERVER)[0], admission_timings([run], [schedule])), rows)
    assert found.rung <= found.drift


def test_one_run_sees_one_day_only():
    found = effects(days(Noise(decode=[0.95, 1.05], drift=0.02, drift_seconds=4.0), 1))
    # the prior alone: a half-t distribution with four degrees of freedom has twice the square of its scale
    assert found.run == pytest.approx(np.sqrt(2) * EFFECT_SCALE * found.drift, rel=0.05)
    assert found.run > 0.005


def test_a_machine_without_noise_has_no_random_effects():
    found = effects([observe(LADDER, lengths((50, 200), (10, 30)), seconds=60.0).run])
    assert max(found.drift, found.rung, found.run) < 0.002
    assert (
        DRIFT_SECONDS[0] <= found.seconds <= DRIFT_SECONDS[1]
    )  # a simulator draws its drift several times within that


def test_too_few_seconds_say_nothing_and_are_not_taken_for_calm():
    run = observe([1], FIXED, seconds=5.0).run
    assert effects([run]) == RandomEffects(run=DEFAULT_RUN_EFFECT)


def test_a_short_run_is_seen_in_shorter_stretches():
    found = effects([observe([2, 4], FIXED, noise=Noise(decode=[0.98, 1.02], drift=0.03), seconds=8.0).run])
    assert 0.01 < found.drift < 0.06
    assert found.run == pytest.approx(found.rung)  # two loads may have been calm by chance
    assert found.run == pytest.approx(np.sqrt(2) * EFFECT_SCALE * found.drift, rel=0.05)


def test_the_mean_of_a_rung_keeps_of_the_drift_what_does_not_average_out():
    for_ever = RandomEffects(drift=0.1, seconds=1e6)
    assert for_ever.rung_sd(50.0, 10) == pytest.approx(0.1 * np.sqrt(1 - 1 / 10), rel=1e-3)
    at_once = RandomEffects(drift=0.1, seconds=1e-3, rung=0.03)
    assert at_once.rung_sd(50.0, 10) == pytest.approx(0.03)
    # by simulation: an Ornstein-Uhlenbeck path over 50 s in steps of 0.1 s that forgets itself within 10 s
    rng, keep = np.random.default_rng(0), np.exp(-0.1 / 10)
    path = np.empty((500, 4000))
    path[0] = rng.standard_normal(4000)
    for i in range(1, 500):
        path[i] = keep * path[i - 1] + np.sqrt(1 - keep**2) * rng.standard_normal(4000)
    left = float(np.var(path.mean(axis=0))) - 1 / 10
    assert RandomEffects(drift=1.0, seconds=10.0).rung_sd(50.0, 10) == pytest.approx(np.sqrt(left), rel=0.05)


def test_noise_of_single_steps_is_no_mood_where_steps_are_few():
    """A cell of a few steps knows little of its own variance, and one of a single step counted as certain."""
    slow = {name: 10 * value for name, value in TRUTH.items()}
    noise = Noise(decode=[0.8, 1.2], prefill=[0.8, 1.2])
    found = [
        effects([observe([1, 2, 4, 8], lengths(200, 30), noise=noise, seconds=31.0, truth=slow, seed=seed).run])
        for seed in range(4)
    ]
    assert np.median([max(each.drift, each.rung) for each in found]) < 0.025
