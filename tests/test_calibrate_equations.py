"""Normal equations with random effects eliminated, against generalised least squares written out."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from streams import SERVER, TRUTH, lengths, observe

from calibrate.regression.design import BLOCK_SECONDS, COLD_CACHE, Rows, build_rows
from calibrate.regression.equations import equations
from calibrate.regression.fit import choose, design, regress
from calibrate.regression.posterior import draw_coefficients
from calibrate.regression.random_effects import NO_EFFECTS, RandomEffects
from calibrate.regression.variance_components import fit_random_effects
from calibrate.schedule.admission_timing import admission_timings
from calibrate.schedule.schedule import schedule_of
from calibrate.sources.streamed import calibrate_runs, candidate_forms
from sim.engines.tgi_0_9_4 import Flags
from sim.steptime.linear import step_time
from sim.steptime.noise_parameters import Noise

EFFECTS = RandomEffects(drift=0.08, seconds=12.0, rung=0.05, prefill=0.6)
CALM = RandomEffects(drift=0.02, seconds=12.0, rung=0.01)
BLOCKS, EACH = 12, 7  # three rungs of four blocks, of seven steps each
SIZE = BLOCKS * EACH

Floats = NDArray[np.float64]


@pytest.fixture
def rows() -> Rows:
    rng = np.random.default_rng(3)
    block = np.repeat(np.arange(BLOCKS), EACH)
    rung = block // 4
    return Rows(
        table=pd.DataFrame(),
        extra=pd.DataFrame(),
        seconds=rng.uniform(0.02, 0.05, SIZE),
        prefill=rng.random(SIZE) < 0.2,
        run=np.zeros(SIZE, dtype=np.int64),
        rung=rung,
        block=block,
        warnings=[],
    )


def columns() -> tuple[Floats, Floats, Floats]:
    """Three columns, the weight of each row and how long each is supposed to be."""
    rng = np.random.default_rng(4)
    return rng.uniform(0.5, 2.0, (SIZE, 3)), rng.uniform(5.0, 30.0, SIZE), rng.uniform(0.02, 0.05, SIZE)


def written_out(rows: Rows, kept: NDArray[np.bool_], seconds: Floats) -> tuple[Floats, Floats]:
    """Xᵀ V⁻¹ X and Xᵀ V⁻¹ y with V = noise + block + rung, of the rows that are kept."""
    x, weight, supposed = columns()
    felt = supposed * np.where(rows.prefill, EFFECTS.prefill, 1.0)
    same_block, same_rung = (np.equal.outer(key, key) for key in (rows.block, rows.rung))
    of_block, of_rung = EFFECTS.block_sd(BLOCK_SECONDS), EFFECTS.rung_sd(4 * BLOCK_SECONDS, 4)
    covariance = np.outer(felt, felt) * (of_block**2 * same_block + of_rung**2 * same_rung)
    covariance += np.diag(weight**-2)
    inverse = np.linalg.inv(covariance[np.ix_(kept, kept)])
    return x[kept].T @ inverse @ x[kept], x[kept].T @ inverse @ seconds[kept]


@pytest.mark.parametrize("left_out", [[], [0], [4, 5, 6, 7], [1, 11]])
def test_random_effects_are_eliminated_as_in_generalised_least_squares(rows: Rows, left_out: list[int]):
    x, weight, supposed = columns()
    felt = supposed * np.where(rows.prefill, EFFECTS.prefill, 1.0)
    found = equations(rows, x, weight, felt, EFFECTS)
    counts = np.ones(BLOCKS)
    counts[left_out] = 0.0
    slower = np.random.default_rng(5).uniform(0.9, 1.1, (BLOCKS, 2))
    gram, right = found.reduced(counts, slower)
    seconds = rows.seconds * slower[rows.block, np.where(rows.prefill, 0, 1)]
    expected = written_out(rows, np.isin(rows.block, left_out, invert=True), seconds)
    assert gram == pytest.approx(expected[0], rel=1e-9)
    assert right == pytest.approx(expected[1], rel=1e-9)


def test_a_steady_machine_leaves_least_squares(rows: Rows):
    x, weight, supposed = columns()
    gram, right = equations(rows, x, weight, supposed, NO_EFFECTS).reduced(np.ones(BLOCKS))
    assert gram == pytest.approx((x * weight[:, None] ** 2).T @ x)
    assert right == pytest.approx((x * weight[:, None] ** 2).T @ rows.seconds)


def test_the_mood_of_the_only_rung_is_the_machines_and_is_drawn_all_the_same(rows: Rows):
    x, weight, supposed = columns()
    alone = replace(rows, rung=np.zeros(SIZE, dtype=np.int64))
    calm = EFFECTS._replace(rung=0.0)
    found = [equations(alone, x, weight, supposed, effects) for effects in (EFFECTS, calm)]
    moody, same = (of.reduced(np.ones(BLOCKS)) for of in found)
    assert moody[0] == pytest.approx(same[0]) and moody[1] == pytest.approx(same[1])
    assert found[0].rung_variance[0] - found[1].rung_variance[0] == pytest.approx(EFFECTS.rung**2)


def test_what_steps_differ_by_within_seconds_is_not_blurred_by_loads_that_were_slow():
    """Ladders of two lengths, the shorter measured in a slow hour: without random effects context looks free."""
    runs = [observe([1, 4, 16], lengths(*of), seconds=20.0, seed=1).run for of in ((60, 200), (600, 200))]
    schedules = [schedule_of(run) for run in runs]
    rows = build_rows(runs, schedules)
    slow = replace(rows, seconds=rows.seconds * np.where(rows.run == 0, 1.08, 1.0))
    form, admissions = candidate_forms(SERVER)[0], admission_timings(runs, schedules)
    blurred, told = (
        dict(zip(fit.names, fit.coefficients, strict=True))
        for fit in (
            regress(slow, form, admissions, effects) for effects in (NO_EFFECTS, RandomEffects(drift=0.02, rung=0.06))
        )
    )
    assert told["b2"] == pytest.approx(TRUTH["b2"], rel=0.15)
    assert abs(blurred["b2"] / TRUTH["b2"] - 1) > 0.3


def test_caches_that_a_prefill_left_cold_do_not_make_context_look_free():
    """Steps soon after a prefill are longer and shorter in context; forecasts have the average of it."""
    padding = msgspec.structs.replace(SERVER, requires_padding=True)
    run = observe([1, 3, 6], lengths(300, 20), model="padded", truth=TRUTH | {"b2": 1e-5}, server=padding).run
    schedules = [schedule_of(run)]
    rows = build_rows([run], schedules)
    cold = np.exp(-rows.table["since"].to_numpy() / 4.0) * ~rows.prefill
    rows = replace(rows, seconds=rows.seconds + 0.002 * cold)
    with_it = candidate_forms(Flags(requires_padding=True))[0]
    without = replace(with_it, terms=tuple(term for term in with_it.terms if term != COLD_CACHE))
    told, blurred = (regress(rows, form, admission_timings([run], schedules), CALM) for form in (with_it, without))
    context, looks = (float(fit.coefficients[fit.names.index("b2")]) for fit in (told, blurred))
    assert context == pytest.approx(1e-5, rel=0.3)
    assert looks < 0.5e-5
    decode = ~rows.prefill
    assert told.predicted[decode].sum() == pytest.approx(rows.seconds[decode].sum(), rel=0.01)
    in_it = told.names.index(COLD_CACHE)
    assert told.coefficients[in_it] > 0.001
    columns = design(rows, with_it, told.names)
    assert columns[decode, in_it].sum() == pytest.approx(0.0, abs=1e-9)
    columns[:, in_it] = 0.0
    assert told.predicted == pytest.approx(columns @ told.coefficients)


def test_steps_that_all_follow_their_prefill_at_once_tell_nothing_of_caches():
    """Answers of two tokens: one decode step each, which has all the time there is to tell."""
    padding = msgspec.structs.replace(SERVER, requires_padding=True)
    run = observe([1, 2], lengths(200, 2), model="padded", noise=Noise(drift=0.03), server=padding).run
    calibration = calibrate_runs([run])
    form, true = step_time(calibration.model, calibration.values), step_time("padded", TRUTH)
    assert form.decode(1, 200, 200)[0] == pytest.approx(true.decode(1, 200, 200)[0], rel=0.1)


def test_a_calibration_is_fitted_with_the_estimated_random_effects():
    run = observe([1, 2, 4, 8], lengths((100, 1000), (20, 150)), noise=Noise(decode=[0.9, 1.1], drift=0.05)).run
    schedules = [schedule_of(run)]
    rows, admissions = build_rows([run], schedules), admission_timings([run], schedules)
    first, _ = choose(rows, candidate_forms(SERVER), admissions)
    fit = regress(rows, first.form, admissions, fit_random_effects(first, rows))
    b0 = first.names.index("b0")
    found = calibrate_runs([run]).values["b0"]
    assert found == pytest.approx(float(fit.coefficients[b0]), rel=1e-6)
    assert abs(found / float(first.coefficients[b0]) - 1) > 1e-4


def test_draws_are_as_wide_as_random_effects_of_other_days_make_them():
    """One schedule with other rung effects each time: the spread of the fits, and what one fit says of it."""
    noise = Noise(prefill=[0.95, 1.05], decode=[0.9, 1.0, 1.1])
    run = observe([1, 2, 4, 8, 16], lengths((100, 1000), (20, 150)), noise=noise).run
    schedules = [schedule_of(run)]
    rows, form, admissions = (
        build_rows([run], schedules),
        candidate_forms(SERVER)[0],
        admission_timings([run], schedules),
    )
    effects, rng = RandomEffects(rung=0.05, prefill=0.6), np.random.default_rng(9)
    days = [1 + effects.rung * rng.standard_normal(5)[rows.rung] * np.where(rows.prefill, 0.6, 1.0) for _ in range(40)]
    fits = [regress(replace(rows, seconds=rows.seconds * day), form, admissions, effects) for day in days]
    matrix = design(rows, form, fits[0].names)
    mean_steps = np.array([matrix[rows.prefill].mean(axis=0), matrix[~rows.prefill].mean(axis=0)])
    apart = np.std([mean_steps @ fit.coefficients for fit in fits], axis=0)
    drawn = np.mean([(draw_coefficients(fit, rows, rng, 40) @ mean_steps.T).std(axis=0) for fit in fits[:8]], axis=0)
    assert drawn == pytest.approx(apart, rel=0.25)
