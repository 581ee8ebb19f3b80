"""Rates and cost of a forecast are of the long run: laws that hold exactly, whatever a window happens to catch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from scenarios.cli.main import status
from sim.model.calibration import Calibration, Clocks, Delay, Parameter, Source

TURNAROUND = 0.25
FIXED = """\
name: fixed
server: {max_batch_prefill_tokens: 2048, max_batch_total_tokens: 4000, max_input_length: 1000, max_total_tokens: 2000}
workload: {prompt_tokens: 100, output_tokens: 41}
load: {users: [1, 2, 5], think: 1.75, spawn_rate: 5, seconds: 20}
calibration: machine.json
price: {usd_per_hour: 36}
slo: {e2e_p95: 2.0}
"""


def machine(path: Path, spread: float = 0.05, **values: float) -> None:
    """A machine known to 5 %, whose clients take a quarter of a second to turn round."""
    rng = np.random.default_rng(1)
    known = {"a0": 0.05, "a1": 5e-4, "b0": 0.02, "b1": 1e-3} | values
    made = Calibration(
        source=Source(kind="assumed"),
        model="affine",
        parameters={n: Parameter(value=v, stderr=v / 20, low=0.9 * v, high=1.1 * v) for n, v in known.items()},
        draws={n: (v * rng.lognormal(0, spread, 50)).tolist() for n, v in known.items()},
        clocks=Clocks(turnaround=Delay(quantiles=[TURNAROUND])),
    )
    path.write_bytes(msgspec.json.encode(made))


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Forecast the scenario with some `--set`s: {(metric, load): (value, low, high)}, and the forecast itself."""
    machine(tmp_path / "machine.json")
    (tmp_path / "fixed.yaml").write_text(FIXED)

    def forecast(*sets: str) -> tuple[dict[tuple[str, float], tuple[float, float, float]], dict[str, Any]]:
        options = [word for text in sets for word in ("--set", text)]
        asked = ["simulate", str(tmp_path / "fixed.yaml"), "--replicates", "19", "--jobs", "1", "--json", *options]
        assert status(asked) == 0
        found = json.loads(capsys.readouterr().out)
        rows = {(r["metric"], r["users"] or r["rate"]): (r["value"], r["low"], r["high"]) for r in found["curves"]}
        return rows, found

    return forecast


@pytest.mark.parametrize("seconds", [20, 23.7, 7.3])
@pytest.mark.parametrize("think", [0, 1.75])
def test_a_lone_user_makes_one_request_every_cycle(ask, seconds: float, think: float) -> None:
    rows, _ = ask("load.users=[1]", f"load.seconds={seconds}", f"load.think={think}")
    for end in range(3):  # value, and the ends of the band, which swap: the slowest draw makes the fewest requests
        e2e = rows["e2e_mean", 1][end]
        rps = rows["rps", 1][(0, 2, 1)[end]]
        assert rps * (e2e + think + TURNAROUND) == pytest.approx(1.0, rel=1e-9)
        assert rows["output_tokens_per_s", 1][end] == pytest.approx(41 * rows["rps", 1][end], rel=1e-9)
        assert rows["input_tokens_per_s", 1][end] == pytest.approx(100 * rows["rps", 1][end], rel=1e-9)
    value, low, high = rows["rps", 1]
    assert low < 0.99 * value and 1.01 * value < high  # what is not known of the machine, not how many ends fitted in


def test_a_window_shorter_than_an_answer_has_rates(ask) -> None:
    long, _ = ask("load.users=[1]", "load.think=0")
    short, _ = ask("load.users=[1]", "load.think=0", "load.seconds=0.5")  # an answer takes 1 s
    assert short["rps", 1] == pytest.approx(long["rps", 1], rel=1e-6)


def test_users_in_lock_step_and_others_are_x_times_r_plus_z(ask) -> None:
    """N = X (R + Z) at every load, with the mean E2E that the same forecast quotes."""
    for think in (0, 1.75):
        rows, _ = ask(f"load.think={think}", "load.seconds=6.5")
        for users in (1, 2, 5):
            cycle = rows["e2e_mean", users][0] + think + TURNAROUND
            assert rows["rps", users][0] * cycle == pytest.approx(users, rel=1e-3)
    lengths = "workload.output_tokens={uniform: [1, 80]}"
    rows, _ = ask(lengths, "load.seconds=60")
    for users in (1, 2, 5):
        cycle = rows["e2e_mean", users][0] + 1.75 + TURNAROUND
        assert rows["rps", users][0] * cycle == pytest.approx(users, rel=0.005)


def test_an_open_loop_with_a_steady_state_answers_what_is_offered(ask) -> None:
    rows, found = ask("load.rate=[0.5, 1.5]", "load.seconds=60", "load.settle=10")
    for rate in (0.5, 1.5):
        assert rows["rps", rate] == pytest.approx((rate,) * 3, rel=1e-9)
        assert rows["output_tokens_per_s", rate] == pytest.approx((41 * rate,) * 3, rel=1e-9)
    usd = {row["at"]: row["per_1000_requests"] for row in found["cost"]}
    assert usd["0.5 requests/s"]["value"] == pytest.approx(36 / 3600 * 1000 / 0.5)


