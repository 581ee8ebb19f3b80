"""The shipped scenarios that ask for a plan, each answered from few draws and short windows; laws of the answers."""

from __future__ import annotations

import pytest

from scenarios.load.options import load_options
from scenarios.load.parameters import calibration_of
from scenarios.load.scenario import load, shipped
from scenarios.plan import plan, traffic, trial
from scenarios.plan.answer import Plan
from scenarios.plan.ask import plans_of
from scenarios.plan.trials import Setting, Trials
from sim.model.files.lengths import read_lengths

# Smaller loads and days, and few replicas to choose from.
SMALLER = {
    "llama2-70b-twice": ["slo.e2e_p95=17"],
    "llama2-70b-mix": ["load.rate=[1]", "fleet.replicas={low: 2, high: 3}"],
    "llama2-70b-chat-fleet": ["load.users=[16]", "fleet.replicas=1"],
    "llama2-70b-noon": [
        "load.profile.seconds=60",
        "slo.error_rate=0.2",  # of the few requests of such an hour
        "fleet.outages=[{replica: 0, at: 720, seconds: 30}]",
        "fleet.replicas={low: 3, high: 5}",
    ],
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "FEWEST", 100)  # requests of a window: fast, not precise
    monkeypatch.setattr(trial, "LARGEST", 100)
    monkeypatch.setattr(traffic, "SPAN", traffic.STEP)
    monkeypatch.setattr(plan, "MOST", 32)  # draws of a test: 24 that pass decide
    monkeypatch.setattr(plan._Work, "_sensitivity", lambda *args: [])  # most of the simulations; tests/test_plan.py


def planned(name: str) -> Plan:
    (found,) = plans_of([name], SMALLER[name], draws=8)
    assert found.met, found
    return found


def test_every_shipped_goal_is_planned_here() -> None:
    assert {name for name in shipped() if load(name).goal is not None} == set(SMALLER)


def test_twice_the_articles_traffic_takes_more_than_two_of_its_machines(short: None) -> None:
    found = planned("llama2-70b-twice")
    assert found.load == 2 * 1.1
    assert found.chosen.replicas.value >= 3
    assert found.fewer is not None and found.fewer.value < found.goal


def test_each_class_of_a_mix_has_its_own_slos(short: None) -> None:
    found = planned("llama2-70b-mix")
    assert list(found.slo) == ["chat.ttft_p95", "chat.tpot_p95", "rag.ttft_p95", "rag.e2e_p95"]
    every = found.chosen.probability
    assert every["all"].value <= min(every[name].value for name in found.slo)


def test_the_prefix_cache_shortens_the_time_to_the_first_token(short: None) -> None:
    cached, plain = planned("llama2-70b-chat-fleet").options
    assert cached.flags == {} and plain.flags == {"enable_prefix_caching": False}
    assert cached.metrics["ttft_p95"].value < plain.metrics["ttft_p95"].value


def test_a_replica_lost_at_noon_takes_one_more(short: None) -> None:
    found = planned("llama2-70b-noon")
    n = found.chosen.replicas.value
    assert found.fewer is not None and found.fewer.value < found.goal
    assert [period.start for period in found.chosen.periods] == pytest.approx([3600 * hour for hour in range(24)])
    (option,) = load_options("llama2-70b-noon", *SMALLER["llama2-70b-noon"], "fleet.outages=[]")
    trials = Trials({option.name: calibration_of("llama2-70b-noon", option.scenario)}, 0, 3600.0)
    (without,) = trials.run([(Setting(option, n - 1, tuple(found.slo.items())), 0)])
    assert without.keeps
    assert len(without.periods) == 24  # an hour is a period, though 60 s of it are simulated
    worst = max(without.periods.values(), key=lambda row: row["e2e_p95"])
    assert without.metrics["e2e_p95"] == worst["e2e_p95"]


def test_traffic_with_outages_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their times are of the whole traffic."""
    monkeypatch.setattr(traffic, "MOST", 1000)
    scenario = load("llama2-70b-noon", "fleet.replicas=2")
    assert traffic.representative(scenario, read_lengths(scenario.workload), 3600.0) == (scenario, None, None)
    scenario = load("llama2-70b-noon", "fleet.replicas=2", "fleet.outages=[]")
    assert traffic.representative(scenario, None, 3600.0)[2] is not None
