"""A plan on a page: its answer, options, frontier and reserve; a `plan.json` that does not fit is refused."""

from __future__ import annotations

import base64
import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scenarios.cli.main import status


def share(value: float) -> dict[str, Any]:
    return {"value": value, "stderr": 0.02, "draws": 99}


def band(value: float | None) -> dict[str, Any]:
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def option(name: str, replicas: int, kept: float, latency: float, month: float | None) -> dict[str, Any]:
    near = [(n, min(1.0, kept * n / replicas)) for n in (replicas - 1, replicas) if n]
    return {
        "name": name,
        "met": kept >= 0.9,
        "replicas": {"value": replicas, "low": replicas, "high": replicas},
        "spare": 0,
        "hardware": f"4×{name}",
        "flags": {},
        "assumed": "max_num_seqs 256",
        "probability": {"all": share(kept), "e2e_p95": share(kept), "ttft_p95": share(0.99)},
        "metrics": {"e2e_p95": band(latency), "ttft_p95": band(latency / 10)},
        "periods": [{"start": 3600.0 * h, "metrics": {"e2e_p95": band(latency - 0.5 * h)}} for h in range(6)],
        "usd_per_hour": None if month is None else month / 730,
        "usd_per_month": month,
        "per_1000_requests": band(None if month is None else month / 10000),
        "per_million_tokens": band(None if month is None else month / 9000),
        "rps": band(3.7),
        "utilisation": band(0.8),
        "bottleneck": "decode compute",
        "why": f"{name} decodes 90% of the time",
        "tried": [
            {
                "replicas": n,
                "kept": share(p),
                "decision": p > 0.9,
                "usd_per_month": None if month is None else month * n / replicas,
                "latency": latency * replicas / n,
            }
            for n, p in near
        ],
        "warnings": [],
    }


PLAN: dict[str, Any] = {
    "format": 2,
    "name": "shop <day>",
    "question": {},
    "load": 80.0,
    "unit": "users",
    "traffic": "80 users",
    "slo": {"e2e_p95": 20.0, "ttft_p95": 2.0},
    "goal": 0.9,
    "spare": 0,
    "period": 3600.0,
    "quoted": "e2e_p95",
    "options": [
        option("A100", 3, 0.96, 17.2, 32100.0),
        option("H100", 2, 0.98, 11.4, 36350.0),
        option("L40", 9, 0.55, 21.0, 40000.0),
    ],
    "best": "A100",
    "nearest": "A100",
    "frontier": ["A100", "H100"],
    "sensitivity": [
        {
            "input": "traffic",
            "change": "× 1.25",
            "replicas": 4,
            "usd_per_month": 42800.0,
            "effect": 1 / 3,
            "words": "1 more",
        }
    ],
    "kept_at": 88.0,
    "broken_at": 92.0,
    "fewer": share(0.31),
    "lost": share(0.31),
    "next_measurement": ["L40: 9 replicas keep the SLOs with 55%."],
    "warnings": [],
    "seed": 0,
    "simulations": 500,
    "method": "A sequential test",
}


def written(folder: Path, change: Callable[[dict[str, Any]], None] = lambda plan: None) -> Path:
    plan = copy.deepcopy(PLAN)
    change(plan)
    (folder / "shop.plan.json").write_text(json.dumps(plan, indent=1))
    return folder / "shop.plan.json"


def page(source: Path) -> tuple[str, list[str]]:
    """The words of the page about a plan, and those of each of its pictures."""
    out = source.parent / "r.html"
    assert status(["report", str(source), "-o", str(out)]) == 0
    text = re.sub(r"<style>.*?</style>", " ", out.read_text(), flags=re.DOTALL)
    pictures = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)"', text)
    drawn = [" ".join(re.findall(r"<!-- (.*?) -->", base64.b64decode(svg).decode())) for svg in pictures]
    return " ".join(re.sub(r"<[^>]*>", " ", text).split()), drawn


def test_a_page_shows_a_plan(tmp_path: Path) -> None:
    said, drawn = page(written(tmp_path))
    assert "3 × 4×A100: E2E p95 17.2 s (15.5–18.9), every SLO kept with 96%, $32,100 a month; 2 replicas keep" in said
    assert said.index("3 × 4×A100") < said.index("shop &lt;day&gt;, plan")
    for part in (
        "pass E2E p95 ≤ 20 s: kept with 96% (goal 90%)",
        "A100 * 3 96% 96% 99% 17.2 15.5–18.9",
        "L40 9 55%",
        "H100 decodes 90% of the time",
        "Reserve: kept up to 88 users, broken at 92 users; with one replica lost every SLO kept with 31%.",
        "On the frontier of cost against E2E p95: A100, H100.",
        "traffic × 1.25 4 $42,800 +33% 1 more",
        "What to measure next L40: 9 replicas",
    ):
        assert part in said, part
    frontier, probability, periods = drawn
    assert all(text in frontier for text in ("E2E p95, s", "$ a month", "H100", "SLO: E2E p95 ≤ 20 s"))
    assert "P(every SLO kept)" in probability and "goal: 90%" in probability
    assert "E2E p95 in each period, s" in periods
    assert page(tmp_path)[0] == said  # the folder that `plan -o` wrote


def test_a_page_shows_the_largest_loads_and_a_plan_without_prices(tmp_path: Path) -> None:
    def largest(plan: dict[str, Any]) -> None:
        tried = {"75": share(0.95), "85": share(0.7)}
        names = ("A100", "H100", "L40")
        plan["crossing"] = [
            {"option": name, "replicas": 2, "kept_at": 75.0, "broken_at": 85.0, "tried": tried} for name in names
        ]
        rows = [option(name, 2, 0.8, 19.0, None) for name in names]
        plan |= {"best": None, "frontier": [], "sensitivity": [], "lost": None, "options": rows}

    said, drawn = page(written(tmp_path, largest))
    assert (
        "2 × 4×H100 bears up to 75 users" in said
        and "H100 2 75 85" in said
        and "users that 2 × L40 bear 75 not 85" in said
    )
    assert "replicas" in drawn[0] and "$" not in drawn[0]
    assert "users" in drawn[1]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda plan: plan.update(best="A10"), "best: unknown option; did you mean A100?"),
        (lambda plan: plan.update(frontier=["B"]), "frontier[0]: unknown option; expected one of A100, H100, L40"),
        (lambda plan: plan.update(quoted="e2e_p9"), "quoted: unknown metric; did you mean e2e_p9"),
        (lambda plan: plan.update(goal="high"), "goal: expected a number, found "),
        (lambda plan: plan.update(slo={}), "slo: expected at least one limit"),
        (lambda plan: plan["options"][1]["metrics"].pop("e2e_p95"), "options[1].metrics: expected e2e_p95, too"),
        (lambda plan: plan["options"][0]["probability"].pop("all"), "options[0].probability: expected all, too"),
        (
            lambda plan: plan["options"][2]["periods"][1].update(metrics={}),
            "options[2].periods[1].metrics: expected",
        ),
        (lambda plan: plan.update(options=[]), "options: expected at least one value"),
        (lambda plan: plan.update(crossing=[{"option": "A100", "replicas": 1}]), "crossing[0].kept_at: missing"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(
    change: Callable[[dict[str, Any]], None], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, change)
    assert status(["report", str(path), "-o", str(tmp_path / "r.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf".*shop\.plan\.json:\d+: {re.escape(complaint)}.*", line), line


def test_a_folder_of_several_plans_says_which_to_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    (tmp_path / "other.plan.json").write_bytes(path.read_bytes())
    assert status(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 2
    assert "holds several plans; name" in capsys.readouterr().err
