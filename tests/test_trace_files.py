"""Traces as they come: public ones, spreadsheets, JSON lines, with a mapping of columns; simulated to the last row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scenarios.cli.main import status

BOM = b"\xef\xbb\xbf"
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-12 00:00:00.001246+00:00,2399,22
2024-05-12 00:00:00.400813+00:00,1200,47
2024-05-12 00:00:01+00:00,650,18
2024-05-12 00:00:02.512900+00:00,510,31
2024-05-12 00:00:04.100000+00:00,900,12
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1500, "output_length": 100, "hash_ids": [0, 1]}
{"timestamp": 1500, "input_length": 1200, "output_length": 40, "hash_ids": [0]}
{"timestamp": 4200, "input_length": 600, "output_length": 80, "hash_ids": []}
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,276,693,Conversation log
119,ChatGPT,1360,0,1360,API log
"""
BAILIAN = """{"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.5, "input_length": 15, "output_length": 5}
{"chat_id": 2, "parent_chat_id": 1, "timestamp": 62, "input_length": 16, "output_length": 5}
{"chat_id": 3, "parent_chat_id": -1, "timestamp": 64.25, "input_length": 17, "output_length": 5}
"""
MAPPED = "{file: trace, columns: {time: when, prompt_tokens: usage.in, output_tokens: out}, time_unit: ms}"


def scenario(folder: Path, trace: str, text: str | bytes, name: str = "trace", **load: Any) -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    lines = json.dumps({"trace": True, "seconds": None} | load)
    path = folder / "asked.yaml"
    path.write_text(
        f"format: 2\nname: asked\nextends: llama2-70b-1500-100\nworkload: {{trace: {trace}}}\nload: {lines}\n"
        "server: {max_input_length: 7900, max_total_tokens: 8000, max_batch_prefill_tokens: 8000}\n"
    )
    return path


def simulated(folder: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[dict[str, Any]], str]:
    """The requests of the run that `simulate -o` wrote, and what it said."""
    capsys.readouterr()
    code = status(["simulate", str(path), "--replicates", "19", "--jobs", "1", "-o", str(folder / "out")])
    said = capsys.readouterr().err
    assert code == 0, said
    lines = (folder / "out" / "asked" / "run" / "requests.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], said + (folder / "out" / "asked" / "forecast.json").read_text()


@pytest.mark.parametrize(
    ("text", "times", "lengths", "warning"),
    [
        (AZURE_2024, [0, 0.399567, 0.998754, 2.511654, 4.098754], [2399, 1200, 650, 510, 900], ""),
        (MOONCAKE, [0, 1.5, 4.2], [1500, 1200, 600], ""),
        (gzip.compress(MOONCAKE.encode()), [0, 1.5, 4.2], [1500, 1200, 600], ""),
        (BAILIAN, [0, 0.5, 2.75], [15, 16, 17], "times are taken for seconds"),
        (BAILIAN.replace("61.5", "61"), [0, 1, 3.25], [15, 16, 17], "times are taken for seconds"),
        (
            "time,prompt_tokens,output_tokens\n45424.5,15,10\n45424.50001157,16,10\n",
            [0, 1.157e-5],
            [15, 16],
            "2 requests within 1.16e-05 s: are the times in another unit (time_unit)?",
        ),
        (
            "time,prompt_tokens,output_tokens,max_tokens\n0,15,10,5\n1,16,10,20\n",
            [0, 1],
            [15, 16],
            "1 answers are longer than max_new_tokens, and are cut to it",
        ),
        (BURSTGPT, [0, 40, 113], [472, 1087, 417], "1 of 4 rows have no answer (failed requests) and are left out"),
        (
            "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,1500,100\n0.052,1200,80\n4.31,374,44\n",
            [0, 0.052, 4.31],
            [1500, 1200, 374],
            "",
        ),
        (
            BOM + b"time,prompt_tokens,output_tokens\r\n0,15,10\r\n1.5,16,10\r\n8,17,10\r\n",
            [0, 1.5, 8],
            [15, 16, 17],
            "",
        ),
        (
            "time;prompt_tokens;output_tokens\n0,5;15;10\n2,25;16;10\n",
            [0, 1.75],
            [15, 16],
            "decimal commas are read as points",
        ),
        (
            "timestamp,prompt_tokens,output_tokens\n1715472000123,15,10\n1715472001623,16,10\n",
            [0, 1.5],
            [15, 16],
            "unix times in ms",
        ),
        (
            "timestamp,prompt_tokens,output_tokens\n1715472000123456789,15,10\n1715472000123457789,16,10\n",
            [0, 1e-6],
            [15, 16],
            "unix times in ns",
        ),
        (
            "time,prompt_tokens,output_tokens\n2024-05-12T02:00:01+02:00,16,10\n2024-05-12T00:00:00.5Z,15,10\n",
            [0, 0.5],
            [15, 16],
            "times are not in order",
        ),
    ],
)
def test_a_trace_is_simulated_as_it_came(
    text: str | bytes,
    times: list[float],
    lengths: list[int],
    warning: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    requests, said = simulated(tmp_path, scenario(tmp_path, "trace", text), capsys)
    assert [r["scheduled"] for r in requests] == pytest.approx(times, abs=1e-6)
    assert [r["prompt_tokens"] for r in requests] == lengths
    assert warning in said


def test_columns_units_and_nested_keys_are_as_the_scenario_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"when": 500 * i, "usage": {"in": 10 + i}, "out": 5, "prompt_tokens": 9} for i in range(5)]
    path = scenario(tmp_path, MAPPED, "\n".join(map(json.dumps, rows)))
    requests, _ = simulated(tmp_path, path, capsys)
    assert [r["scheduled"] for r in requests] == [0, 0.5, 1, 1.5, 2]
    assert [r["prompt_tokens"] for r in requests] == [10, 11, 12, 13, 14]


