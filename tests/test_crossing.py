"""Up to which load the SLOs are kept: simulate and report say the same, and no grid point is an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from scenarios.cli.main import status
from scenarios.forecast.slo import crossing
from sim.model.calibration import Calibration, Parameter, Source

SCENARIO = """\
name: grid
server: {max_batch_prefill_tokens: 2048, max_batch_total_tokens: 40000, max_input_length: 1000, max_total_tokens: 2000}
workload: {prompt_tokens: 100, output_tokens: 40}
load: {users: [1, 10, 60], spawn_rate: 20, seconds: 15}
calibration: machine.json
price: {usd_per_hour: 36}
slo: {e2e_p95: 2.0}
"""


@pytest.fixture
def simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Simulate the scenario with some `--set`s: the crossing that --json says, and what the text says."""
    rng = np.random.default_rng(1)
    known = {"a0": 0.01, "a1": 1e-4, "b0": 0.02, "b1": 1e-3}
    made = Calibration(
        source=Source(kind="assumed"),
        model="affine",
        parameters={n: Parameter(value=v, stderr=v / 20, low=0.9 * v, high=1.1 * v) for n, v in known.items()},
        draws={n: (v * rng.lognormal(0, 0.03, 50)).tolist() for n, v in known.items()},
    )
    (tmp_path / "machine.json").write_bytes(msgspec.json.encode(made))
    (tmp_path / "grid.yaml").write_text(SCENARIO)

    def found_by(*sets: str) -> tuple[dict[str, Any], str]:
        options = [word for text in sets for word in ("--set", text)]
        asked = ["simulate", str(tmp_path / "grid.yaml"), "--replicates", "19", "--jobs", "1", *options]
        assert status([*asked, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["crossing"]
        assert status(asked) == 0
        load = found.pop("load")
        found["crossing"] = None if load["value"] is None else load
        return found, " ".join(capsys.readouterr().out.split())

    return found_by


def test_a_crossing_between_grid_points_is_the_same_in_report_and_knee(simulated, tmp_path: Path, capsys) -> None:
    """20 + 39 · (20 + n) ms and the others' prefills: 2 s are reached between 10 and 60 users."""
    row, text = simulated()
    assert (row["kept_at"], row["broken_at"]) == (10, 60)
    assert 12 < row["crossing"]["low"] < row["crossing"]["value"] < row["crossing"]["high"] < 40
    assert (
        "E2E p95 ≤ 2 s is kept at 10 users with a probability of at least 90%, broken at 60 users, crossing at about"
        in text
    )
    quick = ["--replicates", "19", "--jobs", "1"]
    assert status(["simulate", str(tmp_path / "grid.yaml"), *quick, "-o", str(tmp_path / "out")]) == 0
    forecast = json.loads((tmp_path / "out" / "grid" / "forecast.json").read_text())
    assert forecast["knee"]["load"] == row["crossing"] == forecast["crossing"]["load"]
    sentence = "crossing at about" + text.partition("crossing at about")[2].partition(")")[0]
    assert sentence in " ".join(capsys.readouterr().out.split())
    assert status(["report", str(tmp_path / "out" / "grid"), "-o", str(tmp_path / "page.html")]) == 0
    assert sentence in " ".join((tmp_path / "page.html").read_text().split())


def test_kept_on_the_whole_ladder_there_is_no_crossing(simulated) -> None:
    row, text = simulated("slo.e2e_p95=100")
    assert (row["kept_at"], row["broken_at"], row["crossing"]) == (60, None, None)
    assert "E2E p95 ≤ 100 s is kept up to 60 users, the top of this ladder" in text


def test_kept_nowhere_it_is_broken_at_the_first_rung(simulated) -> None:
    row, text = simulated("slo.e2e_p95=0.5")
    assert (row["kept_at"], row["broken_at"], row["crossing"]) == (None, 1, None)
    assert "No load keeps E2E p95 ≤ 0.5 s with a probability of at least 90%; broken at 1 user" in text


def test_of_several_slos_the_one_that_is_broken_first_binds(simulated) -> None:
    alone, _ = simulated()
    tight, text = simulated("slo.tpot_p95=0.035", "slo.e2e_p95=4")
    assert tight["breaks"] == "tpot_p95" and ", TPOT p95 first" in text
    assert 10 < tight["crossing"]["value"] < 60
    loose, _ = simulated("slo.tpot_p95=0.5")
    assert loose["breaks"] == "e2e_p95" and loose["crossing"] == alone["crossing"]


def test_an_error_rate_can_bind(simulated) -> None:
    """Of 60 users 20 find all permits taken, and ask again five times a second."""
    row, _ = simulated("slo={error_rate: 0.01, e2e_p95: 100}", "server.max_concurrent_requests=40")
    assert (row["kept_at"], row["broken_at"], row["breaks"]) == (10, 60, "error_rate")
    assert 10 < row["crossing"]["value"] < 60


def test_an_open_loop_without_a_steady_state_keeps_nothing(simulated) -> None:
    """Half a minute of overload shows no answer over 100 s yet; nor will it keep that for ever."""
    one = ("server.max_batch_total_tokens=2048", "workload.max_new_tokens=1900", "slo.e2e_p95=100")
    row, _ = simulated("load.rate=[0.2, 5]", "load.seconds=30", "load.settle=10", *one)
    assert (row["kept_at"], row["broken_at"]) == (0.2, 5)
    assert row["crossing"]["value"] == 5


def test_a_metric_that_comes_back_under_its_limit_counts_as_broken_where_it_first_is() -> None:
    ladder = {"rung": [0, 1, 2, 3], "load": [1.0, 2.0, 4.0, 8.0], "rps": [1.0, 2.0, 3.0, 4.0]}
    tables = [pd.DataFrame(ladder | {"e2e_p95": [1.0, 3.0, 1.5, 5.0]}) for _ in range(20)]
    found = crossing({"e2e_p95": 2.0}, tables, [])
    assert found is not None
    assert (found.kept_at, found.broken_at, found.load.value) == (1.0, 2.0, 1.5)
