"""Steps that say nothing of the server are left out of the fit, and counted."""

from dataclasses import replace

import numpy as np
import pytest
from streams import lengths, observe, questions
from warned import texts

from calibrate.schedule.client_delays import ASSUMED
from calibrate.sources.streamed import calibrate_runs
from sim.model.errors import NotEnoughData
from sim.steptime.linear import step_time
from sim.steptime.noise_parameters import Noise

NOISE = Noise(prefill=[0.97, 1.0, 1.03], decode=[0.95, 1.0, 1.05], drift=0.01, drift_seconds=8.0)


@pytest.mark.parametrize("sign", [{"canary_p99_ms": 45.0}, {"client_limited": True}])
def test_loads_at_which_the_client_was_too_busy_are_left_out(sign):
    run = observe([1, 2, 4], lengths(200, 40), seconds=8.0).run
    busy = replace(run.rungs[2], extra=sign)
    limited = calibrate_runs([replace(run, rungs=[*run.rungs[:2], busy])])
    assert limited.range["sequences"][1] == 2
    assert any("too busy" in d and "load 4" in d for d in texts(limited.warnings))


def held_up(times: np.ndarray) -> np.ndarray:
    """A client that does nothing for the first 200 ms of every five seconds."""
    start = np.floor(times / 5) * 5
    return np.where(times - start < 0.2, start + 0.2, times)


def gathered(times: np.ndarray) -> np.ndarray:
    """Every twentieth token comes with the next one."""
    late = times.copy()
    for i in np.flatnonzero(np.random.default_rng(len(times)).random(len(times) - 1) < 0.05)[::-1]:
        late[i] = late[i + 1]
    return late


@pytest.mark.parametrize("seen", [held_up, gathered])
def test_steps_whose_tokens_came_in_a_lump_are_left_out_and_counted(seen):
    clean = observe([1, 2, 4, 8, 16, 32], lengths((100, 1500), (20, 120)), noise=NOISE, seconds=12.0).run
    late = replace(clean, token_times=[seen(t) for t in clean.token_times or []])
    one, other = calibrate_runs([clean]), calibrate_runs([late])
    known, found = (questions(each.values, each.model) for each in (one, other))
    assert found / known == pytest.approx(np.ones(3), abs=0.02)
    assert any("% of the steps are left out: their tokens came together" in d for d in texts(other.warnings))
    assert not any("came together" in d or "other clients" in d for d in texts(one.warnings))


def test_answers_that_came_in_one_piece_beside_streams_are_warned_about():
    run = observe([1, 4], lengths(100, 60), noise=NOISE, seconds=6.0).run
    times = [t if row % 3 else np.empty(0) for row, t in enumerate(run.token_times or [])]
    ok = int((run.requests["status"] == "ok").sum())
    whole = int((run.requests["status"].iloc[::3] == "ok").sum())
    said = f"{run.name}: {whole} of {ok} answers were not streamed: batches were larger than they look"
    assert said in texts(calibrate_runs([replace(run, token_times=times)]).warnings)
    assert not any("not streamed" in d for d in texts(calibrate_runs([run]).warnings))


def test_streams_that_broke_off_are_warned_about():
    run = observe([1, 4], lengths(100, 60), noise=NOISE, seconds=6.0).run
    statuses, n = run.requests["status"].to_list(), len(run.requests)
    for broken, said in ((n // 5, True), (n // 200, False)):
        cut = ["reset" if i < broken else status for i, status in enumerate(statuses)]
        warnings = texts(calibrate_runs([replace(run, requests=run.requests.assign(status=cut))]).warnings)
        assert (f"{run.name}: {broken} of {n} streams broke off: " in "".join(warnings)) == said


def test_what_no_user_showed_is_assumed_and_said():
    closed = observe([1, 4], lengths(100, 60), noise=NOISE, seconds=6.0).run
    rungs = [replace(rung, users=None, rate=1.0) for rung in closed.rungs]
    opened = replace(closed, rungs=rungs, requests=closed.requests.assign(user=-1))
    found = calibrate_runs([opened])
    assert found.clocks.turnaround == ASSUMED.turnaround
    assert any("is assumed" in d for d in texts(found.warnings))
    assert not any("is assumed" in d for d in texts(calibrate_runs([closed]).warnings))


def test_requests_without_rungs_are_of_no_load():
    run = observe([1], lengths(100, 60), seconds=3.0).run
    with pytest.raises(NotEnoughData, match="it has no rung"):
        calibrate_runs([replace(run, rungs=[])])


def test_a_machine_that_stood_still_once_is_not_slow():
    run = observe([1, 2], lengths((50, 400), (20, 80)), noise=NOISE, seconds=15.0).run
    at = np.sort(np.concatenate(run.token_times))[900]
    later = {name: np.where(x > at, x + 0.3, x) for name, x in run.requests[["sent", "scheduled", "ended"]].items()}
    times = [np.where(t > at, t + 0.3, t) for t in run.token_times]
    still = replace(run, requests=run.requests.assign(**later), token_times=times)
    calm, found = calibrate_runs([run]), calibrate_runs([still])
    times = [step_time(c.model, c.values).decode(2, 500, 400)[0] for c in (calm, found)]  # as it was seen
    assert times[1] == pytest.approx(times[0], rel=0.005)
    assert max(found.noise.decode) < 1.1
    said = [d for d in texts(found.warnings) if "a stall" in d]
    assert len(said) == 1 and "1 of " in said[0]
    assert not any("a stall" in d for d in texts(calm.warnings))
