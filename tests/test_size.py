"""What cannot run is refused before anything starts, with the estimate; what can is not."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import pytest

from scenarios import progress
from scenarios.cli.main import status
from scenarios.forecast.size import check_size
from scenarios.load.scenario import load
from sim.model.calibration import read_calibration
from sim.run import read_run

TOO_LARGE = {
    "users": (["load.users=[1,1000000000]"], [], "standin: load.users: expected a simulation that can run here: 1,000"),
    "a window of 10^12 s": (
        ["load.seconds=1e12"],
        [],
        "standin: load.seconds: expected a simulation that can run here",
    ),
    "a rate of 10^9": (["load.rate=[1e9]"], [], "standin: load.rate: expected a simulation that can run here"),
    "replicates": ([], ["--replicates", "1000000000"], "--replicates: expected a simulation that can run here"),
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_what_cannot_run_is_refused_with_the_estimate(what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    sets, options, said = TOO_LARGE[what]
    changes = [word for change in sets for word in ("--set", change)]
    assert status(["simulate", "standin", *changes, *options, "--jobs", "1", "-o", str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("servecast: ")]
    assert said in line and "GB of memory (this machine has" in line, line
    assert not out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("load.think=1e18", "load.think"),  # after which no step moves the clock
        ("load.max_seconds=1e300", "load.max_seconds"),
        ("load.retry=1e18", "load.retry"),
    ],
)
def test_a_ladder_that_the_clock_cannot_count_is_refused(change: str, key: str, capfd: pytest.CaptureFixture[str]):
    sets = ["--set", "load.users=[2]", "--set", change, "--set", "load.seconds=null"]
    assert status(["simulate", "standin", *sets, "--replicates", "19", "--jobs", "1"]) == 2
    assert f"standin: {key}: expected a ladder of at most 1,000,000,000 s, found one of" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["measure", "run"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("load.users=[1,1000000000]", "load.users: expected a load that can be sent from here: 1,000,000,000 users"),
        ("load={rate: [1,1e9], seconds: 60}", "load.rate: expected a load that can be sent from here: "),
        ("load.seconds=1e12", "load.seconds: expected a ladder of at most 1,000,000,000 s"),
    ],
)
def test_a_load_that_cannot_be_sent_is_refused_before_the_server_is_asked(
    command: str, change: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    nowhere = ["--url", "http://127.0.0.1:9", "-o", str(tmp_path / "out")]
    assert status([command, "standin", *nowhere, "--set", change]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"servecast: standin: {said}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_million_users_are_not_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    nowhere = ["--url", "http://127.0.0.1:9", "-o", str(tmp_path / "out"), "--set", "load.users=[1000000]"]
    assert status(["measure", "standin", *nowhere]) == 2
    assert "no server answers" in capfd.readouterr().err


def test_a_workload_that_no_server_takes_is_refused_before_the_work_begins(capfd: pytest.CaptureFixture[str]):
    assert status(["simulate", "standin", "--prompt-tokens", "99999", "--replicates", "19"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("servecast: workload: every request would be refused (422)") and err.count("\n") == 1


def test_what_users_ask_while_others_are_added_counts(capfd: pytest.CaptureFixture[str]):
    sets = ["--set", "load.users=[900]", "--set", "load.spawn_rate=1e-9", "--set", "load.seconds=1"]
    assert status(["simulate", "standin", *sets, "--replicates", "19", "--jobs", "1"]) == 2
    assert "expected a simulation that can run here: 900 users, " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "replicates"),
    [
        (["load.users=[1000000]", "load.seconds=1"], 1),
        (["load.users=[128]", "load.seconds=3600"], 99),
        (["load.rate=[100]", "load.seconds=86400"], 99),
        (["workload.output_tokens=3000", "server.max_total_tokens=3500"], 999),
    ],
)
def test_what_can_run_is_not(changes: list[str], replicates: int):
    scenario = load("standin", *changes)
    check_size(scenario, read_calibration(str(scenario.calibration)), replicates)


def test_a_comparison_of_too_many_replicates_is_refused(capfd: pytest.CaptureFixture[str]):
    assert status(["compare", "data/tgi-0.9.4-cpu/mixed", "--replicates", "1000000000", "--jobs", "1"]) == 2
    assert "--replicates: expected fewer: 1,000,000,000 take at least" in capfd.readouterr().err


def test_progress_is_told_within_a_replicate_and_how_long_the_rest_takes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "KNOWN", 0.0)
    sets = ["--set", "load.users=[1,8,64]", "--set", "load.seconds=150"]
    assert status(["simulate", "standin", *sets, "--replicates", "19", "--jobs", "1"]) == 0
    said = re.findall(r"simulating standin: (\S+) of 19", capfd.readouterr().err)
    counts = [float(count) for count in said]
    assert any(count != int(count) for count in counts), said
    assert 19.0 in counts and min(counts) < 1


def test_a_large_run_is_read_in_little_memory_and_with_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    many, tokens = 100_000, 4
    rung = {"start": 0.0, "ramped": 0.0, "settled": 0.0, "end": 1000.0, "users": 100, "status": "complete"}
    (tmp_path / "run.json").write_text(json.dumps({"format": 2, "kind": "measured", "name": "m", "rungs": [rung]}))
    with (tmp_path / "requests.jsonl").open("w") as out:
        for i in range(many):
            sent = i / 100
            out.write(
                f'{{"id":{i},"user":{i % 100},"sent":{sent},"ended":{sent + 1},"prompt_tokens":9,"output_tokens":4,'
                f'"token_times":[{sent + 0.2},{sent + 0.4},{sent + 0.6},{sent + 0.8}],"status":"ok"}}\n'
            )
    read_run(Path("data/tgi-0.9.4-cpu/mixed"))  # what is imported on the way is not the run's
    tracemalloc.start()
    try:
        run = read_run(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(run.requests) == many and run.token_times is not None and len(run.token_times) == many
    # 88 bytes in columns, twice while they are put in order; 4 times of 8; 112 for a view of them; texts
    assert peak / many < 600 + 8 * tokens
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "LARGE", 0)
    progress.read_run_with_progress(tmp_path)
    assert re.search(r"reading .*, MB: \d+ of \d+", capfd.readouterr().err)