def test_scale_keeps_the_hours_and_compress_shortens_the_gaps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    times = np.sort(np.concatenate([rng.uniform(0, 3600, 15), rng.uniform(3600, 7200, 45), [0.0, 7200.0]]))
    text = "time,prompt_tokens,output_tokens\n" + "".join(f"{t},20,2\n" for t in times)
    counts = {}
    for scale in (0.5, 1, 2, 2.5):
        path = scenario(tmp_path, f"{{file: trace, scale: {scale}}}", text)
        requests, _ = simulated(tmp_path, path, capsys)
        sent = np.array([r["scheduled"] for r in requests])
        assert sent.max() <= 7200
        counts[scale] = (len(sent), int((sent < 3600).sum()))
        emptied(tmp_path / "out")
    assert counts[1] == (62, 16)
    assert counts[2][0] == 124
    assert counts[2.5][0] == pytest.approx(155, abs=15)
    assert counts[0.5][0] == pytest.approx(31, abs=15)
    assert counts[2][1] < 0.45 * counts[2][0]  # the quiet hour stays the quiet one
    path = scenario(tmp_path, "{file: trace, compress: 4}", text)
    requests, _ = simulated(tmp_path, path, capsys)
    assert [r["scheduled"] for r in requests] == pytest.approx((times / 4).tolist(), abs=1e-5)


