"""Normal equations without moods against generalised least squares written out."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from streams import SERVER, TRUTH, lengths, observe

from calibrate.equations import equations
from calibrate.fit import candidates
from calibrate.moods import STEADY, Moods
from calibrate.races import races
from calibrate.regress import regress
from calibrate.rows import BLOCK_SECONDS, WARMING, Rows, rows_of
from calibrate.steps import rebuild

MOODS = Moods(drift=0.08, seconds=12.0, rung=0.05, prefill=0.6)
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
        seconds=rng.uniform(0.02, 0.05, SIZE),
        prefill=rng.random(SIZE) < 0.2,
        run=np.zeros(SIZE, dtype=np.int64),
        rung=rung,
        block=block,
        doubts=[],
    )


def columns() -> tuple[Floats, Floats, Floats]:
    """Three columns, the weight of each row and how long each is supposed to be."""
    rng = np.random.default_rng(4)
    return rng.uniform(0.5, 2.0, (SIZE, 3)), rng.uniform(5.0, 30.0, SIZE), rng.uniform(0.02, 0.05, SIZE)


def written_out(rows: Rows, kept: NDArray[np.bool_], seconds: Floats) -> tuple[Floats, Floats]:
    """Xᵀ V⁻¹ X and Xᵀ V⁻¹ y with V = noise + block + rung, of the rows that are kept."""
    x, weight, supposed = columns()
    felt = supposed * np.where(rows.prefill, MOODS.prefill, 1.0)
    same_block, same_rung = (np.equal.outer(key, key) for key in (rows.block, rows.rung))
    of_block, of_rung = MOODS.of_a_block(BLOCK_SECONDS), MOODS.of_a_rung(4 * BLOCK_SECONDS, 4)
    covariance = np.outer(felt, felt) * (of_block**2 * same_block + of_rung**2 * same_rung)
    covariance += np.diag(weight**-2)
    inverse = np.linalg.inv(covariance[np.ix_(kept, kept)])
    return x[kept].T @ inverse @ x[kept], x[kept].T @ inverse @ seconds[kept]


@pytest.mark.parametrize("left_out", [[], [0], [4, 5, 6, 7], [1, 11]])
def test_moods_are_taken_out_as_generalised_least_squares_does(rows: Rows, left_out: list[int]):
    x, weight, supposed = columns()
    felt = supposed * np.where(rows.prefill, MOODS.prefill, 1.0)
    found = equations(rows, x, weight, np.ones(3), felt, MOODS)
    counts = np.ones(BLOCKS)
    counts[left_out] = 0.0
    slower = np.random.default_rng(5).uniform(0.9, 1.1, (BLOCKS, 2))
    gram, right = found.without_moods(counts, slower)
    seconds = rows.seconds * slower[rows.block, np.where(rows.prefill, 0, 1)]
    expected = written_out(rows, np.isin(rows.block, left_out, invert=True), seconds)
    assert gram == pytest.approx(expected[0], rel=1e-9)
    assert right == pytest.approx(expected[1], rel=1e-9)


def test_a_steady_machine_leaves_least_squares(rows: Rows):
    x, weight, supposed = columns()
    gram, right = equations(rows, x, weight, np.ones(3), supposed, STEADY).without_moods(np.ones(BLOCKS))
    assert gram == pytest.approx((x * weight[:, None] ** 2).T @ x)
    assert right == pytest.approx((x * weight[:, None] ** 2).T @ rows.seconds)


def test_a_rung_that_is_out_of_the_ordinary_counts_for_less(rows: Rows):
    x, weight, supposed = columns()
    usual = np.array([1.0, 0.25, 1.0])
    only = np.where(rows.rung_of_block == 1, 1.0, 0.0)
    gram, right = equations(rows, x, weight, usual, supposed, MOODS).without_moods(only)
    whole = equations(rows, x, weight, np.ones(3), supposed, MOODS).without_moods(only)
    assert gram == pytest.approx(0.25 * whole[0])
    assert right == pytest.approx(0.25 * whole[1])


def test_what_steps_differ_by_within_seconds_is_not_blurred_by_loads_that_were_slow():
    """Ladders of two lengths, of which the shorter's loads all met a slow hour: between them context looks free."""
    runs = [observe([1, 4, 16], lengths(*of), seconds=20.0, seed=1).run for of in ((60, 200), (600, 200))]
    schedules = [rebuild(run) for run in runs]
    rows = rows_of(runs, schedules)
    slow = replace(rows, seconds=rows.seconds * np.where(rows.run == 0, 1.08, 1.0))
    form, raced = candidates(padded=False)[0], races(runs, schedules)
    blurred, told = (
        dict(zip(fit.names, fit.coefficients, strict=True))
        for fit in (regress(slow, form, raced, moods) for moods in (STEADY, Moods(drift=0.02, rung=0.06)))
    )
    assert told["b2"] == pytest.approx(TRUTH["b2"], rel=0.15)
    assert abs(blurred["b2"] / TRUTH["b2"] - 1) > 0.3


def test_caches_that_a_prefill_left_cold_do_not_make_context_look_free():
    """Steps soon after a prefill are longer and shorter in context; forecasts have the average of it."""
    padding = msgspec.structs.replace(SERVER, requires_padding=True)
    run = observe([1, 3, 6], lengths(300, 20), model="padded", truth=TRUTH | {"b2": 1e-5}, server=padding).run
    schedules = [rebuild(run)]
    rows = rows_of([run], schedules)
    cold = np.exp(-rows.table["since"].to_numpy() / 4.0) * ~rows.prefill
    rows = replace(rows, seconds=rows.seconds + 0.002 * cold)
    with_it = candidates(padded=True)[0]
    without = replace(with_it, terms=tuple(term for term in with_it.terms if term != WARMING))
    told, blurred = (regress(rows, form, races([run], schedules), MOODS) for form in (with_it, without))
    context, looks = (float(fit.coefficients[fit.names.index("b2")]) for fit in (told, blurred))
    assert context == pytest.approx(1e-5, rel=0.3)
    assert looks < 0.5e-5
    decode = ~rows.prefill
    assert told.predicted[decode].sum() == pytest.approx(rows.seconds[decode].sum(), rel=0.01)
