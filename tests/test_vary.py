"""`--vary`: what-ifs side by side in one table, on the same random numbers."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from rich.cells import cell_len

from scenarios.cli.main import status

QUICK = ["simulate", "standin", "--replicates", "19", "--jobs", "1", "--set", "load.seconds=5", "--users", "1,2,4"]


@pytest.mark.parametrize("width", [80, 40])
def test_variants_stand_side_by_side(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(width))
    varied = ["--vary", "server.max_batch_prefill_tokens=4096,8192,14000"]
    assert status([*QUICK, *varied, "--slo", "e2e_p95=9", "--slo", "ttft_p95=1"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert "Columns: server.max_batch_prefill_tokens" in lines
    titled = [line for line in lines if line.split() == ["users", "4096", "8192", "14000"]]
    assert len(titled) == 2 and "E2E p95, s (SLO: 9)" in lines and "TTFT p95, s (SLO: 1)" in lines
    assert [line.split()[0] for line in lines if re.match(r" +[124] +\d", line)] == ["1", "2", "4"] * 2
    assert "plateau, RPS" in out and "knee, users" in out


def test_the_same_random_numbers_are_used_for_all(capsys: pytest.CaptureFixture[str]):
    # more permits than there are users change nothing: neither may the numbers
    assert status([*QUICK, "--vary", "server.max_concurrent_requests=100,128", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    names = sorted({row.pop("scenario") for row in rows})
    assert names == ["standin,max_concurrent_requests=100", "standin,max_concurrent_requests=128"]
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]


def test_several_keys_make_every_combination(capsys: pytest.CaptureFixture[str]):
    varied = ["--vary", "workload.prompt_tokens=100,{uniform: [50, 60]}", "--vary", "load.think=0,1"]
    assert status([*QUICK, *varied, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f["provenance"]["changes"][-2:] for f in found] == [
        ["workload.prompt_tokens=100", "load.think=0"],
        ["workload.prompt_tokens=100", "load.think=1"],
        ["workload.prompt_tokens={uniform: [50, 60]}", "load.think=0"],
        ["workload.prompt_tokens={uniform: [50, 60]}", "load.think=1"],
    ]
    # what cannot be a folder's name is numbered
    assert [f["name"] for f in found] == [
        "standin,prompt_tokens=100,think=0",
        "standin,prompt_tokens=100,think=1",
        "standin,3",
        "standin,4",
    ]
    assert found[2]["scenario"]["workload"]["prompt_tokens"]["uniform"] == [50, 60]


def test_every_variant_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert status([*QUICK, "--vary", "load.think=0,1", "-o", str(tmp_path)]) == 0
    for think in (0, 1):
        folder = tmp_path / f"standin,think={think}"
        assert json.loads((folder / "forecast.json").read_bytes())["scenario"]["load"]["think"] == think
        assert (folder / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--vary", "load.think"], "--vary load.think: expected KEY=A,B,..."),
        (["--vary", "load.think="], "--vary load.think=: expected KEY=A,B,..."),
        (["--vary", "load.think=1,,2"], "--vary load.think=1,,2: expected KEY=A,B,..."),
        (["--vary", "load.think=1,1"], "--vary load.think=1,1: names a value twice"),
        (["--vary", "load.think=1", "--vary", "load.think=2"], "--vary load.think=2: load.think is changed by another"),
        (["--vary", "load.users=[1],[2]"], "--vary load.users=[1],[2]: load.users is changed by another"),
        (["--vary", "load.seconds=5,6"], "--vary load.seconds=5,6: load.seconds is changed by another"),
        (["--vary", "server.max_batch=1,2"], "--vary server.max_batch=1,2: server.max_batch: unknown key; did you"),
        (["--vary", "load.think=0,-1"], "--vary load.think=0,-1: load.think: expected 0 or more, found -1"),
        (["--vary", "load.think=0,x"], "--vary load.think=0,x: load.think: expected a number, found 'x'"),
    ],
)
def test_what_cannot_be_varied_is_one_line(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]):
    assert status([*QUICK, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"servecast: {complaint}") and err.count("\n") == 1
