"""Text from outside can command neither a terminal nor a page, whichever file or server it comes from."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scenarios.cli.main import status

HOSTILE = "a\x1b[31mb\x1b]0;t\x07c\x9bd\x85e\u202ef\u200bg\rh\ni\x7fj\x00k [red]l[/y] $m_{ <b>n</b>"
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
RESULTS = Path("tests/samples/foreign/aiperf-few-bundled.jsonl")


def said(arguments: list[object], capfd: pytest.CaptureFixture[str], *, expected: tuple[int, ...] = (0,)) -> str:
    """All that a command prints, which must be clean."""
    found = status([str(each) for each in arguments])
    out, err = capfd.readouterr()
    assert not CONTROLS.search(out + err), (out + err)[:2000]
    assert found in expected, err
    return out + err


def clean_page(path: Path) -> str:
    page = path.read_text(encoding="utf-8")
    pictures = [base64.b64decode(each).decode() for each in re.findall(r"svg\+xml;base64,([^\"]*)", page)]
    for text in (page, *pictures):
        assert not CONTROLS.search(text.replace("\t", " "))
    assert "<b>n</b>" not in page
    return page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose every text is hostile."""
    path = tmp_path / "run"
    assert status(["import", str(RESULTS), "-o", str(path)]) == 0
    head = json.loads((path / "run.json").read_text())
    head |= {
        "name": HOSTILE,
        "stopped": HOSTILE,
        "warnings": [{"text": HOSTILE}],
        "created": HOSTILE,
        "software": {HOSTILE: HOSTILE},
    }
    head["info"] = {"model_id": HOSTILE, "version": HOSTILE}
    head["scenario"] |= {"name": HOSTILE, "description": HOSTILE}
    for rung in head["rungs"]:
        rung["warnings"] = [{"text": HOSTILE, "advice": HOSTILE}]
    (path / "run.json").write_text(json.dumps(head))
    lines = [json.loads(line) for line in (path / "requests.jsonl").read_text().splitlines()]
    lines[0]["error"] = HOSTILE
    (path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    calibration = json.loads(Path("measure/standin/calibration.json").read_text())
    calibration["source"]["note"] = HOSTILE
    calibration["warnings"] = [{"text": HOSTILE}]
    calibration["machine"] = {"model": HOSTILE, "gpu": HOSTILE}
    next(iter(calibration["parameters"].values()))["meaning"] = HOSTILE
    (tmp_path / "c.json").write_text(json.dumps(calibration))
    text = {
        "name": "[red]x[y] $x_{",
        "description": HOSTILE,
        "workload": {"prompt_tokens": 50, "output_tokens": 5},
        "load": {"users": [1, 2], "seconds": 2},
        "slo": {"e2e_p95": 1},
        "price": {"usd_per_hour": 1, "source": HOSTILE},
        "calibration": "c.json",
    }
    (tmp_path / "s.yaml").write_text(json.dumps(text))
    return tmp_path / "s.yaml"


QUICK = ["--replicates", "19", "--jobs", "1"]


def test_what_a_run_says_of_itself(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    again = shutil.copytree(run, tmp_path / "again")
    said(["report", run, "-o", tmp_path / "r.html", "--title", HOSTILE.replace("\0", "")], capfd)
    assert "&lt;b&gt;n&lt;/b&gt;" in clean_page(tmp_path / "r.html")
    for form in ([], ["--json"], ["--csv"]):
        text = said(["compare", run, again, *form], capfd, expected=(0, 1))
        if form == ["--json"]:
            json.loads(text[: text.rindex("}") + 1])
    said(["compare", run, again, "-o", tmp_path / "d"], capfd, expected=(0, 1))
    clean_page(tmp_path / "d" / "report.html")
    said(["calibrate", run], capfd, expected=(0, 1, 2))


def test_what_a_scenario_and_its_calibration_say(
    scenario: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = said(["simulate", scenario, *QUICK, "-o", tmp_path / "o"], capfd)
    assert "[red]x[y] $x_{" in text and "\\u001b[31m" in text  # shown as it is, not obeyed
    said(["plan", scenario, *QUICK, "--users", "1", "--set", "fleet.replicas=1"], capfd, expected=(0, 1))
    said(["report", tmp_path / "o" / "[red]x[y] $x_{", "-o", tmp_path / "r.html"], capfd)
    clean_page(tmp_path / "r.html")


@pytest.mark.parametrize("text", ["a\x1b[31m", "a\nb", "a\u202eb", "a\u200bb", "a/b", "n" * 201, "é" * 101, " "])
def test_names_are_plain_and_short(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.yaml").write_text(json.dumps({"name": text}))
    assert "s.yaml:1: name: expected " in said(["simulate", tmp_path / "s.yaml"], capfd, expected=(2,))


def test_complaints_are_one_clean_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = HOSTILE.replace("\0", "")
    named = tmp_path / plain.replace("/", "")
    named.write_text(json.dumps({"name": "x", plain: 1}))
    for arguments in (
        ["simulate", plain],
        ["simulate", named],
        ["simulate", "standin", "--set", plain],
        ["simulate", "standin", "--set", f"name={plain}"],
        ["import", named, "-o", tmp_path / "run"],
        ["report", named],
        ["calibrate", named],
        ["compare", named],
        ["measure", "standin", "--url", plain, "-o", tmp_path / "run"],
        [plain],
        ["simulate", f"--{plain}"],
    ):
        err = said(arguments, capfd, expected=(2,))
        assert err.count("\n") == 1 and len(err) < 1200


def test_a_terminal_that_has_ascii_only_gets_plain_characters(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict", "LANG": "C", "COLUMNS": "0", "TERM": "dumb"}
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9")
    for arguments, found in ((["simulate", "standin", *QUICK, "--set", "load.users=[1]"], 0), (["simulate", odd], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "scenarios", *arguments], capture_output=True, env=environment, timeout=120
        )
        assert done.returncode == found, done.stderr
        assert (done.stdout + done.stderr).isascii()
        assert found or b"standin" in done.stdout
