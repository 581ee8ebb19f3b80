"""A run that was not streamed still calibrates, through the simulator, and its bands are wider for it."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from streams import TRUTH, lengths, observe
from warned import texts

from calibrate.sources.streamed import calibrate_runs
from scenarios.compare.run_with_model import compare, forecast_run
from sim.model.calibration import Calibration
from sim.model.errors import NotEnoughData
from sim.run import Run
from sim.steptime.linear import step_time


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
    found = compare(other, forecast_run(other, calibration, replicates=19))
    judged = [r for r in found.rows if r.metric in ("e2e_mean", "rps", "output_tokens_per_s")]
    assert np.mean([r.inside for r in judged]) >= 0.75
    assert np.mean([abs(r.relative_error or 0.0) for r in judged]) < 0.1


def alone(parameters: dict[str, float]) -> float:
    """How long 800 + 60 tokens take by themselves, s."""
    form = step_time("affine", parameters)
    return form.prefill(1, 800, 640000, 800) + sum(form.decode(1, 800 + i, 800 + i)[0] for i in range(1, 60))


def alone_in(calibration: Calibration) -> list[float]:
    """The same of every draw."""
    draws = calibration.draws
    return [alone({name: column[i] for name, column in draws.items()}) for i in range(calibration.n_draws)]


def test_the_lone_users_latency_is_met_by_every_draw(calibration):
    assert alone_in(calibration) == pytest.approx([alone(TRUTH)] * calibration.n_draws, rel=0.03)


@pytest.fixture(scope="module")
def busy(blind) -> Calibration:
    """Fitted without the rung of one user, on a server that does not tell its budget."""
    server = msgspec.structs.replace(blind.scenario.server, max_batch_total_tokens=None)
    hidden = replace(blind, scenario=msgspec.structs.replace(blind.scenario, server=server))
    return calibrate_runs([hidden], rungs=[[1, 2, 3]])


def test_without_a_lone_user_his_latency_is_left_open_and_said_to_be(busy, streamed):
    low, high = np.quantile(alone_in(busy), [0.025, 0.975])
    assert low < alone(TRUTH) < high
    assert high / low > 1.2
    assert any("no rung of one user was fitted" in d for d in texts(busy.warnings))
    found = compare(streamed, forecast_run(streamed, busy, replicates=19))
    errors = {row.load: row.relative_error or 0.0 for row in found.rows if row.metric == "e2e_mean"}
    assert max(abs(errors[load]) for load in (4, 12, 24)) < 0.1  # what was fitted is met
    assert busy.range["users"] == (4, 24)


def test_a_budget_nobody_tells_is_drawn_with_the_rest(busy, streamed):
    budget = busy.parameters["max_batch_total_tokens"]
    assert 880 <= budget.low <= streamed.server.max_batch_total_tokens <= budget.high
    assert len(busy.draws["max_batch_total_tokens"]) == busy.n_draws
    assert len(set(busy.draws["max_batch_total_tokens"])) > 20
    assert any("max_batch_total_tokens is not told, only bounded" in d for d in texts(busy.warnings))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: replace(run, requests=run.requests.iloc[:0]), "no rung has a whole window with an answered"),
        (lambda run: replace(run, requests=run.requests.assign(status="timeout")), "no rung has a whole window"),
        (lambda run: replace(run, rungs=[replace(g, settled=np.nan) for g in run.rungs]), "no rung has a whole window"),
        (lambda run: replace(run, requests=run.requests.assign(prompt_tokens=0)), "seen: it does not say how many"),
        (lambda run: replace(run, requests=run.requests.assign(output_tokens=0)), "seen: it does not say how many"),
    ],
    ids=["empty", "all failed", "no window", "no prompts", "no answers"],
)
def test_a_run_with_nothing_to_go_by_says_so(blind, spoil, message):
    with pytest.raises(NotEnoughData, match=message):
        calibrate_runs([spoil(blind)])


def test_bands_are_wider_than_those_of_the_streams(calibration, streamed):
    with_steps = calibrate_runs([streamed])
    wide, narrow = (c.parameters["a1"].stderr / c.parameters["a1"].value for c in (calibration, with_steps))
    assert wide > 2 * narrow
    assert any("not streamed" in d for d in texts(calibration.warnings))


def test_runs_that_were_not_streamed_stand_back_where_others_were(streamed, blind):
    both = calibrate_runs([streamed, replace(blind, name="blind")])
    assert any(d.startswith("blind: not streamed") for d in texts(both.warnings))
    assert both.values == calibrate_runs([streamed]).values
