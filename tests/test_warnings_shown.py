"""Three warnings are shown, those that move the asked number most; the others fold, and files keep all."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from scenarios.cli.main import status
from sim.model.files.format import WORDS
from sim.model.warning import KINDS, Notice, Severity, notice, ranked

ROOT = Path(__file__).parents[1]
ASKED = ["simulate", "llama2-70b-1500-100", "--replicates", "19", "--jobs", "1", "--set", "load.seconds=5"]
MANY = ["--users", "1,40,200", "--set", "server.max_concurrent_requests=200"]  # refused users ask again at once: slow


def shown(err: str) -> list[str]:
    return [line.removeprefix("warning: ") for line in err.splitlines() if line.startswith("warning: ")]


def test_three_warnings_are_shown_and_the_rest_is_counted(capsys: pytest.CaptureFixture[str]):
    assert status([*ASKED, *MANY, "--json"]) == 0
    out, err = capsys.readouterr()
    kept = [f"{said['text']}. {said['advice']}".removesuffix(". ") for said in json.loads(out)["warnings"]]
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
    note = notice("duplicate-requests", "3 of 9 requests occur twice and are counted once")
    wide = notice("figures-undetermined", "the figures do not pin down a0 (prefill, constant)")
    near = notice("extrapolated", "extrapolated from 24 users on: prefills of 10,500 tokens (calibrated up to 9,000)")
    far = notice("extrapolated", "extrapolated from 32 users on: 64 users (calibrated up to 8)")
    below = notice("extrapolated", "extrapolated: prompts of 10 tokens (calibrated from 400 on)")
    wrong = notice("no-steady-state", "no steady state from 3 requests/s on: the queue grows, no latency is quoted")
    own = Notice(text="what the author of a scenario says")
    given = [note, wide, near, own, far, wrong, below]
    assert ranked(given) == [wrong, below, far, near, own, wide, note]
    assert ranked([*given, note]) == ranked(given)
    assert own.severity is Severity.BIASED


def test_every_kind_has_a_producer_and_every_producer_a_kind():
    used = set()
    for package in ("calibrate", "measure", "scenarios", "sim"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "notice":
                    used.add(ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else None)
    assert used | {"assumed-times"} == set(KINDS)  # that of the stand-in's calibration
    assert set(WORDS.values()) <= set(KINDS)


def test_every_kind_advises_or_the_table_says_why_not():
    source = (ROOT / "sim" / "model" / "warning.py").read_text(encoding="utf-8")
    reasons = dict(re.findall(r'^    "([\w-]+)": \(Severity\.NOTE, ""\),  # (.+)$', source, re.MULTILINE))
    assert {code for code, (_, advice) in KINDS.items() if not advice} == set(reasons)
    for code, (_, advice) in KINDS.items():
        assert code in reasons or (advice[0].isupper() and advice.endswith((".", ")"))), code


def test_the_documentation_names_warnings_by_their_codes():
    named = set()
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for table in re.findall(r"^\| warning \|.*\n((?:\|.*\n)+)", text, re.MULTILINE):
            named |= {code for row in table.splitlines()[1:] for code in re.findall(r"`([^`]+)`", row.split("|")[1])}
        named |= set(re.findall(r"warning `([^`]+)`", text))
    assert len(named) > 12 and named <= set(KINDS)
