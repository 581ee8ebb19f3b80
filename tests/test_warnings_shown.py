"""Three warnings are shown, those that move the asked number most; the others fold, and files keep all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scenarios.cli.main import status
from sim.model.warning import KINDS, Severity, ranked, severity

ROOT = Path(__file__).parents[1]
ASKED = ["simulate", "llama2-70b-1500-100", "--replicates", "19", "--jobs", "1", "--set", "load.seconds=5"]
MANY = ["--users", "1,40,200"]


def shown(err: str) -> list[str]:
    return [line.removeprefix("warning: ") for line in err.splitlines() if line.startswith("warning: ")]


def test_three_warnings_are_shown_and_the_rest_is_counted(capsys: pytest.CaptureFixture[str]):
    assert status([*ASKED, *MANY, "--json"]) == 0
    out, err = capsys.readouterr()
    kept = json.loads(out)["warnings"]
    assert len(kept) > 4
    *three, rest = shown(err)
    assert len(three) == 3 and set(three) < set(kept)
    assert rest == f"and {len(kept) - 3} more; --warnings shows all"
    # a forecast beyond the calibration moves the number, how figures were read does not
    assert "extrapolated" in three[0] and "calibrated up to 96" in three[0]
    assert not any("taken to have come back" in text or "read off a plot" in text for text in three)
    assert status([*ASKED, *MANY, "--json", "--warnings"]) == 0
    assert sorted(shown(capsys.readouterr().err)) == sorted(kept)


def test_the_order_is_by_what_a_warning_does_to_the_number():
    note = "a.csv: 3 of 9 requests are there twice (the same id, user and time sent) and are counted once"
    wide = "the figures do not pin down a0 (prefill, constant): these stay as wide as such machines are known to be"
    near = "extrapolated from 24 users on: prefills of 10,500 tokens (calibrated up to 9,000)"
    far = "extrapolated from 32 users on: 64 users (calibrated up to 8)"
    below = "extrapolated: prompts of 10 tokens (calibrated from 400 on)"
    wrong = "no steady state from 3 requests/s on: the queue grows, no latency is quoted"
    own = "a sentence that nobody has written yet"
    given = [note, wide, near, own, far, wrong, below]
    assert ranked(given) == [wrong, below, far, near, own, wide, note]
    assert ranked([*given, note]) == ranked(given)
    assert severity(own) is Severity.MOVED


def test_every_kind_is_one_that_the_code_can_say():
    sources = [path for package in ("calibrate", "measure", "scenarios", "sim") for path in (ROOT / package).rglob("*")]
    said = ""
    for path in sources:
        if path.suffix in (".py", ".yaml", ".json") and path.name != "severity.py":
            said += "".join(path.read_text(encoding="utf-8").split()).replace('"f"', "").replace('""', "")
    absent = [words for _, kinds in KINDS for words in kinds if "".join(words.split()) not in said]
    assert absent == []
