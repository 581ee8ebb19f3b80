"""Runs whose events carry several tokens: lengths and rates count tokens, ITL is taken between events."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streams import lengths, observe
from warned import texts

from scenarios.cli.main import status
from sim.results.events import spread
from sim.run import Run
from sim.run import write_run as write

pytestmark = pytest.mark.usefixtures("no_fit_check")

Capture = pytest.CaptureFixture[str]


def write_run(folder: Path, streams: list[dict[str, object]], seconds: float = 10.0, users: int = 1) -> Path:
    """A measured run of one rung; each stream says its `sent`, `token_times` and whatever is odd about it."""
    folder.mkdir()
    scenario = {
        "name": "bundles",
        "server": {"max_batch_prefill_tokens": 2048, "max_batch_total_tokens": 16000},
        "workload": {"prompt_tokens": 60, "output_tokens": 8},
        "load": {"users": [users], "seconds": seconds},
    }
    rung = {"users": users, "start": 0.0, "ramped": 0.0, "settled": 0.0, "end": seconds, "status": "complete"}
    head = {"format": 2, "kind": "measured", "name": "bundles", "scenario": scenario, "rungs": [rung]}
    (folder / "run.json").write_text(json.dumps(head))
    usual = {"rung": 0, "prompt_tokens": 60, "max_new_tokens": 8, "status": "ok", "finish_reason": "length"}
    lines = []
    for number, stream in enumerate(streams):
        times = stream["token_times"]
        assert isinstance(times, list)
        said = {"id": number, "user": number % users, "output_tokens": len(times), "ended": times[-1]}
        lines.append(json.dumps(usual | said | stream) + "\n")
    (folder / "requests.jsonl").write_text("".join(lines))
    return folder


def bundled(sent: float) -> dict[str, object]:
    """Eight tokens in events of 4, 3 and 1; the first comes after 0.1 s, and the events are 0.08 s apart."""
    times = [sent + 0.1] * 4 + [sent + 0.18] * 3 + [sent + 0.26]
    return {"sent": sent, "token_times": [round(t, 6) for t in times], "event_tokens": [4, 3, 1]}


def test_the_gaps_of_bundled_streams_lie_between_events_and_their_tokens_are_all_counted(
    tmp_path: Path, capsys: Capture
) -> None:
    run = write_run(tmp_path / "run", [bundled(s) for s in range(9)])
    assert status(["compare", str(run), str(run), "--json"]) == 0
    found = {row["metric"]: row["measured"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert [found["itl_p50"], found["itl_mean"]] == pytest.approx([0.08, 0.08])
    assert found["tpot_mean"] == pytest.approx(0.16 / 7)
    assert found["ttft_mean"] == pytest.approx(0.1)
    assert found["output_tokens_per_s"] == pytest.approx(7.2)


def test_report_and_comparison_say_that_an_event_is_several_tokens(tmp_path: Path, capsys: Capture) -> None:
    run = write_run(tmp_path / "run", [bundled(s) for s in range(9)])
    page = tmp_path / "report.html"
    assert status(["report", str(run), "-o", str(page)]) == 0
    assert "ITL is the time between events; an event carries 2.67 tokens on average" in page.read_text()
    capsys.readouterr()
    status(["compare", str(run), str(run)])
    assert "an event carries 2.67 tokens on average" in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_itl_is_not_compared_between_servers_whose_events_carry_different_numbers(
    tmp_path: Path, capsys: Capture
) -> None:
    run = write_run(tmp_path / "run", [bundled(s) for s in range(9)])
    single = [{"sent": float(s), "token_times": [s + 0.1 + 0.02 * i for i in range(8)]} for s in range(9)]
    other = write_run(tmp_path / "other", single)
    assert status(["compare", str(run), str(other), "--json"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["rows"]
    assert not [row for row in rows if row["metric"].startswith("itl")]
    assert [row for row in rows if row["metric"] == "tpot_mean"]
    assert "ITL is not compared" in captured.out + captured.err


@pytest.mark.parametrize("carried", [[4, 4, 1], [4, 3], [4, 3, 1, 0], [9, -1]])
def test_events_that_do_not_add_up_to_the_tokens_are_refused_by_name(
    tmp_path: Path, capsys: Capture, carried: list[int]
) -> None:
    run = write_run(tmp_path / "run", [bundled(0.0) | {"event_tokens": carried}])
    assert status(["report", str(run), "-o", str(tmp_path / "r.html")]) == 2
    assert "event_tokens: expected positive numbers that add up to the 8 token_times" in capsys.readouterr().err


@pytest.fixture(scope="module")
def streamed() -> Run:
    return observe([1, 4], lengths(400, 40), seconds=8.0).run


def merged_run(run: Run, of: float) -> Run:
    """The run with a share `of` its streams' events merged, 4 into one where all are, 2 where few."""
    times, carried = [], []
    rng = np.random.default_rng(1)
    for stream in run.token_times or []:
        each = spread(len(stream), -(-len(stream) // 4)) if of == 1.0 else [1] * len(stream)
        if of < 1.0 and len(stream) > 20 and rng.random() < of:
            each = [*each[:9], 2, *each[11:]]
        last = np.cumsum(each) - 1
        times.append(np.repeat(stream[last], each))
        carried.append(np.array(each) if any(n > 1 for n in each) else None)
    requests = run.requests.assign(first_token=[t[0] for t in times])
    return replace(run, requests=requests, token_times=times, event_tokens=carried)


def calibrated(run: Run, folder: Path, capsys: Capture) -> tuple[dict[str, Any], str]:
    """What `calibrate` writes of a run, and what it says."""
    write(run, folder / "run")
    # 1: the calibration misses one of its own loads and says so, which is no matter here
    assert status(["calibrate", str(folder / "run"), "-o", str(folder / "c.json"), "--warnings"]) in (0, 1)
    return json.loads((folder / "c.json").read_text()), re.sub(r"\s+", " ", capsys.readouterr().err)


def test_events_of_four_tokens_are_not_read_as_steps(streamed: Run, tmp_path: Path, capsys: Capture) -> None:
    merged = merged_run(streamed, 1.0)
    events = sum(1 if n is None else len(n) for n in merged.event_tokens or []) / len(merged.requests)
    tokens = sum(map(len, merged.token_times or [])) / len(merged.requests) / events
    found, said = calibrated(merged, tmp_path, capsys)
    note = f"fitted through the simulator: an event carries {tokens:.3g} tokens on average"
    assert 3 < tokens <= 4
    assert note in found["source"]["note"]
    assert any("no step was seen" in warning for warning in texts(found["warnings"]))
    assert "tokens on average: no step was seen" in said
    step = found["parameters"]["b0"]["value"] + found["parameters"]["b1"]["value"]
    assert step == pytest.approx(0.0164, rel=0.5)  # a gap between these events is four times as long


def test_a_few_bundled_events_cost_no_run_its_steps(streamed: Run, tmp_path: Path, capsys: Capture) -> None:
    run = merged_run(streamed, 0.5)
    share = sum((c > 1).sum() * 2 for c in run.event_tokens or [] if c is not None) / sum(
        map(len, run.token_times or [])
    )
    assert 0.005 < share < 0.04
    found, said = calibrated(run, tmp_path, capsys)
    assert "through the simulator" not in found["source"]["note"]
    assert f"{share:.2%} of the tokens came several to an event" in said
    b0, b1 = (found["parameters"][name]["value"] for name in ("b0", "b1"))
    assert b0 + b1 == pytest.approx(0.0164, rel=0.05)
