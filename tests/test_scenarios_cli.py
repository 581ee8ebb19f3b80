"""The command line as a user meets it: statuses, one-line complaints, instant help, results on stdout alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from warned import texts

from scenarios.cli import main
from scenarios.cli.commands import servecast
from scenarios.cli.main import status
from sim.model.errors import UserError
from sim.run import read_run

pytestmark = pytest.mark.usefixtures("no_fit_check")

SERVECAST = [sys.executable, "-m", "scenarios"]
QUICK = ["--replicates", "19", "--jobs", "1", "--set", "load.seconds=5"]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "COLUMNS": "80"}
    return subprocess.run(
        [*SERVECAST, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd, env=environment
    )


def test_help_is_instant_because_it_imports_nothing_heavy():
    code = (
        "import sys; from scenarios.cli.main import status; status(['--help']); status(['simulate', '--help']);"
        "status([]);"
        "print([m for m in ('pandas', 'scipy', 'matplotlib', 'locust', 'simpy', 'aiohttp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_shows_the_three_commands_most_people_need():
    bare, asked = run(), run("--help")
    assert bare.returncode == asked.returncode == 0
    assert bare.stdout == asked.stdout
    for words in ("servecast simulate ", "servecast measure ", "servecast calibrate "):
        assert words in bare.stdout
    assert max(map(len, bare.stdout.splitlines())) <= 80


def test_every_command_has_an_example():
    status(["--version"])
    for name, command in servecast.commands.items():
        assert f"servecast {name}" in command.epilog
        assert command.help and command.help[0].isupper()


def test_the_commands_are_those_promised():
    status(["--version"])  # which adds them
    promised = "scenarios new schema simulate plan measure calibrate compare report standin"
    assert set(promised.split()) <= set(servecast.commands)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["simulat"], "servecast: No such command 'simulat'."),
        (["simulate"], "servecast: Missing argument 'SCENARIO...'."),
        (["simulate", "llama2-70b", "--replicate", "3"], "servecast: No such option"),
        (["simulate", "llama2-70b", "--replicates", "3"], "servecast: Invalid value for '--replicates'"),
        (["simulate", "nowhere.yaml"], "servecast: nowhere.yaml: no such scenario file, nor a shipped scenario"),
        (
            ["simulate", "standin", "--set", "load.users=[0]"],
            "servecast: --set load.users=[0]: load.users[0]: expected",
        ),
        (["simulate", "standin", "standin", "-o", "x"], "servecast: expected scenarios of different names"),
        (
            ["simulate", "standin", "--set", "workload.prompt_tokens=3001"],
            "servecast: workload: every request would be",
        ),
        (["plan", "standin", "--json", "--csv"], "servecast: expected one of --json and --csv"),
        (["compare", "a", "b", "--json", "--csv"], "servecast: expected one of --json and --csv"),
        (["new", ""], "servecast: new '': expected a name, such as chat"),
        (["simulate", "standin", "--steps"], "servecast: --steps: expected -o DIR with it"),
        (
            ["run", "standin", "--url", "http://127.0.0.1:1", "-o", "x", "--set", "load.users=[4]"],
            "servecast: standin: load: expected at least two loads: some to fit and some to score",
        ),
        (["calibrate", "nosuch", "-o", "new/c.json"], "servecast: nosuch: no such run directory, table or scenario"),
        (["report", "nosuch", "-o", "new/r.html"], "servecast: nosuch: missing; expected a run directory"),
        (["simulate", "standin", "--json", "--csv"], "servecast: expected one of --json and --csv"),
        (["simulate", "standin", "-o", "/dev/null/x"], "servecast: /dev/null: expected a folder to write into"),
        (["calibrate", "llama2-70b", "-o", "/dev/null/x"], "servecast: /dev/null: expected a folder to write into"),
        (["calibrate", "nowhere"], "servecast: nowhere: no such run directory, table or scenario"),
        (["calibrate", "llama2-70"], "servecast: llama2-70: no such run directory, table or scenario; did you mean"),
        (["calibrate", "nowhere", "else.csv"], "servecast: nowhere: no such run directory, nor table"),
        (["calibrate", "standin"], "servecast: standin: has a calibration and nothing to fit; expected table or"),
        (["compare", "nowhere", "--calibration", "c.json"], "servecast: nowhere/run.json: missing; expected the head"),
        (
            ["compare", "a", "b", "c"],
            "servecast: expected a run (with --calibration FILE, or --held-out, or neither), or two",
        ),
        (["compare", "a", "--tolerance", "e2e=1"], "servecast: --tolerance e2e=1: unknown metric; did you mean"),
        (["compare", "a", "--tolerance", "rps=x"], "servecast: --tolerance rps=x: expected METRIC=SHARE"),
        (["report", "nowhere.json"], "servecast: nowhere.json: missing; expected a run directory, a forecast"),
        (["plan", "standin", "--set", "slo="], "servecast: standin: slo: missing; a plan needs an SLO to meet"),
        (["measure", "standin", "-o", "run"], "servecast: expected a server: give --url URL, or add a launch: block"),
        (["standin", "--fault", "reset=2"], "servecast: --fault: reset: expected a share of requests from 0 to 1"),
        (["new", "../no/such/folder/../x/y", "z"], "servecast: Got unexpected extra argument (z)"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(
    arguments: list[str],
    complaint: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert status(arguments) == 2
    out, err = capfd.readouterr()
    # on a busy machine there is time to say that nothing is done yet
    lines = [line for line in err.splitlines() if not line.startswith("simulating ")]
    assert len(lines) == 1 and lines[0].startswith(complaint) and out == ""
    assert list(tmp_path.iterdir()) == []  # nothing written


def test_a_bug_keeps_its_traceback_and_status_70(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(import_module("scenarios.cli.scenarios"), "shipped", broken)
    assert status(["scenarios"]) == main.BUG
    err = capfd.readouterr().err
    assert "Traceback" in err and "ZeroDivisionError: ours" in err and "bug of ours" in err


def test_simulate_prints_tables_of_80_columns_and_warnings_apart(capfd: pytest.CaptureFixture[str]):
    assert status(["simulate", "llama2-70b-1500-100", *QUICK]) == 0
    out, err = capfd.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    for words in ("E2E p95, s", "in, tok/s", "plateau", "RPS at latency onset", "$/M tokens out", "token budget"):
        assert words in out
    assert "…" not in out
    assert "warning: from " in err and "shorter than three answers" in err
    assert "warning" not in out


def test_machines_read_json_and_csv(capfd: pytest.CaptureFixture[str]):
    assert status(["simulate", "standin", *QUICK, "--json"]) == 0
    forecast = json.loads(capfd.readouterr().out)
    assert forecast["format"] == 2 and {"curves", "plateau", "knee", "latency_onset", "bottleneck", "warnings"} <= set(
        forecast
    )
    assert forecast["provenance"]["changes"] == ["load.seconds=5"]
    assert forecast["scenario"]["load"]["seconds"] == 5
    assert status(["simulate", "standin", *QUICK, "--csv"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "scenario,users,rate,metric,value,low,high,extrapolated,unstable"
    rows = {(row["metric"], row["users"]): row["value"] for row in forecast["curves"]}
    scenario, users, _, metric, value, *_ = lines[5].split(",")
    assert scenario == "standin" and rows[metric, int(users)] == float(value)


def test_the_same_seed_writes_the_same_bytes_and_a_run_is_never_overwritten(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    for folder, jobs in (("a", "1"), ("b", "2")):
        options = [*QUICK[:2], *QUICK[4:], "--jobs", jobs, "--steps"]
        assert status(["simulate", "standin", *options, "-o", str(tmp_path / folder)]) == 0
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert {str(f) for f in files} >= {"standin/forecast.json", "standin/run/run.json", "standin/run/steps.jsonl"}
    ran = read_run(tmp_path / "a" / "standin" / "run")
    assert ran.steps is not None and ran.steps["count"].sum() > 1000
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    capfd.readouterr()
    assert status(["simulate", "standin", *QUICK, "-o", str(tmp_path / "a")]) == 2
    assert capfd.readouterr().err.endswith("run: exists already, and a run is never overwritten\n")


def test_a_plan_that_keeps_no_slo_fails(capfd: pytest.CaptureFixture[str]):
    one = ["plan", "standin", *QUICK, "--users", "4", "--set", "fleet.replicas=1"]
    assert status([*one, "--set", "slo.e2e_p95=0.1"]) == 1
    assert "No option reaches the goal of 90% at 4 users" in " ".join(capfd.readouterr().out.split())


def test_new_writes_a_scenario_that_loads_and_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    from scenarios.load.scenario import load

    monkeypatch.chdir(tmp_path)
    assert status(["new", "chat"]) == 0
    assert capfd.readouterr().out == "chat.yaml\n"
    assert load("chat.yaml").name == "chat"
    assert status(["new", "chat"]) == 2
    assert capfd.readouterr().err == "servecast: chat.yaml: exists already, and is not overwritten\n"


def test_schema_knows_every_key_of_a_scenario(capfd: pytest.CaptureFixture[str]):
    assert status(["schema"]) == 0
    schema = json.loads(capfd.readouterr().out)
    known = schema["$defs"]["Scenario"]["properties"]
    assert {"extends", "server", "workload", "load", "published", "slo", "price", "launch"} <= set(known)


def test_schema_shows_the_limits_that_files_are_held_to(capfd: pytest.CaptureFixture[str]):
    assert status(["schema"]) == 0
    schema = json.loads(capfd.readouterr().out)
    load = schema["$defs"]["Load"]["properties"]
    users = {"type": "array", "items": {"type": "integer", "exclusiveMinimum": 0}, "minItems": 1}
    assert load["users"]["anyOf"] == [users, {"type": "null"}]
    assert load["think"]["minimum"] == 0 and load["retry"]["exclusiveMinimum"] == 0


def test_compare_two_runs_and_two_forecasts(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    for name, seed in (("a", "0"), ("b", "1")):
        arguments = [*QUICK, "--set", "workload.output_tokens={uniform: [10, 60]}", "--set", "tolerances="]
        arguments += ["--seed", seed]
        assert status(["simulate", "standin", *arguments, "-o", str(tmp_path / name)]) == 0
    runs = [str(tmp_path / name / "standin" / "run") for name in "ab"]
    capfd.readouterr()
    assert status(["compare", *runs, "--json"]) == 0
    comparison = json.loads(capfd.readouterr().out)
    assert comparison["pass"] is None
    errors = {row["metric"]: row["relative_error"] for row in comparison["rows"]}
    assert 0 < abs(errors["e2e_mean"]) < 0.5
    assert status(["compare", *runs, "--tolerance", "e2e_mean=0.5"]) == 0
    assert status(["compare", *runs, "--tolerance", "e2e_mean=1e-9"]) == 1
    assert "Outside the tolerances" in capfd.readouterr().out
    forecasts = [str(tmp_path / name / "standin" / "forecast.json") for name in "ab"]
    assert status(["compare", *forecasts]) == 0
    assert "MAPE" in capfd.readouterr().out
    assert status(["compare", forecasts[0], runs[0]]) == 2
    capfd.readouterr()
    assert status(["compare", runs[0], forecasts[0], "--json"]) == 0  # made beforehand
    made = json.loads(capfd.readouterr().out)
    assert made["of"] == "a forecast" and made["coverage"] > 0.7
    assert any("draws its own requests" in text for text in texts(made["warnings"]))


def test_compare_writes_a_page_that_shows_what_lies_behind_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = Path("data/tgi-0.9.4-cpu")
    calibration, out = str(tmp_path / "calibration.json"), tmp_path / "out"
    assert status(["calibrate", str(folder / "long-between"), "-o", calibration]) == 0
    capfd.readouterr()
    arguments = ["compare", str(folder / "long"), "--calibration", calibration, "--replicates", "19", "--jobs", "1"]
    assert status([*arguments, "--warnings", "-o", str(out), "--repeat", str(folder / "short-again")]) == 0
    said = capfd.readouterr()
    assert "repeat: the same load measured again, against the first time" in re.sub(r"\s+", " ", said.out)
    assert "short-again does not repeat" in said.err
    written = json.loads((out / "comparison.json").read_bytes())
    repeated = {row["users"] for row in written["rows"] if row["repeat_error"] is not None}
    assert repeated == {1, 4, 16}  # of long-again, which nobody named
    assert len(written["evidence"]["itl"]) == 5
    shown = (out / "report.html").read_text()
    assert "The gaps between tokens" in shown and "Residuals of the step times" in shown
    assert status(["report", str(out / "comparison.json"), "-o", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text().count("data:image") == shown.count("data:image") == 15


def test_repeats_are_of_one_run(capfd: pytest.CaptureFixture[str]):
    assert status(["compare", "a", "b", "--repeat", "c"]) == 2
    assert (
        capfd.readouterr().err == "servecast: --repeat: expected only with one run: two are compared with each other\n"
    )


@pytest.mark.parametrize("rungs", ["9", "one", "0,1,2,3,4,5", ""])
def test_rungs_that_cannot_be_held_out(rungs: str, capfd: pytest.CaptureFixture[str]):
    assert status(["compare", "data/tgi-0.9.4-router-http/long", "--held-out", rungs]) == 2
    complaint = f"servecast: --held-out {rungs}: expected some of the rungs 0 to 5, such as 1,3\n"
    assert capfd.readouterr().err == complaint


def test_a_truncated_run_names_file_and_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    whole = Path("data/tgi-0.9.4-router-http/long/run.json").read_text()
    (tmp_path / "run.json").write_text(whole[: len(whole) // 2])
    assert status(["report", str(tmp_path)]) == 2
    assert re.match(
        r"servecast: \S*/run\.json:\d+: not JSON: .*; expected the head of a run\n$", capfd.readouterr().err
    )
    assert not (tmp_path / "report.html").exists()


def test_run_measures_with_the_options_of_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = {}

    def climb(*place: object, **options: object) -> Path:
        seen.update(options)
        raise UserError("far enough")

    monkeypatch.setattr("measure.ladder.session.measure", climb)
    options = ["--model", "one", "--processes", "2", "--budget", "30", "--set", "load.users=[1, 2]"]
    assert status(["run", "standin", "--url", "http://127.0.0.1:1", "-o", str(tmp_path / "out"), *options]) == 2
    assert {"model": "one", "processes": 2, "budget": 30.0}.items() <= seen.items()


def test_a_tolerance_that_cannot_be_judged_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run_path, file = "data/tgi-0.9.4-cpu/long-again", str(tmp_path / "c.json")
    assert status(["calibrate", run_path, "-o", file]) == 0
    asked = ["compare", run_path, "--calibration", file, "--replicates", "19", "--jobs", "1"]
    assert status([*asked, "--tolerance", "e2e_mean=0.5"]) == 1
    assert "No verdict: every rung was used for the fit" in capfd.readouterr().out
    assert status(asked) == 0


@pytest.mark.parametrize("budget", ["nan", "inf", "-1"])
def test_a_budget_is_a_finite_time(budget: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert status(["measure", "standin", "--url", "http://127.0.0.1:1", "--budget", budget, "-o", str(tmp_path)]) == 2
    assert "--budget" in capfd.readouterr().err


def test_what_is_set_changes_a_scenario_and_neither_runs_nor_tables(capfd: pytest.CaptureFixture[str]):
    for source in ("data/tgi-0.9.4-cpu/mixed", "data/splitwise_llama2_70b_a100_tp4_tp8_median.csv"):
        assert status(["calibrate", source, "--set", "server.max_total_tokens=3"]) == 2
        assert capfd.readouterr().err == "servecast: --set: expected only with a scenario, whose keys it changes\n"


def test_folders_that_commands_write_are_read_by_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert status(["simulate", "standin", *QUICK, "-o", str(tmp_path / "out")]) == 0
    run_path = str(tmp_path / "out" / "standin" / "run")
    assert status(["compare", run_path, run_path, "-o", str(tmp_path / "compared")]) == 0
    page = str(tmp_path / "page.html")
    assert status(["report", str(tmp_path / "compared"), str(tmp_path / "out" / "standin"), "-o", page]) == 0
    capfd.readouterr()
    assert status(["report", str(tmp_path / "out"), "-o", page]) == 2
    assert capfd.readouterr().err.endswith(f"name {tmp_path / 'out' / 'standin'}\n")
    assert status(["calibrate", str(tmp_path / "out" / "standin" / "forecast.json")]) == 2
    assert "expected a run directory, a table (.csv) or a scenario (.yaml)" in capfd.readouterr().err


def test_spreadsheets_read_comparisons(capfd: pytest.CaptureFixture[str]):
    cpu = "data/tgi-0.9.4-cpu"
    assert status(["compare", f"{cpu}/short", f"{cpu}/short-again", "--csv"]) == 0
    title, *rows = capfd.readouterr().out.splitlines()
    assert title.startswith("rung,load,users,metric,measured,simulated,low,high,relative_error")
    assert len(rows) == 3 * 22
    assert status(["compare", f"{cpu}/short", f"{cpu}/short-again"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("First: tgi-cpu-short. Second: tgi-cpu-short-again.") and "measured" not in out


def test_a_first_scenario_keeps_its_own_slo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert status(["new", "chat"]) == 0
    assert status(["simulate", "chat.yaml", "--replicates", "19", "--set", "load.users=[1, 8]"]) == 0
    said = capfd.readouterr()
    assert "Every SLO is kept up to 8 users" in said.out
    assert "422" not in said.err


def test_short_and_long_options_ask_for_help(capfd: pytest.CaptureFixture[str]):
    assert status(["-h"]) == status(["plan", "-h"]) == 0
    assert "Find the cheapest fleet that keeps the SLOs" in capfd.readouterr().out
