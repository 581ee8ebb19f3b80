"""Mixes of request classes, a day's profile, and windows of a trace."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from scenarios.load.scenario import load
from sim.cluster.ladder import climb
from sim.engines.tgi_0_9_4 import Flags
from sim.model.errors import BadInput
from sim.model.files.lengths import read_lengths
from sim.model.machine import Machine
from sim.model.scenario import Load, Profile, Scenario
from sim.model.workload import Lengths, Mix, RequestClass, RequestFile, Sessions, Workload
from sim.results import metrics
from sim.run import Run
from sim.steptime.linear import affine

MODEL = Machine(affine(a0=0.01, a1=1e-5, b0=0.01, b1=1e-4), Flags(max_batch_total_tokens=40_000, max_total_tokens=4000))
CHAT = {"name": "chat", "prompt_tokens": Lengths(uniform=(10, 20)), "output_tokens": 30}
RAG = {"name": "rag", "prompt_tokens": 500, "output_tokens": Lengths(uniform=(5, 9))}


def mix(chat: float = 0.7, rag: float = 0.3, **more: object) -> Workload:
    return Workload(classes=(RequestClass(**CHAT, share=chat, **more), RequestClass(**RAG, share=rag)))  # type: ignore[arg-type]


def run(workload: Workload, given: Load) -> Run:
    scenario = Scenario(name="mix", server=MODEL.server, workload=workload, load=given)
    return climb(scenario, MODEL, (1, 1))


def test_classes_come_by_their_shares_with_their_own_lengths() -> None:
    asked = list(islice(Mix(mix(), 3).requests(0), 4000))
    count = Counter(spec.of for spec in asked)
    assert abs(count[0] - 2800) < 4 * np.sqrt(4000 * 0.7 * 0.3)
    assert {spec.prompt_tokens for spec in asked if spec.of == 1} == {500}
    assert {spec.prompt_tokens for spec in asked if spec.of == 0} == set(range(10, 21))


def test_other_shares_ask_the_same_requests_of_each_class() -> None:
    def of(number: int, workload: Workload) -> list[tuple[int, int]]:
        asked = islice(Mix(workload, 3).requests(7), 1000)
        return [(spec.prompt_tokens, spec.output_tokens) for spec in asked if spec.of == number][:100]

    assert of(1, mix()) == of(1, mix(0.2, 0.8))
    assert of(0, mix()) == of(0, mix(2.0, 1.0))
    assert of(0, mix()) != [(spec.prompt_tokens, 30) for spec in islice(Mix(mix(), 3).requests(8), 100)]


def test_every_class_has_metrics_of_its_own() -> None:
    found = run(mix(), Load(rate=[20.0], seconds=60))
    (rung,) = found.rungs
    rows = metrics.class_metrics(found, rung)
    rag = found.requests[found.requests["class"] == "rag"]
    done = rag[(rag["last_token"] >= rung.settled) & (rag["last_token"] < rung.end) & (rag["status"] == "ok")]
    assert set(rag["prompt_tokens"]) == {500}
    assert rows["rag.e2e_mean"] == pytest.approx((done["last_token"] - done["scheduled"]).mean())
    assert rows["chat.e2e_mean"] > 2 * rows["rag.e2e_mean"]  # thirty tokens against seven
    whole = metrics.rung_metrics(found, rung)
    assert rows["rag.e2e_mean"] < whole["e2e_mean"] < rows["chat.e2e_mean"]


def test_a_class_can_be_sessions_beside_single_requests() -> None:
    sessions = Sessions(turns=3, think=1.0, system_prompt_tokens=40)
    found = run(mix(0.5, 0.5, sessions=sessions), Load(rate=[2.0], seconds=100)).requests
    chat = found[found["class"] == "chat"]["prompt_tokens"]
    begun = int(((chat >= 50) & (chat <= 60)).sum())  # first turns: the system prompt and 10 to 20 tokens
    longest = int((chat >= 130).sum())  # third turns: two answers of 30 and three prompts
    assert begun > 50
    assert 0.8 * begun < longest <= begun
    assert set(found[found["class"] == "rag"]["prompt_tokens"]) == {500}


DAY = [0.0] * 8 + [2.0] * 4 + [0.5] * 12


def test_a_profile_keeps_the_rate_of_every_hour() -> None:
    found = run(Workload(prompt_tokens=10, output_tokens=2), Load(profile=Profile(requests_per_second=DAY)))
    hours = np.bincount((found.requests["scheduled"] // 3600).astype(int), minlength=24)
    assert hours[:8].sum() == 0
    assert (np.abs(hours[8:] - 3600 * np.array(DAY[8:])) < 4.5 * np.sqrt(3600 * np.array(DAY[8:]))).all()


def test_a_profile_of_constant_gaps_by_hand() -> None:
    """Two a second in hour 8 from arrival 1 on, then one in two seconds: arrival k at the time of k expected ones."""
    short = Profile(requests_per_second=DAY, seconds=10.0)
    given = Load(profile=short, arrivals="constant", settle=0.0)
    sent = run(Workload(prompt_tokens=10, output_tokens=2), given).requests["scheduled"].to_numpy()
    assert sent[:3] == pytest.approx([80.5, 81.0, 81.5])
    assert np.diff(sent)[90:100] == pytest.approx(2.0)
    assert len(sent) == 4 * 20 + 12 * 5 - 1  # the last would come at the very end


def test_twice_the_profile_is_the_same_arrivals_on_a_clock_twice_as_fast() -> None:
    one, two = (Profile(requests_per_second=[f * x for x in DAY], seconds=600 / f) for f in (1, 2))
    work = Workload(prompt_tokens=10, output_tokens=2)
    first, second = (run(work, Load(profile=p, settle=0.0)).requests["scheduled"].to_numpy() for p in (one, two))
    assert second == pytest.approx(first / 2)


def test_a_window_of_a_trace_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("time,prompt_tokens,output_tokens\n" + "".join(f"{10 * k},{k + 1},5\n" for k in range(10)))
    found = read_lengths(Workload(trace=RequestFile(file=str(path), window=(25.0, 60.0), scale=2.0)))
    assert found is not None
    assert sorted(set(found.prompt_tokens.tolist())) == [4, 5, 6]
    assert len(found.prompt_tokens) == 6
    with pytest.raises(BadInput, match="window"):
        read_lengths(Workload(trace=RequestFile(file=str(path), window=(200.0, 300.0))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{classes: [{name: a, share: 1, prompt_tokens: 5}]}", "output_tokens: missing"),
        ("{classes: [{name: a, share: 1, prompt_tokens: 5, output_tokens: 5, slo: {itl_p95: 1}}]}", "unknown metric"),
        ("{classes: [{name: a, share: 1, trace: x.csv}]}", "expected none"),
        ("{classes: [{name: a, share: 0, prompt_tokens: 5, output_tokens: 5}]}", "more than 0"),
        ("{prompt_tokens: 5, classes: [{name: a, share: 1, prompt_tokens: 5, output_tokens: 5}]}", "in each"),
    ],
)
def test_what_is_no_mix_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(f"name: s\ncalibration: s.yaml\nload: {{users: [1]}}\nworkload: {text}\n")
    with pytest.raises(BadInput, match=message) as e:
        load(tmp_path / "s.yaml")
    assert e.value.line == 4


def test_a_profile_has_24_hours(tmp_path: Path) -> None:
    load_of = "{profile: {requests_per_second: [1, 2]}}"
    (tmp_path / "s.yaml").write_text(f"name: s\nload: {load_of}\nworkload: {{prompt_tokens: 5, output_tokens: 5}}\n")
    with pytest.raises(BadInput, match="24 rates, one for each hour, found 2 rates"):
        load(tmp_path / "s.yaml")
