"""Tables fit the terminal: 80 columns without wrapped cells, 40 with fewer columns and a line that names the others."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from measure.ladder.progress import Progress
from scenarios.cli.main import status
from sim.terminal.columns import Column, fitting, show_columns
from sim.terminal.console import Console as OurConsole

QUICK = ["--replicates", "19", "--jobs", "1"]
LONG = "name=長い名前の長い名前の長い名前の長い名前の長い名前の長い名前の長い名前の長い名前"
SLOS = ["--slo", "e2e_p95=15", "--slo", "ttft_p95=2", "--slo", "tpot_mean=0.1", "--slo", "ttft_p99=2.125"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to be compared, which need not have been measured."""
    out = tmp_path_factory.mktemp("out")
    short = ["--set", "load.seconds=20", "--users", "1,2,3,4"]
    assert status(["simulate", "standin", *QUICK, *short, "--steps", "-o", str(out)]) == 0
    return out / "standin" / "run"


def written(
    capsys: pytest.CaptureFixture[str], width: int, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    capsys.readouterr()
    assert status(arguments) in (0, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert [line for line in lines if cell_len(line) > width] == []
    return lines


def rows_of(lines: list[str]) -> list[list[str]]:
    """The rows of every table, which stand below a rule and above whatever is no row."""
    found, inside = [], False
    for line in lines:
        if set(line.strip()) == {"─"}:
            inside = True
        elif not re.search(r"\S {2,}\S", line):
            inside = False
        elif inside:
            found.append(re.split(r" {2,}", line.strip()))
    return found


@pytest.mark.parametrize("width", [80, 40])
def test_a_forecast_fits(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    asked = ["simulate", "llama2-70b-1500-100", *QUICK, "--set", "load.seconds=20", "--users", "1,40,128", *SLOS]
    lines = written(capsys, width, monkeypatch, *asked, "--set", LONG)
    text = "\n".join(lines)
    assert ("not shown: E2E p50, s; TTFT p50, s" in text) == (width == 40)
    assert "E2E p95, s" in text
    loads = [row[0].rstrip("*") for row in rows_of(lines)]
    # one row a load in every table of a load, however narrow: no cell goes on in a second line
    assert loads.count("1") == loads.count("40") == loads.count("128") == 4


@pytest.mark.parametrize("width", [80, 40])
def test_plans_and_lists_fit(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    asked = ["plan", "standin", *QUICK, "--users", "1", "--set", "fleet.replicas=1", "--set", "price.usd_per_hour=3"]
    lines = written(capsys, width, monkeypatch, *asked, "--set", LONG)
    assert any("P(kept)" in line for line in lines)
    assert any("$/1000 requests" in line for line in lines)
    assert any(line.startswith("not shown: ") for line in lines) or width == 80
    assert any("standin" in line for line in written(capsys, width, monkeypatch, "scenarios"))
    assert any("locust" in line for line in written(capsys, width, monkeypatch, "doctor"))


@pytest.mark.parametrize("width", [80, 40])
def test_comparisons_and_parameters_fit(
    width: int, measured: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    lines = written(capsys, width, monkeypatch, "compare", str(measured), str(measured), "--tolerance", "e2e_mean=0.1")
    assert len([row for row in rows_of(lines) if "out, tok/s" in row]) == 4
    assert any("metric" in line and "MAPE" in line and "tolerance" in line for line in lines)
    table = Path(__file__).parents[1] / "data" / "argonne_llama2_70b_4xa100_40gb.csv"
    lines = written(capsys, width, monkeypatch, "calibrate", str(table))
    text = " ".join(lines)
    assert "value ± s.e." in text
    assert ("not shown: " in text) == (width == 40)


@pytest.mark.parametrize("width", [80, 40])
def test_the_ladder_fits(width: int, capsys: pytest.CaptureFixture[str]):
    from tests.test_measure_rung import window

    console = Console(force_terminal=True, record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file, Progress(console) as screen:
        screen.finish("128 users", window(errors={"reset": 2000}, half_width=0.1234), "complete", [])
    lines = console.export_text().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert sum("128 users" in line for line in lines) == 1
    assert any("E2E p95" in line for line in lines)


def test_a_pipe_without_columns_is_80_wide():
    code = "import os; os.environ.pop('COLUMNS', None); from sim.terminal.console import console;print(console().width)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "80\n"


def test_the_least_important_columns_go_first_and_wide_characters_count_twice():
    columns = [Column("a", ["1"], 0), Column("b", ["長い"], 2), Column("c", ["12345"], 1), Column("d", ["1"], 2)]
    assert [c.title for c in fitting(columns, 17)[0]] == ["a", "b", "c", "d"]
    assert [c.title for c in fitting(columns, 16)[0]] == ["a", "b", "c"]
    assert [c.title for c in fitting(columns, 13)[0]] == ["a", "c"]
    assert [c.title for c in fitting(columns, 1)[0]] == ["a"]


def test_a_name_is_cut_where_nothing_else_helps_and_a_number_never():
    console = OurConsole(width=20, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        show_columns([Column("metric", ["a_very_long_name"], 0, left=True), Column("v", ["123456"], 0)], console)
    assert "a_very_long…  123456" in console.export_text()
