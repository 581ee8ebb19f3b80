"""What is written survives a kill, and the server's own metrics cross-check the streams."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from warned import texts

from measure.journal import Journal
from measure.loadgen.messages import Report
from measure.server.cross_check import by_metrics, by_streams, disagreements
from measure.server.exposition import parse
from measure.standin.tgi.metrics import TgiMetrics
from sim.engines.tgi_0_9_4 import Flags
from sim.model.errors import BadInput
from sim.model.files.json_lines import Lines
from sim.model.scenario import Load, Scenario
from sim.model.workload import Lengths, Workload
from sim.run import read_run

SCENARIO = Scenario(
    server=Flags(),
    name="j",
    workload=Workload(prompt_tokens=Lengths(uniform=(5, 9)), output_tokens=3),
    load=Load(users=[1]),
)


def test_a_torn_last_line_is_cut_off_on_opening(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for torn, left in (
        (b'{"a":1}\n{"b"', b'{"a":1}\n'),
        (b'{"b"', b""),
        (b'{"a":1}\n', b'{"a":1}\n'),
        (b"", b""),
        (b'{"a":1}\n' + b"x" * 200_000, b'{"a":1}\n'),
    ):
        path.write_bytes(torn)
        lines = Lines(path)
        lines.write(b'{"c":3}')
        lines.close()
        assert path.read_bytes() == left + b'{"c":3}\n'


def test_a_run_is_a_run_before_its_first_request(tmp_path: Path) -> None:
    journal = Journal.begin(tmp_path / "run", SCENARIO, seed=3)
    Lines(tmp_path / "run" / "requests.jsonl").close()
    journal.add(Report(worker=0, t=1.0, lags=[0.001], cpu=0.1))
    journal.close()
    run = read_run(tmp_path / "run")
    assert (run.kind, run.rungs, len(run.requests)) == ("measured", [], 0)
    assert run.scenario == SCENARIO
    assert json.loads((tmp_path / "run" / "client.jsonl").read_text())["lags"] == [0.001]
    with pytest.raises(BadInput, match="never overwritten"):
        Journal.begin(tmp_path / "run", SCENARIO)


def test_a_resumed_run_goes_on_after_everything_on_record_whatever_the_wall_clock_says(tmp_path: Path) -> None:
    out = tmp_path / "run"
    journal = Journal.begin(out, SCENARIO)
    journal.rungs.append({"users": 1, "start": 5.0, "end": None, "status": "aborted"})
    journal.save()
    journal.close()
    record = {"id": 41, "sent": 5.0, "ended": 9000.0, "prompt_tokens": 1, "status": "ok"}
    (out / "requests.jsonl").write_text(json.dumps(record) + '\n{"id": 99, "en')
    again = Journal.resume(out, SCENARIO)
    again.close()
    assert again.first_id == 42
    assert again.segment == 1
    assert again.head["segments"] == [{"start": 0.0, "first_rung": 0}, {"start": 9001.0, "first_rung": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "expected a measured run"),
        ('{"format": 2, "kind": "simulated"}', "expected a measured run"),
        ('{"format": 9, "kind": "measured"}', "expected a measured run of format 1"),
        ('{"format": 2, "kind": "measured", "scenario": {"name": "other"}}', "begun with another .*name"),
    ],
)
def test_what_cannot_be_resumed_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(BadInput, match=message):
        Journal.resume(tmp_path, SCENARIO)


def test_what_an_exposition_says_is_read_back_without_its_buckets() -> None:
    e = TgiMetrics(1024, 2048)
    assert e.text().strip() == ""
    e.count("tgi_request_count")
    e.count("tgi_request_failure", "err", "overloaded")
    e.count("tgi_request_failure", "err", "overloaded")
    e.gauge("tgi_queue_size", 3)
    for seconds in (0.001, 0.5, 1000.0):
        e.observe("tgi_request_duration", seconds)
    assert parse(e.text()) == {
        "tgi_request_count": 1,
        'tgi_request_failure{err="overloaded"}': 2,
        "tgi_queue_size": 3,
        "tgi_request_duration_sum": 1000.501,
        "tgi_request_duration_count": 3,
    }
    counts = [int(line.split()[-1]) for line in e.text().splitlines() if "_bucket" in line]
    assert counts == sorted(counts) and counts[-1] == 3 and counts[-2] == 2  # cumulative; the last is +Inf


def test_an_exposition_of_another_server_is_read_too() -> None:
    text = '# HELP x\nvllm:tokens_total{model="a b",le="1"} 3.5e2 1700000000\nx_bucket{le="1"} 3\nbroken\nup NaN\n'
    found = parse(text)
    assert found['vllm:tokens_total{model="a b",le="1"}'] == 350.0
    assert set(found) == {'vllm:tokens_total{model="a b",le="1"}', "up"}


def streams(users: int, steps: int, step: float = 0.02, jitter: float = 0.0) -> list[np.ndarray]:
    """Every user gets a token each step, after one prefill of all."""
    rng = np.random.default_rng(0)
    times = np.arange(steps) * step
    return [np.sort(times + rng.uniform(0, jitter, steps)) for _ in range(users)]


@pytest.mark.parametrize("users", [1, 2, 16])
def test_tokens_that_come_together_are_one_step(users: int) -> None:
    found = by_streams(streams(users, 201, jitter=0.004), -1.0, 10.0)
    assert found.number == 201
    assert found.decode == pytest.approx(0.02, rel=0.03)


def test_a_request_has_one_token_a_step_however_close_they_come() -> None:
    delayed = np.cumsum([0.004, 0.036, 0.020, 0.020] * 50)  # now and then a token comes late, and the next on time
    assert by_streams([delayed], -1.0, 10.0).number == 200


def test_first_tokens_are_a_step_of_their_own() -> None:
    old = np.arange(0, 1.0, 0.02)
    new = np.concatenate([[0.503], np.arange(0.521, 1.0, 0.02)])
    shifted = np.concatenate([old[old <= 0.5], old[old > 0.5] + 0.001])
    # decode at 0.500, the newcomer's prefill right after it, everybody's decode at 0.521
    assert by_streams([shifted, new], 0.49, 0.53).number == 3


def run_with(tmp_path: Path, decode_seconds: float, decodes: int) -> Path:
    out = tmp_path / "run"
    journal = Journal.begin(out, SCENARIO)
    journal.rungs.append({"users": 2, "start": 0.0, "ramped": 0.0, "settled": 1.0, "end": 4.0, "status": "complete"})
    journal.save()
    journal.close()
    with (out / "requests.jsonl").open("w") as file:
        for i, times in enumerate(streams(2, 250)):
            record: dict[str, Any] = {"id": i, "sent": 0.0, "ended": 5.0, "prompt_tokens": 5, "status": "ok"}
            file.write(json.dumps(record | {"token_times": times.tolist(), "user": i}) + "\n")
    with (out / "server.jsonl").open("w") as file:
        for t in np.arange(0.0, 5.01, 0.5):
            count = decodes * t / 5.0
            metrics = {
                'tgi_batch_inference_count{method="decode"}': count,
                'tgi_batch_inference_duration_sum{method="decode"}': count * decode_seconds,
            }
            file.write(json.dumps({"t": t, "metrics": metrics}) + "\n")
    return out


@pytest.mark.parametrize(
    ("seconds", "decodes", "warnings"),
    [
        (0.02, 250, []),
        (0.0204, 245, []),
        (0.02, 300, ["the streams show 150 steps, the server counted 180"]),
        (0.017, 250, ["a decode step takes 20.00 ms by the streams, 17.00 ms by the server's metrics"]),
    ],
)
def test_counters_that_differ_from_the_streams_warn(
    tmp_path: Path, seconds: float, decodes: int, warnings: list[str]
) -> None:
    found = disagreements(read_run(run_with(tmp_path, seconds, decodes)))
    assert texts(found.get(0, [])) == warnings


@pytest.mark.parametrize(
    ("gap", "steps", "warnings"),
    [
        (0.02, 250, []),
        (0.02, 300, ["the streams show 150 steps, the server counted 180"]),
        (0.017, 250, ["the mean gap between tokens is 20.00 ms by the streams, 17.00 ms by the server's metrics"]),
    ],
)
def test_so_must_the_metrics_of_vllm(tmp_path: Path, gap: float, steps: int, warnings: list[str]) -> None:
    out = run_with(tmp_path, 0.02, 250)
    with (out / "server.jsonl").open("w") as file:
        for t in np.arange(0.0, 5.01, 0.5):
            names = (
                "iteration_tokens_total_count",
                "inter_token_latency_seconds_count",
                "inter_token_latency_seconds_sum",
            )
            counts = (steps * t / 5.0, 100 * t, 100 * t * gap)
            metrics = {f'vllm:{name}{{engine="0"}}': count for name, count in zip(names, counts, strict=True)}
            file.write(json.dumps({"t": t, "metrics": metrics}) + "\n")
    assert texts(disagreements(read_run(out)).get(0, [])) == warnings


def test_in_mixed_steps_a_first_token_shares_its_step_with_others(tmp_path: Path) -> None:
    times = [np.arange(0.0, 1.0, 0.02), np.arange(0.1, 1.0, 0.02)]
    assert by_streams(times, 0.0, 1.0, mixed=True).number == 50
    assert by_streams(times, 0.0, 1.0).number > 50


def test_counters_without_durations_check_the_number_of_steps_alone(tmp_path: Path) -> None:
    out = run_with(tmp_path, 0.02, 250)
    text = (out / "server.jsonl").read_text()
    (out / "server.jsonl").write_text(text.replace("duration_sum", "something_else"))
    assert disagreements(read_run(out)) == {}


def test_a_window_that_was_not_scraped_is_not_cross_checked(tmp_path: Path) -> None:
    assert by_metrics([], 0.0, 1.0) is None
    assert by_metrics([(0.0, {}), (5.0, {})], 1.0, 9.0) is None
    out = run_with(tmp_path, 0.5, 10)
    os.remove(out / "server.jsonl")
    assert disagreements(read_run(out)) == {}
