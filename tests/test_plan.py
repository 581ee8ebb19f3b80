"""Plans: the sequential test's error rates, the search, costs by hand, and one plan from end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from scenarios.cli.main import status
from scenarios.load.options import load_options
from scenarios.plan import traffic, trial
from scenarios.plan.answer import read_plan
from scenarios.plan.plan import usd_per_hour
from scenarios.plan.search import Found, first_place
from scenarios.plan.sequential import BATCH, MOST, SequentialTest
from scenarios.plan.trials import Setting, Trials
from sim.model.calibration import Calibration, Parameter, Source
from sim.model.errors import BadInput
from sim.model.files.lengths import read_lengths

SCENARIO = """\
name: shop
server: {max_batch_prefill_tokens: 2048, max_batch_total_tokens: 40000, max_input_length: 1000, max_total_tokens: 2000}
workload: {prompt_tokens: 100, output_tokens: {uniform: [20, 60]}}
load: {rate: [16], settle: 5}
calibration: machine.json
machine: {gpu: A100, gpus: 4}
price: {usd_per_hour: 10}
slo: {e2e_p95: 3}
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    known = {"a0": 0.01, "a1": 1e-4, "b0": 0.02, "b1": 1e-3}
    made = Calibration(
        source=Source(kind="assumed"),
        model="affine",
        parameters={n: Parameter(value=v, stderr=v / 20, low=0.9 * v, high=1.1 * v) for n, v in known.items()},
        draws={n: (v * rng.lognormal(0, 0.05, 50)).tolist() for n, v in known.items()},
    )
    (tmp_path / "machine.json").write_bytes(msgspec.json.encode(made))
    (tmp_path / "shop.yaml").write_text(SCENARIO)
    return tmp_path / "shop.yaml"


def decided(p: float, goal: float, rng: np.random.Generator) -> SequentialTest:
    test = SequentialTest(goal)
    while not test.over:
        test = test.after(int(rng.binomial(BATCH, p)), BATCH)
    return test


@pytest.mark.parametrize(("p", "truth"), [(18 / 19, True), (4.5 / 5.5, False), (0.99, True), (0.3, False)])
def test_the_sequential_test_errs_as_often_as_it_says(p: float, truth: bool) -> None:
    """At the two hypotheses of a goal of 90 % (odds of 18 and of 4.5), and farther out."""
    rng = np.random.default_rng(7)
    wrong = np.mean([decided(p, 0.9, rng).decision is not truth for _ in range(2000)])
    assert wrong < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)
    assert wrong > 0.005 or p in (0.99, 0.3)  # and it does not simulate much longer than it has to


def test_clear_shares_are_decided_after_few_draws() -> None:
    rng = np.random.default_rng(3)
    assert np.mean([decided(0.2, 0.9, rng).draws for _ in range(200)]) < 1.1 * BATCH
    assert np.mean([decided(0.999, 0.9, rng).draws for _ in range(200)]) < 27
    assert decided(0.9, 0.9, rng).draws <= MOST


def found_by(search: Generator[Any, Any, Found], keeps: Callable[[int, int], bool]) -> tuple[Found, int]:
    """What a search finds where `keeps(place, draw)`, and how many draws it took."""
    asked, total = next(search), 0
    while True:
        total += len(asked)
        try:
            asked = search.send([keeps(*one) for one in asked])
        except StopIteration as e:
            return e.value, total


@pytest.mark.parametrize("first", [1, 2, 7, 15, 16])
@pytest.mark.parametrize("guess", [None, 1, 9, 16])
def test_the_search_finds_the_first_place_and_verifies_it_and_the_one_before(first: int, guess: int | None) -> None:
    found, total = found_by(first_place(1, 16, 0.9, range(1, 257), guess), lambda place, draw: place >= first)
    assert found.place == first
    assert found.tests[first].decision
    assert first == 1 or found.tests[first - 1].decision is False
    assert total < 16 * 3 * BATCH


def test_a_search_without_a_place_says_so() -> None:
    found, _ = found_by(first_place(1, 4, 0.9, range(1, 257)), lambda place, draw: False)
    assert found.place is None
    assert found.tests[4].decision is False


def test_costs_by_hand(shop: Path) -> None:
    (alone,) = load_options(shop)
    assert (alone.low, alone.high) == (1, 32)
    assert usd_per_hour(alone.scenario, 3) == 30
    price = "price={usd_per_hour: 10, per: node, replicas_per_node: 2}"
    (node,) = load_options(shop, price)
    assert [usd_per_hour(node.scenario, n) for n in (1, 2, 3)] == [10, 10, 20]


def test_options_are_laid_over_the_scenario_and_lists_are_tried_one_by_one(shop: Path) -> None:
    more = "options:\n  - {name: a, server: {max_waiting_tokens: [10, 20]}}\n  - {name: b, price: {usd_per_hour: 5}}\n"
    shop.write_text(SCENARIO + more + "fleet: {replicas: {low: 2, high: 4}}\n")
    found = load_options(shop)
    assert [o.name for o in found] == ["a, max_waiting_tokens 10", "a, max_waiting_tokens 20", "b"]
    assert [(o.low, o.high) for o in found] == [(2, 4)] * 3
    assert found[1].flags == {"max_waiting_tokens": 20}
    assert found[2].scenario.price is not None and found[2].scenario.price.usd_per_hour == 5
    shop.write_text(SCENARIO + "options:\n  - {name: a, server: {max_seqs: 3}}\n")
    with pytest.raises(BadInput, match=r"shop.yaml:10: server.max_seqs: unknown key"):
        load_options(shop)
    shop.write_text(SCENARIO + "options:\n  - {name: a, transfer: {}}\n")
    with pytest.raises(BadInput, match="not transferred to other hardware yet"):
        load_options(shop)


