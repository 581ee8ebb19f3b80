"""Advice followed on a machine whose truth is known: the band shrinks as promised, and more than by another choice."""

import msgspec
import numpy as np
import pytest
from backwards import Backwards
from streams import SERVER, lengths, observe

from calibrate.next_measurement import Advice, Measurement, Question, advise, candidates, half_width, longer_window
from calibrate.sources.streamed import calibrate_runs
from sim.engines import vllm_v1
from sim.engines.tgi_0_9_4 import Flags
from sim.model.calibration import Calibration
from sim.model.scenario import Load, Scenario
from sim.model.workload import RequestLengths, Workload
from sim.run import Run
from sim.steptime.noise_parameters import Noise

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


def after(known: Run, measurement: Measurement, question: Question = QUESTION) -> float:
    """The band once the measurement was made, on the same machine."""
    seconds = measurement.seconds + 5.0  # and a while to settle
    more = observe([measurement.users], measurement.workload, noise=NOISE, seconds=seconds, seed=9).run
    return half_width(calibrate_runs([known, more]), question)


def test_the_profile_that_was_never_seen_is_advised(advice):
    assert advice[0].measurement.workload == LONG
    assert advice[0].gain > 0.5
    assert [a.after for a in advice] == sorted(a.after for a in advice)


def test_following_the_advice_narrows_the_band_as_promised_and_more_than_another_choice(known, before, advice):
    best, worst = advice[0], advice[-1]
    followed, another = after(known, best.measurement), after(known, worst.measurement)
    assert best.now == half_width(before, QUESTION)
    assert followed < best.high
    assert followed < 0.3 * another


def test_the_promise_holds_where_no_straight_line_leads_to_the_answer():
    """Who shares a batch changes with the step times, so the answer jumps among the draws."""
    question = Question(Scenario(name="jumps", server=SERVER, workload=lengths(800, 40)), 6)
    seen = observe([1, 2], lengths(100, 60), noise=NOISE, seconds=30.0).run
    same = Measurement(question.scenario.workload, 6, 30.0)
    # a seed without a truth at whose edge another grouping begins: of eight seeds five are, whatever the priors
    (promise,) = advise(calibrate_runs([seen]), question, [same], seed=2)
    assert promise.low <= promise.after <= promise.high < 0.1 * promise.now
    assert promise.low / 2 < after(seen, same, question) < 2 * promise.high


def test_a_longer_window_is_advised_where_it_averages_drift_but_not_for_a_run_effect(before, monkeypatch):
    for name, number in (("DRAWS", 30), ("TRUTHS", 5), ("EACH", 8)):
        monkeypatch.setattr(f"calibrate.next_measurement.{name}", number)
    drifting = msgspec.structs.replace(before.noise, drift=0.2, drift_seconds=10.0, between=0.0)
    keeping = msgspec.structs.replace(before.noise, drift=0.0, between=0.1)
    advised = {}
    for name, noise in (("drifts", drifting), ("keeps", keeping)):
        moody = msgspec.structs.replace(before, noise=noise)
        (best,) = advise(moody, QUESTION, CANDIDATES[:1])
        advised[name] = longer_window(best, moody, QUESTION)
    assert advised["drifts"].measurement.seconds == 3 * CANDIDATES[0].seconds
    assert advised["keeps"].measurement == CANDIDATES[0]


def test_what_is_known_already_promises_nothing(before):
    same = advise(before, Question(QUESTION.scenario, 16), [Measurement(SHORT, 1, 30.0)])[0]
    assert same.gain < 0.35


def test_the_executor_changes_nothing(before, advice):
    assert advise(before, QUESTION, CANDIDATES[:1], executor=Backwards()) == advice[:1]


def test_a_machine_with_more_drift_promises_less(before, advice):
    moody = msgspec.structs.replace(before, noise=msgspec.structs.replace(before.noise, between=0.1))
    (promise,) = advise(moody, QUESTION, CANDIDATES[:1])
    assert promise.after > 1.7 * advice[0].after  # each of the draws hears it with an error of its own
    assert promise.now == advice[0].now


def test_requests_of_a_file_are_asked_about_and_advised():
    seen = observe([1, 2], lengths(100, 60), noise=NOISE, seconds=12.0).run
    rows = RequestLengths(*(np.array([low, high]) for low, high in ((200, 1200), (20, 60), (20, 60))))
    mix = Workload(empirical="gone.csv")
    question = Question(Scenario(name="mix", server=SERVER, workload=mix), 4, lengths=rows)
    possible = candidates(question, [lengths(100, 60), mix], 10.0)
    assert [(m.workload, m.users) for m in possible[:3]] == [(mix, 1), (mix, 2), (mix, 4)]
    assert {m.workload for m in possible[3:]} == {lengths(100, 60)}
    best = advise(calibrate_runs([seen]), question, possible[2:4])[0]
    assert best.measurement.workload == mix
    assert best.gain > 0.2


def test_loads_to_consider_are_those_that_the_engine_takes():
    work = lengths(100, 60)
    for server, longest, top in (
        (vllm_v1.Flags(max_model_len=250), 190, 8),  # 190 + 60 tokens; a longer prompt would have its answer cut
        (vllm_v1.Flags(max_model_len=4096, max_num_queued_reqs=6), 200, 6),
        (Flags(max_input_length=150), 150, 8),
    ):
        question = Question(Scenario(name="x", server=server, workload=work), 8)
        possible = candidates(question, [work])
        assert {m.workload.prompt_tokens for m in possible} == {100, 25, longest}
        assert max(m.users for m in possible) == top


def test_a_what_if_is_asked_with_the_pauses_of_the_question(before):
    """Users who pause hardly meet: how steps grow with the batch matters less to them."""
    eager = Question(Scenario(name="eager", server=SERVER, workload=LONG, load=Load(users=[16])), 16)
    load = Load(users=[16], think=4.0)
    calm = Question(msgspec.structs.replace(eager.scenario, load=load), 16)
    assert half_width(before, calm) != half_width(before, eager)
