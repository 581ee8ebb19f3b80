"""Advice followed on a machine whose truth is known: the band shrinks as promised, and more than by another choice."""

from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
from streams import SERVER, lengths, observe

from calibrate.advise import Advice, Measurement, Question, advise
from calibrate.fit import calibrate_runs
from sim.calibration import Calibration, Noise
from sim.run import Run
from sim.scenario import Scenario

NOISE = Noise(prefill=[0.98, 1.0, 1.02], decode=[0.97, 1.0, 1.03], drift=0.005, drift_seconds=6.0)
LONG, SHORT = lengths(1500, 100), lengths(50, 500)
QUESTION = Question(Scenario(name="question", server=SERVER, workload=LONG), 16)
CANDIDATES = [Measurement(LONG, 8, 30.0), Measurement(SHORT, 1, 30.0), Measurement(SHORT, 8, 30.0)]


@pytest.fixture(scope="module")
def known() -> Run:
    return observe([1, 2, 4], SHORT, noise=NOISE, seconds=25.0).run


@pytest.fixture(scope="module")
def before(known) -> Calibration:
    return calibrate_runs([known])


@pytest.fixture(scope="module")
def advice(before) -> list[Advice]:
    return advise(before, QUESTION, CANDIDATES)


def _now(calibration: Calibration) -> float:
    return advise(calibration, QUESTION, CANDIDATES[:1])[0].now


def after(known: Run, measurement: Measurement) -> float:
    """The band once the measurement was made, on the same machine."""
    more = observe([measurement.users], measurement.workload, noise=NOISE, seconds=40.0, seed=9).run
    return _now(calibrate_runs([known, more]))


def test_the_profile_that_was_never_seen_is_advised(advice):
    assert advice[0].measurement.workload == LONG
    assert advice[0].gain > 0.5
    assert [a.after for a in advice] == sorted(a.after for a in advice)


def test_following_the_advice_narrows_the_band_as_promised_and_more_than_another_choice(known, before, advice):
    best, worst = advice[0], advice[-1]
    followed, another = after(known, best.measurement), after(known, worst.measurement)
    assert best.now == pytest.approx(_now(before))
    assert followed < 0.6 * best.now
    assert followed < 2.0 * best.after + 0.005  # about as promised
    assert followed < 0.6 * another


def test_what_is_known_already_promises_nothing(before):
    same = advise(before, Question(QUESTION.scenario, 16), [Measurement(SHORT, 1, 30.0)])[0]
    assert same.gain < 0.35


def test_the_executor_changes_nothing(before, advice):
    with ThreadPoolExecutor(2) as executor:
        assert advise(before, QUESTION, CANDIDATES, executor=executor) == advice


def test_a_machine_with_greater_moods_promises_less(before, advice):
    moody = msgspec.structs.replace(before, noise=msgspec.structs.replace(before.noise, between=0.3))
    assert advise(moody, QUESTION, CANDIDATES[:1])[0].after > 1.2 * advice[0].after
    assert np.isclose(advise(moody, QUESTION, CANDIDATES[:1])[0].now, advice[0].now)