def test_an_open_loop_without_one_does_what_it_can(ask) -> None:
    """One at a time: 0.1 s of prefill and 40 steps of 0.021 s, so 1.06 requests/s of the 3 that come."""
    one = ["server.max_batch_total_tokens=2048", "workload.max_new_tokens=1900", "workload.prompt_tokens=100"]
    rows, _ = ask("load.rate=[3]", "load.seconds=60", "load.settle=10", *one)
    assert rows["rps", 3][0] == pytest.approx(1 / (0.1 + 40 * 0.021), rel=0.02)


def test_cost_is_of_the_long_run(ask) -> None:
    rows, found = ask("load.users=[1]", "load.seconds=7.3")
    usd = {row["at"]: row for row in found["cost"]}["1 user"]
    assert usd["per_1000_requests"]["value"] == pytest.approx(36 / 3600 * 1000 / rows["rps", 1][0])
    assert usd["usd_per_month"] == pytest.approx(730 * 36)
    assert usd["usd_per_year"] == pytest.approx(8760 * 36)


def test_cost_by_the_month_and_the_year_is_said_beside_the_hour(tmp_path: Path, capsys) -> None:
    machine(tmp_path / "machine.json")
    (tmp_path / "fixed.yaml").write_text(FIXED)
    quick = ["--replicates", "19", "--jobs", "1", "--set", "load.users=[1,2]", "--set", "load.seconds=5"]
    scenario = str(tmp_path / "fixed.yaml")
    assert status(["simulate", scenario, *quick]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "$36.00 an hour ($26,280 a month of 730 h, $315,360 a year)" in printed
    assert status(["simulate", scenario, *quick, "-o", str(tmp_path / "out")]) == 0
    assert status(["report", str(tmp_path / "out" / "fixed"), "-o", str(tmp_path / "report.html")]) == 0
    assert "$26,280 a month" in (tmp_path / "report.html").read_text()


def test_a_run_and_a_forecast_are_compared_by_the_same_estimator(tmp_path: Path, capsys) -> None:
    """The run's window of 7.3 s holds 7 ends of 1 s where the long run has 7.3: by counts they would be 4 % apart."""
    machine(tmp_path / "machine.json", spread=1e-9)
    (tmp_path / "fixed.yaml").write_text(FIXED)
    sets = ["--set", "load.users=[1]", "--set", "load.seconds=7.3", "--replicates", "19", "--jobs", "1"]
    assert status(["simulate", str(tmp_path / "fixed.yaml"), *sets, "-o", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    made = tmp_path / "out" / "fixed"
    assert status(["compare", str(made / "run"), str(made / "forecast.json"), "--json"]) == 0
    rows = {row["metric"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    for metric in ("rps", "input_tokens_per_s", "output_tokens_per_s", "goodput"):
        assert rows[metric]["relative_error"] == pytest.approx(0.0, abs=1e-6), metric


def test_tpot_p95_and_p99_are_metrics(ask, tmp_path: Path, capsys) -> None:
    """Lone answers of 2 tokens have one gap each, so that TPOT is it; all are equal, and every quantile is the mean."""
    rows, _ = ask("load.users=[1]", "workload.output_tokens=2")
    for which in ("p50", "p95", "p99"):
        assert rows[f"tpot_{which}", 1] == pytest.approx(rows["tpot_mean", 1], rel=1e-9)
    mixed, _ = ask("load.users=[5]", "workload.output_tokens={uniform: [2, 60]}", "load.think=0")
    p50, p95, p99 = (mixed[f"tpot_{which}", 5][0] for which in ("p50", "p95", "p99"))
    assert p50 < p95 <= p99
    scenario = str(tmp_path / "fixed.yaml")
    quick = ["--replicates", "19", "--jobs", "1", "--set", "load.users=[1,2]", "--set", "load.seconds=5"]
    asked = [*quick, "--set", "slo={tpot_p95: 0.05, tpot_p99: 0.05}", "--set", "tolerances={tpot_p95: 0.1}"]
    assert status(["simulate", scenario, *asked, "--json"]) == 0
    assert {p["metric"] for p in json.loads(capsys.readouterr().out)["slo"]} == {"e2e_p95", "tpot_p95", "tpot_p99"}
    assert status(["simulate", scenario, *asked, "-o", str(tmp_path / "out")]) == 0
    assert "TPOT p95, ms" in capsys.readouterr().out
    run = str(tmp_path / "out" / "fixed" / "run")
    assert status(["compare", run, run, "--tolerance", "tpot_p99=0.1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["summary"]["tpot_p95"]["mape"] == 0.0 and found["pass"]
