"""Results are the same whatever the executor and the number of jobs; bands and corners are of replicates."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from backwards import Backwards

from scenarios.forecast.replicate import replicate
from sim.engines.tgi_0_9_4 import Flags
from sim.executors import processes
from sim.model.calibration import Calibration, Parameter, Source
from sim.model.machine import Draw
from sim.model.scenario import Load, Scenario
from sim.model.server import Bounds
from sim.model.workload import Lengths, Workload
from sim.replicate import takeoff_factor, tasks_for
from sim.results.curve import OperatingPoint, band, knee, latency_onset, plateau
from sim.steptime.noise_parameters import Noise

VALUES = {"a0": 0.02, "a1": 1e-4, "b0": 0.03, "b1": 5e-4, "b2": 1e-6}
CALIBRATION = Calibration(
    source=Source(kind="assumed"),
    model="affine",
    parameters={n: Parameter(value=v, stderr=0.0, low=v, high=v) for n, v in VALUES.items()},
    draws={n: [v * f for f in (0.8, 0.9, 1.0, 1.1, 1.2)] for n, v in VALUES.items()},
    noise=Noise(decode=[0.9, 1.0, 1.1], between=0.02),
)
SCENARIO = Scenario(
    name="sweep",
    server=Flags(max_batch_total_tokens=Bounds(low=3000, high=6000)),
    workload=Workload(prompt_tokens=Lengths(uniform=(10, 500)), output_tokens=Lengths(uniform=(1, 50))),
    load=Load(users=[1, 4, 16], seconds=15.0),
)
TASKS = tasks_for(SCENARIO, CALIBRATION, 7, range(5))


def test_results_do_not_depend_on_the_executor_the_jobs_or_the_order() -> None:
    here = [replicate(task) for task in TASKS]
    with processes(2) as pool:
        spread = pool.run(replicate, TASKS)
    for tables in (spread, Backwards().run(replicate, TASKS)):
        for ours, theirs in zip(here, tables, strict=True):
            pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert len({float(table["e2e_mean"].iloc[0]) for table in here}) == 5


def test_replicate_0_has_the_central_values_and_the_others_draws() -> None:
    models = [task.model for task in tasks_for(SCENARIO, CALIBRATION, 7, range(40))]
    assert models[0].step_time.parameters["b0"] == 0.03
    assert models[0].server.max_batch_total_tokens == 4500
    decodes = {round(m.step_time.parameters["b0"] / 0.03, 6) for m in models[1:]}
    assert decodes == {0.8, 0.9, 1.0, 1.1, 1.2}
    budgets = [m.server.token_budget for m in models[1:]]
    assert 3000 <= min(budgets) < 3600 < 5400 < max(budgets) <= 6000
    for m in models[1:]:  # one joint draw, not one per parameter
        times = m.step_time.parameters
        assert times["a0"] / 0.02 == pytest.approx(times["b0"] / 0.03)
    factors = [takeoff_factor(CALIBRATION, 7, number) for number in range(200)]
    assert 1.15 <= min(factors) < 1.2 < 2.4 < max(factors) <= 2.5


@pytest.mark.parametrize("seed", range(5))
def test_replicates_are_spread_evenly_over_the_draws_and_meet_their_opposites(seed: int) -> None:
    places = [Draw(seed, number).place for number in range(1, 100)]
    assert all(0.0 <= place < 1.0 for place in places)
    gaps = np.diff(np.sort([*places, min(places) + 1.0]))
    assert gaps.max() < 2.5 / 99
    for one, other in zip(places[1::2], places[2::2], strict=True):
        assert abs(one - other) == pytest.approx(0.5)
    assert places[0] != Draw(seed + 1, 1).place


def test_the_median_of_ever_so_wide_draws_hardly_depends_on_the_seed() -> None:
    half = np.random.default_rng(1).standard_normal(100)
    ranks = np.concatenate([half, -half])  # as a fit has them
    medians = [np.median([ranks[int(200 * Draw(seed, n).place)] for n in range(1, 100)]) for seed in range(20)]
    assert np.abs(medians).max() < 0.05  # of chance 0.13 is the standard deviation


def test_what_a_replicate_draws_does_not_depend_on_what_it_asks() -> None:
    draws = [Draw(7, number).rng().random() for number in range(300)]
    for stream in ((), (0,), (1,), (2,), (3,), (0, 0), (0, 3)):  # of ladders and replays
        others = [np.random.default_rng([7, number, *stream]).random() for number in range(300)]
        assert abs(np.corrcoef(draws, others)[0, 1]) < 0.2


def test_a_band_is_the_median_and_the_weibull_quantiles_and_covers_nine_in_ten() -> None:
    assert band(range(1, 100)) == pytest.approx((50.0, 5.0, 95.0))  # of 99 values the 5th and the 95th
    assert band([1.0, float("nan"), 3.0]).value == 2.0
    assert all(map(np.isnan, band([float("nan")])))
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        low, high = band(rng.standard_normal(99))[1:]
        inside += low < rng.standard_normal() < high
    assert inside / 2000 == pytest.approx(0.9, abs=0.02)


def rungs(load: list[float], rps: list[float], mean: list[float], p95: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"rung": range(len(load)), "load": load, "rps": rps, "e2e_mean": mean, "e2e_p95": p95})


TABLE = rungs([1, 2, 4, 8], [0.1, 0.2, 0.35, 0.3], [10.0, 11.0, 14.0, 30.0], [10.0, 12.0, 16.0, 36.0])


def test_corners_are_interpolated_between_rungs_and_say_whether_they_were_reached() -> None:
    assert plateau(TABLE) == OperatingPoint(4.0, 0.35, True)
    assert plateau(TABLE.iloc[:3]) == OperatingPoint(4.0, 0.35, False)
    load, rps, reached = knee(TABLE)  # twice 10: a fifth of the way from 16 to 36
    assert (load, rps, reached) == pytest.approx((4.8, 0.34, True))
    assert knee(TABLE, 14.0)[:2] == pytest.approx((3.0, 0.275))
    assert knee(TABLE, 9.0) == OperatingPoint(1.0, 0.1, True)
    assert knee(TABLE, 99.0) == OperatingPoint(8.0, 0.3, False)
    assert latency_onset(TABLE, 1.25)[:2] == pytest.approx((2 + 2 / 3 * 1.5, 0.2 + 0.15 * 1.5 / 3))
