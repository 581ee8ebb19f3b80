"""Short forms of `--set` (`--users`, `--rate`, `--prompt-tokens`, `--output-tokens`, `--slo`) wherever that is."""

from __future__ import annotations

import json

import pytest

from scenarios.cli.commands import servecast
from scenarios.cli.main import status

QUICK = ["--replicates", "19", "--jobs", "1", "--set", "load.seconds=5"]
SHORT = {"--users", "--rate", "--prompt-tokens", "--output-tokens", "--slo"}


def test_short_forms_change_the_scenario_and_are_recorded_like_set(capsys: pytest.CaptureFixture[str]):
    short = [
        "--users",
        "1,2",
        "--prompt-tokens",
        "300",
        "--output-tokens",
        "20",
        "--slo",
        "e2e_p95=9",
        "--slo=ttft_p95=1",
    ]
    assert status(["simulate", "standin", *QUICK, *short, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scenario"]["load"]["users"] == [1, 2]
    assert found["scenario"]["workload"]["prompt_tokens"] == 300
    assert found["scenario"]["workload"]["output_tokens"] == 20
    assert {"e2e_p95": 9, "ttft_p95": 1}.items() <= found["scenario"]["slo"].items()
    assert found["provenance"]["changes"] == [
        "load.seconds=5",
        "load.users=[1,2]",
        "workload.prompt_tokens=300",
        "workload.output_tokens=20",
        "slo.e2e_p95=9",
        "slo.ttft_p95=1",
    ]


def test_a_rate_replaces_users(capsys: pytest.CaptureFixture[str]):
    assert status(["simulate", "standin", *QUICK, "--rate", "0.5", "--slo", "e2e_p95=9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["curves"][0]["rate"] == 0.5


def test_every_command_with_set_has_them():
    status(["--version"])  # which adds the commands
    having = {
        name: {option for each in command.params for option in each.opts}
        for name, command in servecast.commands.items()
    }
    with_set = {name for name, options in having.items() if "--set" in options}
    assert {"simulate", "plan", "measure", "run"} <= with_set
    assert all(having[name] >= SHORT for name in with_set)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--users", "4", "--set", "load.users=[5]"], "--users 4: changes the same as --set load.users=[5]"),
        (["--users", "4", "--set", "load.users.0=5"], "--users 4: changes the same as --set load.users.0=5"),
        (["--users", "4", "--set", "load={users: [5]}"], "--users 4: changes the same as --set load={users: [5]}"),
        (["--users", "4", "--rate", "2"], "--rate 2: changes the same as --users 4"),
        (["--prompt-tokens", "4", "--set", "workload.trace=t.csv"], "--prompt-tokens 4: changes the same as --set"),
        (["--users", "4", "--users", "5"], "--users: given twice"),
        (["--slo", "e2e_p95=1", "--slo", "e2e_p95=2"], "--slo e2e_p95=2: changes the same as --slo e2e_p95=1"),
        (["--users", "x"], "--users x: load.users[0]: expected a whole number, found 'x'"),
        (["--users", "1,,2"], "--users 1,,2: load.users: not YAML: "),
        (["--users", ""], "--users : "),
        (["--users", "0"], "--users 0: load.users[0]: expected more than 0"),
        (["--users", "4,2"], "--users 4,2: load.users[1]: expected more users than the rung before (4), found 2"),
        (["--rate", "-1"], "--rate -1: load.rate[0]: expected more than 0"),
        (["--rate", "nan"], "--rate nan: "),
        (["--output-tokens", "few"], "--output-tokens few: workload.output_tokens: expected a whole number"),
        (["--slo", "e2e_p95"], "--slo e2e_p95: expected METRIC=LIMIT, such as e2e_p95=20"),
        (["--slo", "e2e=1"], "--slo e2e=1: slo.e2e: unknown metric; did you mean"),
        (["--slo", "e2e_p95=1s"], "--slo e2e_p95=1s: slo.e2e_p95: expected a number, found '1s'"),
    ],
)
def test_what_cannot_be_meant_is_one_line_that_names_the_option(
    options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
):
    assert status(["simulate", "standin", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"servecast: {complaint}") and err.count("\n") == 1
