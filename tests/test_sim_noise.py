"""The noise of a step depends on the seed and the step's number only, and has the law and the mean it should."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import skew

from sim.steptime.noise import Floats, Noise
from sim.steptime.noise_parameters import Noise as Law
from sim.steptime.segment import NoisySegment

LAW = Law(prefill=[0.5, 1.0, 1.5], decode=[0.8, 0.9, 1.0, 1.1, 1.2])
REMEMBERING = msgspec.structs.replace(LAW, memory=0.6, memory_steps=30.0)


@given(st.integers(0, 20_000), st.integers(1, 9_000), st.sampled_from([LAW, REMEMBERING]))
def test_a_steps_factor_does_not_depend_on_how_steps_are_grouped(number: int, count: int, law: Law) -> None:
    noise = Noise(law, 5)
    together = noise.factors("decode", number, count)
    assert together.shape == (count,)
    for i in (0, count // 2, count - 1):
        assert Noise(law, 5).factor("decode", number + i) == together[i] == noise.factor("decode", number + i)


def test_blocks_thrown_away_come_back_the_same() -> None:
    noise = Noise(REMEMBERING, 5)
    early = noise.factors("decode", 0, 10).copy()
    noise.factors("decode", 0, 20 * Noise.BLOCK)
    assert (noise.factors("decode", 0, 10) == early).all()


@pytest.mark.parametrize("law", [LAW, REMEMBERING])
def test_factors_have_the_laws_quantiles_and_its_mean_of_1(law: Law) -> None:
    n = 300_000
    for kind, quantiles in (("prefill", law.prefill), ("decode", law.decode)):
        factors = Noise(law, 7).factors(kind, 0, n)
        assert factors.mean() == pytest.approx(1.0, abs=0.004)
        found = np.quantile(factors, np.linspace(0, 1, len(quantiles)))
        assert found == pytest.approx(np.array(quantiles), abs=0.01)


def test_other_seeds_and_other_kinds_have_other_luck() -> None:
    of = [Noise(LAW, seed).factors("decode", 0, 50_000) for seed in (1, 2)]
    assert abs(np.corrcoef(*of)[0, 1]) < 0.02
    assert (np.diff(of[0]) != 0).all()


def test_successive_decode_steps_remember_and_fresh_ones_do_not() -> None:
    def correlation(law: Law, lag: int) -> float:
        x = Noise(law, 3).factors("decode", 0, 400_000)
        return float(np.corrcoef(x[:-lag], x[lag:])[0, 1])

    assert abs(correlation(LAW, 1)) < 0.01
    for lag in (1, 30):  # of the normal scores exactly; of this nearly uniform law a few percent less
        assert correlation(REMEMBERING, lag) == pytest.approx(0.6 * math.exp(-lag / 30), rel=0.12)


def test_the_drift_has_mean_1_its_deviation_and_forgets_itself() -> None:
    law = Law(drift=0.1, drift_seconds=16.0)
    noise = Noise(law, 11)
    cell = 16.0 / Noise.CELLS
    factors = np.array([noise.drift((i + 0.5) * cell)[0] for i in range(200_000)])
    assert factors.mean() == pytest.approx(1.0, abs=0.005)
    logs = np.log(factors)
    assert logs.std() == pytest.approx(0.1, rel=0.03)
    assert np.corrcoef(logs[: -Noise.CELLS], logs[Noise.CELLS :])[0, 1] == pytest.approx(math.exp(-1), abs=0.03)


@pytest.mark.parametrize("skewness", [-1.5, -0.5, 0.5, 1.0, 2.0])
def test_a_skewed_drift_has_its_skewness_its_deviation_and_mean_1(skewness: float) -> None:
    noise = Noise(Law(drift=0.1, drift_seconds=1.0, drift_skew=skewness, prefill_share=0.5), 7)
    factors = np.array([noise.drift(i / 2)[0] for i in range(100_000)])
    prefills = np.array([noise.drift_of("prefill", i / 2)[0] for i in range(100_000)])
    assert (factors.mean(), prefills.mean()) == pytest.approx((1.0, 1.0), abs=0.003)
    assert np.log(factors).std() == pytest.approx(0.1, rel=0.03)
    assert np.log(prefills).std() == pytest.approx(0.05, rel=0.03)
    assert skew(np.log(factors)) == pytest.approx(skewness, abs=0.12)


def test_prefills_feel_their_share_of_drift_and_level_around_the_same_mean() -> None:
    law = Law(drift=0.2, drift_seconds=1.0, between=0.3, prefill_share=0.4)
    both = np.array(
        [
            (noise.drift(0.0)[0], noise.drift_of("prefill", 0.0)[0])
            for noise in (Noise(law, seed) for seed in range(20_000))
        ]
    )
    assert both.mean(axis=0) == pytest.approx([1.0, 1.0], abs=0.008)
    logs = np.log(both)
    assert logs.std(axis=0) == pytest.approx([np.hypot(0.2, 0.3), 0.4 * np.hypot(0.2, 0.3)], rel=0.03)
    assert np.corrcoef(logs.T)[0, 1] == pytest.approx(1.0)
    alike = Noise(msgspec.structs.replace(law, prefill_share=1.0), 3)
    assert alike.drift_of("prefill", 7.0)[0] == alike.drift(7.0)[0]


@given(st.floats(0, 1e6), st.floats(0.1, 100))
def test_the_drift_holds_until_the_end_it_names_and_whoever_asks_first(time: float, seconds: float) -> None:
    law = Law(drift=0.2, drift_seconds=seconds)
    time = min(time, 2000 * seconds)
    noise = Noise(law, 1)
    factor, until = noise.drift(time)
    assert until > time
    assert noise.drift(math.nextafter(until, 0.0)) == (factor, until)
    assert noise.drift(until)[1] > until
    assert noise.drift(time) == Noise(law, 1).drift(time) == (factor, until)


def test_a_whole_run_keeps_one_level_and_levels_have_mean_1() -> None:
    law = Law(between=0.2)
    levels = np.array([Noise(law, seed).drift(0.0)[0] for seed in range(4000)])
    assert levels.mean() == pytest.approx(1.0, abs=0.015)
    assert np.log(levels).std() == pytest.approx(0.2, rel=0.05)
    noise = Noise(law, 3)
    assert noise.drift(0.0) == noise.drift(1e9) == (levels[3], math.inf)


@given(
    st.integers(1, 300),
    st.integers(0, 5000),
    st.sampled_from([Law(), LAW, Law(decode=[0.5, 1.5], drift=0.3, drift_seconds=4.0)]),
    st.floats(0, 50),
)
def test_a_noisy_run_is_the_sum_of_its_steps_and_its_inverse_is_exact(
    steps: int, number: int, law: Law, start: float
) -> None:
    noise = Noise(law, 9)
    run = NoisySegment(start, 0.05, 0.001, 0.02, steps, number, noise, "decode")
    at = start
    for j in range(steps):
        work = 0.05 + 0.001 * j + (0.02 if j == 0 else 0.0)
        at += work * noise.factor("decode", number + j) * noise.drift(run.end(j))[0]
        assert run.end(j + 1) == pytest.approx(at, abs=1e-9)
    assert (run.ends(steps) == [run.end(k + 1) for k in range(steps)]).all()
    for k in range(1, steps + 1, 7):
        end = run.end(k)
        assert run.steps_by(end) == k
        assert run.steps_by(math.nextafter(end, 0.0)) == k
        assert run.steps_by(math.nextafter(end, math.inf)) == k + 1
    assert run.steps_by(start) == 0


def test_what_the_next_step_gives_back_makes_no_answer_longer() -> None:
    law = msgspec.structs.replace(LAW, returned=0.9)
    single = Noise(law, 3).factors("decode", 0, 400_000) - 1
    assert single.std() == pytest.approx((Noise(LAW, 3).factors("decode", 0, 400_000) - 1).std(), rel=0.02)
    assert np.corrcoef(single[:-1], single[1:])[0, 1] == pytest.approx(-0.45, abs=0.02)

    def of_answers(factors: Floats) -> float:
        return float(factors[:399_000].reshape(-1, 100).sum(axis=1).var()) / 100

    plain = Noise(LAW, 3).factors("decode", 0, 400_000) - 1
    assert of_answers(plain) == pytest.approx(plain.var(), rel=0.1)
    assert (
        0.1 * plain.var() < of_answers(single) < 0.2 * plain.var()
    )  # what is not given back, and some more by the law