def emptied(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("trace", "text", "message"),
    [
        (
            "trace",
            "prompt_tokens,output_tokens\n1,2\n3,4\n",
            "trace: load.trace: expected a workload.trace with",
        ),
        (
            "trace",
            "time,prompt_tokens,output_tokens\n1,1,2\n1,3,4\n",
            "trace: load.trace: expected requests at",
        ),
        ("trace", "when,a,b\n1,1,2\n", "expected a column prompt_tokens or contexttokens"),
        ("trace", "when,a,b\n1,1,2\n", "found 'when', 'a', 'b'"),
        ("{file: trace, columns: {time: wenn}}", "when,a,b\n1,1,2\n", "expected a column prompt_tokens"),
        (
            "{file: trace, columns: {time: wenn}}",
            "when,prompt_tokens,output_tokens\n1,1,2\n",
            "trace:1: columns.time: no column 'wenn' in it; did you mean when?",
        ),
        (MAPPED, '{"when": 1, "usage": {"in": 3}}\n', "trace:1: columns.output_tokens: no column 'out' in it"),
        ("{file: trace, time_unit: min}", "x", "time_unit: expected one of s, ms, us, ns"),
        ("{file: trace, scale: 0}", "x", "scale: expected more than 0"),
        ("{file: trace, colums: {}}", "x", "did you mean columns?"),
        ("{columns: {time: t}}", "x", "workload.trace.file: missing"),
        ("{file: nowhere}", "x", "workload.trace.file: no such file"),
        (
            "trace",
            "time,prompt_tokens,output_tokens\n1,5,5\n2024-05-12,6,6\n",
            "trace:3: time: expected a time (a",
        ),
        (
            "trace",
            "time,prompt_tokens,output_tokens\n2024-05-12T02:00+02:00,5,5\n2024-05-12T02:00:01,6,6\n",
            "trace:3: time: expected times all with a zone or all without, found both",
        ),
        ("trace", b"PAR1\xff\xfe\x00", "trace: not UTF-8 text; expected a CSV or JSON lines"),
        ("trace", b"\x1f\x8b\x08broken", "trace: cannot be read"),
        ("trace", "time,prompt_tokens,output_tokens\n1,5,5\n2,6\n", "trace:3: output_tokens: expected a whole number"),
    ],
)
def test_a_trace_that_cannot_be_meant_is_named(
    trace: str, text: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scenario(tmp_path, trace, text)
    assert status(["simulate", str(path), "--replicates", "19", "--jobs", "1"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_file_of_lengths_takes_a_mapping_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lengths").write_text("a;b\n12;3\n12;3\n")
    path = tmp_path / "asked.yaml"
    given = "{file: lengths, columns: {prompt_tokens: a, output_tokens: b}}"
    path.write_text(
        f"format: 2\nname: asked\nextends: llama2-70b-1500-100\nworkload: {{empirical: {given}}}\n"
        "load: {users: [2], seconds: 20}\n"
    )
    requests, _ = simulated(tmp_path, path, capsys)
    assert {(r["prompt_tokens"], r["output_tokens"]) for r in requests if r["status"] == "ok"} == {(12, 3)}
    assert status(["simulate", str(path), "--set", "workload.empirical.scale=2"]) == 2
    assert "workload.empirical.scale: expected it under trace" in capsys.readouterr().err


def test_one_key_of_a_short_trace_can_be_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scenario(tmp_path, "trace", MOONCAKE)
    assert (
        status(
            ["simulate", str(path), "--replicates", "19", "--jobs", "1", "--set", "workload.trace.compress=2", "--json"]
        )
        == 0
    )
    assert '"compress": 2' in capsys.readouterr().out


def test_lognormal_lengths_keep_their_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "asked.yaml"
    law = "{lognormal: {mean: 300, cv: 2, low: 100, high: 400}}"
    path.write_text(
        f"format: 2\nname: asked\nextends: llama2-70b-1500-100\nworkload: {{prompt_tokens: {law}, output_tokens: 5}}\n"
        "load: {users: [8], seconds: 30}\n"
    )
    requests, _ = simulated(tmp_path, path, capsys)
    drawn = [r["prompt_tokens"] for r in requests]
    assert (min(drawn), max(drawn)) == (100, 400)
    assert status(["simulate", str(path), "--set", "workload.prompt_tokens.lognormal.high=50"]) == 2
    assert "workload.prompt_tokens.lognormal.high: expected at least low (100), found 50" in capsys.readouterr().err