def test_more_replicas_keep_more_draws_and_nothing_is_simulated_twice(shop: Path) -> None:
    """Common random numbers: what a draw keeps with n replicas it keeps with n + 1; less load likewise."""
    (option,) = load_options(shop)
    made = msgspec.json.decode((shop.parent / "machine.json").read_bytes(), type=Calibration)
    trials = Trials({option.name: made}, 0, 3600.0)
    draws = range(1, 7)
    kept = []
    for replicas in (1, 2, 3):
        setting = Setting(option, replicas, (("e2e_p95", 3.0),))
        kept.append([outcome.keeps for outcome in trials.run([(setting, draw) for draw in draws])])
    assert sum(kept[0]) < sum(kept[2])
    assert all(few <= more for one, two in pairwise(kept) for few, more in zip(one, two, strict=True))
    before = trials.simulated
    assert before == 3 * 6
    again = option._replace(scenario=msgspec.structs.replace(option.scenario, description="another", price=None))
    trials.run([(Setting(again, 2, (("e2e_p95", 3.0),)), draw) for draw in draws])
    assert trials.simulated == before


def test_a_plan_from_end_to_end(
    shop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "FEWEST", 100)  # requests of a window: fast, not precise
    monkeypatch.setattr(trial, "LARGEST", 200)
    monkeypatch.setattr(traffic, "SPAN", 8.0)
    quick = ["--replicates", "19", "--jobs", "1"]
    asked = ["plan", str(shop), *quick, "-o", str(shop.parent)]
    assert status([*asked, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    (option,) = row["options"]
    n = option["replicas"]["value"]
    assert row["best"] == "shop" and 1 < n < 16
    assert option["usd_per_hour"] == 10 * n and option["usd_per_month"] == 7300 * n
    assert option["per_1000_requests"]["value"] == pytest.approx(10 * n / 3.6 / 16, rel=0.02)
    tried = {each["replicas"]: each["decision"] for each in option["tried"]}
    assert tried[n] is True and tried[n - 1] is False
    assert row["kept_at"] >= 16 and row["broken_at"] > row["kept_at"]
    assert row["fewer"]["value"] < 0.9 <= option["probability"]["all"]["value"] + 0.1
    effects = [each["effect"] for each in row["sensitivity"] if each["effect"] is not None]
    assert effects == sorted(effects, key=abs, reverse=True)
    plan = read_plan(shop.parent / "shop.plan.json")
    assert plan.chosen.replicas.value == n
    assert (
        status(["plan", str(shop), *quick, "--set", "slo.e2e_p95=0.2", "--set", "fleet.replicas={low: 1, high: 2}"])
        == 1
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "No option reaches the goal of 90% at 16 requests/s. The nearest is" in said
    assert status(["plan", str(shop), *quick, "--max-load", "--set", "fleet.replicas=1"]) == 0
    assert "1 × 4×A100 bears up to" in " ".join(capsys.readouterr().out.split())


def test_a_plan_needs_an_slo(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["plan", str(shop), "--set", "slo="]) == 2
    assert "a plan needs an SLO to meet" in capsys.readouterr().err


def test_a_long_day_and_a_long_trace_are_cut_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "MOST", 100)
    rows = [(3600 * hour + k, 10 + hour, 5) for hour, many in enumerate((29, 60, 5, 30)) for k in range(many)]
    text = "time,prompt_tokens,output_tokens\n" + "".join(f"{t},{p},{o}\n" for t, p, o in rows)
    (tmp_path / "trace.csv").write_text(text)
    (tmp_path / "s.yaml").write_text("name: s\nworkload: {trace: trace.csv}\nload: {trace: true}\n")
    (option,) = load_options(tmp_path / "s.yaml")
    _, cut, words = traffic.representative(option.scenario, read_lengths(option.scenario.workload), 3600.0)
    assert words == "2 of 4 periods of 3600 s are simulated, the busiest"
    assert cut is not None and cut.times is not None
    assert cut.prompt_tokens.tolist() == [11] * 60 + [13] * 30  # the hour with the most, and that with the longest
    assert cut.times[60] == pytest.approx(3600.0)
    day = "load={profile: {requests_per_second: [" + ", ".join(["2"] * 24) + "], days: 2}}"
    (option,) = load_options(tmp_path / "s.yaml", day, "workload={prompt_tokens: 5, output_tokens: 5}")
    scenario, _, words = traffic.representative(option.scenario, None, 3600.0)
    assert scenario.load.profile is not None and scenario.load.profile.days == 1
    assert scenario.load.profile.requests_per_second == [2.0] * 24
    assert words is not None and "300 s of every hour" in words


def test_a_day_has_the_worst_latency_of_its_periods_and_their_mean_rate():
    assert (
        trial._whole("e2e_p95", [1.0, 3.0], [60.0, 60.0])
        == trial._whole("chat.ttft_p95", [1.0, 3.0], [60.0, 60.0])
        == 3.0
    )
    assert math.isnan(trial._whole("e2e_p95", [1.0, math.nan], [60.0, 60.0]))  # a period of requests and no answers
    assert trial._whole("rps", [1.0, 3.0], [60.0, 20.0]) == 1.5


def test_a_file_that_is_no_plan_is_refused_before_anything_is_simulated(
    shop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Trials, "run", lambda *_: pytest.fail("simulated"))
    file = shop.parent / "shop.plan.json"
    file.write_text('{"mine": 1}')
    assert status(["plan", str(shop), "-o", str(shop.parent), "--jobs", "1"]) == 2
    assert "shop.plan.json: exists and is no plan that servecast wrote" in capsys.readouterr().err
    assert file.read_text() == '{"mine": 1}'
