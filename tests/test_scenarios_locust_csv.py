"""Locust's own CSVs: rows agree with its sums, a history is figures, levels without a window say so."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from test_scenarios_importers import SAMPLES, saved
from warned import texts

from scenarios.importers.detect import import_results
from sim.results.metrics import table
from sim.run import Run


def test_rows_of_locust_agree_with_its_own_sums() -> None:
    run = import_results(SAMPLES / "locust-rows.csv")
    with (SAMPLES / "locust_stats.csv").open() as f:
        stated = next(row for row in csv.DictReader(f) if row["Name"] == "Aggregated")
    latency = (run.requests["ended"] - run.requests["sent"]) * 1e3
    assert len(run.requests) == int(stated["Request Count"])
    assert (run.requests["status"] == "validation").sum() == int(stated["Failure Count"]) > 0
    assert latency.mean() == pytest.approx(float(stated["Average Response Time"]), abs=0.5)  # whole milliseconds
    assert latency.max() == pytest.approx(float(stated["Max Response Time"]), abs=0.5)
    found = table(run)
    assert found["load"].tolist() == [1, 2, 4]
    assert found["in_flight"].tolist() == pytest.approx([1, 2, 4], rel=0.06)  # those alive at the end left no row
    assert sorted(set(run.requests.loc[run.requests["rung"] == 0, "user"])) == [0]
    for i, rung in enumerate(run.rungs):  # settled once every user has finished a request begun here
        mine = run.requests[run.requests["rung"] == i]
        assert (mine["ended"] <= rung.settled + 1e-6).sum() == rung.users
    assert found["completions"].iloc[-1] == (run.requests["ended"] >= run.rungs[-1].settled).sum()
    assert run.segments == [{"start": 0.0, "first_rung": 0}]  # users were added to those already running
    assert any("no tokens" in warning for warning in texts(run.warnings))


def test_a_level_of_locust_that_not_every_user_finished_has_no_window(tmp_path: Path) -> None:
    title, *rows = (SAMPLES / "locust-rows.csv").read_text().splitlines()
    at = title.split(",").index("allThreads")
    kept, fours = [], 0
    for row in rows:
        fours += row.split(",")[at] == "4"
        if row.split(",")[at] != "4" or fours <= 3:
            kept.append(row)
    run = import_results(saved(tmp_path, "\n".join([title, *kept]), "rows.csv"))
    assert table(run)["load"].tolist() == [1, 2]
    assert any(
        "not every one of 4 users finished a request here" in warning for warning in texts(run.rungs[-1].warnings)
    )


def test_a_history_of_locust_is_figures_and_no_requests() -> None:
    run = import_results(SAMPLES / "locust_stats_history.csv")
    assert len(run.requests) == 0
    assert table(run).empty
    assert any("no requests" in warning for warning in texts(run.warnings))
    figures = {(figure.metric, figure.users): figure for figure in run.scenario.published}
    rows = table(import_results(SAMPLES / "locust-rows.csv"))
    assert run.scenario.load.users == rows["load"].tolist()
    for row in rows.to_dict("records"):
        users = int(row["load"])
        rps = figures["rps", users]
        assert abs(rps.value - row["rps"]) <= rps.rounding
        assert figures["e2e_mean", users].value == pytest.approx(row["e2e_mean"], rel=0.1)


def test_commas_in_a_failure_of_locust_move_nothing(tmp_path: Path) -> None:
    rows = (SAMPLES / "locust-rows.csv").read_text()
    path = saved(tmp_path, rows.replace(": code=400", ": code=400, because, well"), "rows.csv")
    run: Run = import_results(path)
    (failed,) = run.requests[run.requests["status"] != "ok"].to_dict("records")
    assert failed["error"].endswith("code=400, because, well")
    assert table(run)["load"].tolist() == [1, 2, 4]
