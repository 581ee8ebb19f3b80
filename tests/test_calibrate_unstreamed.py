"""A run that was not streamed still calibrates, through the simulator, and its bands are wider for it."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from streams import TRUTH, lengths, observe

from calibrate.fit import calibrate_runs
from scenarios.compare import compare, forecast_run
from sim.calibration import Calibration
from sim.forms import step_time
from sim.run import Run


@pytest.fixture(scope="module")
def streamed() -> Run:
    return observe([1, 4, 12, 24], lengths(800, 60), seconds=20.0).run


@pytest.fixture(scope="module")
def blind(streamed) -> Run:
    requests = streamed.requests.assign(first_token=np.nan, last_token=np.nan)
    return replace(streamed, requests=requests, token_times=None)


@pytest.fixture(scope="module")
def calibration(blind) -> Calibration:
    return calibrate_runs([blind])


def test_latency_and_throughput_of_other_loads_lie_in_the_bands(calibration):
    other = observe([2, 8, 18], lengths(800, 60), seconds=20.0, seed=5).run
    with ThreadPoolExecutor(1) as executor:
        found = compare(other, forecast_run(other, calibration, executor, replicates=39))
    judged = [r for r in found.rows if r.metric in ("e2e_mean", "rps", "output_tokens_per_s")]
    assert np.mean([r.inside for r in judged]) >= 0.75
    assert np.mean([abs(r.relative_error or 0.0) for r in judged]) < 0.1


def test_the_lone_users_latency_is_met_by_every_draw(calibration):
    true = step_time("affine", TRUTH)
    latency = true.prefill(1, 800, 640000, 800) + sum(true.decode(1, 800 + i, 800 + i)[0] for i in range(1, 60))
    for i in range(0, calibration.n_draws, 20):
        form = step_time("affine", {name: column[i] for name, column in calibration.draws.items()})
        drawn = form.prefill(1, 800, 640000, 800) + sum(form.decode(1, 800 + i, 800 + i)[0] for i in range(1, 60))
        assert drawn == pytest.approx(latency, rel=0.03)


def test_bands_are_wider_than_those_of_the_streams(calibration, streamed):
    with_steps = calibrate_runs([streamed])
    wide, narrow = (c.parameters["a1"].stderr / c.parameters["a1"].value for c in (calibration, with_steps))
    assert wide > 2 * narrow
    assert any("not streamed" in d for d in calibration.doubts)


def test_runs_that_were_not_streamed_stand_back_where_others_were(streamed, blind):
    both = calibrate_runs([streamed, replace(blind, name="blind")])
    assert any(d.startswith("blind: not streamed") for d in both.doubts)
    assert both.values == calibrate_runs([streamed]).values
