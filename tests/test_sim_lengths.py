"""Lengths and times out of files: public traces, plain CSVs, runs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from sim.model.errors import BadInput
from sim.model.files.lengths import read_lengths
from sim.model.workload import RequestLengths, Workload


def _read(path: Path, text: str, **workload) -> RequestLengths:
    path.write_text(text)
    lengths = read_lengths(Workload(**({"trace": str(path)} | workload)))
    assert lengths is not None
    return lengths


def test_a_plain_csv(tmp_path: Path):
    lengths = _read(tmp_path / "a.csv", "# lengths\nprompt_tokens,output_tokens\n10,3\n\n20,4\n")
    assert lengths.prompt_tokens.tolist() == [10, 20]
    assert lengths.output_tokens.tolist() == lengths.max_new_tokens.tolist() == [3, 4]
    assert lengths.times is None


def test_public_traces_keep_their_times(tmp_path: Path):
    rows = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    lengths = _read(tmp_path / "azure.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    assert lengths.times == pytest.approx([0, 4.314579])
    mooncake = "timestamp_ms,input_tokens,output_tokens\n3000,8,5\n0,7,4\n"
    lengths = _read(tmp_path / "mooncake.csv", mooncake)
    assert lengths.times.tolist() == [0, 3] and lengths.prompt_tokens.tolist() == [7, 8]  # in order of time


def test_what_was_asked_bounds_what_comes_back(tmp_path: Path):
    text = "prompt_tokens,output_tokens\n10,3\n20,400\n"
    lengths = _read(tmp_path / "a.csv", text, trace=None, empirical=str(tmp_path / "a.csv"), max_new_tokens=100)
    assert lengths.output_tokens.tolist() == [3, 100]
    assert lengths.max_new_tokens.tolist() == [100, 100]


def test_requests_begun_in_a_run(tmp_path: Path):
    requests = [
        {"id": 0, "sent": 5.0, "prompt_tokens": 10, "max_new_tokens": 50, "output_tokens": 20, "status": "ok"},
        {"id": 1, "sent": 4.0, "prompt_tokens": 11, "max_new_tokens": 60, "output_tokens": 20, "status": "aborted"},
    ]
    lines = "\n".join(map(json.dumps, requests))
    with gzip.open(tmp_path / "requests.jsonl.gz", "wt") as f:
        f.write(lines + '\n{"id": 2, "se')  # killed while writing
    lengths = read_lengths(Workload(trace=str(tmp_path)))
    assert lengths is not None
    assert lengths.prompt_tokens.tolist() == [11, 10]
    assert lengths.output_tokens.tolist() == [60, 20]  # what an aborted one would have got is what it asked
    assert lengths.times.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.csv:1: empty; expected a CSV or JSON lines"),
        ("lengths\n1\n", "a.csv:1: expected a column prompt_tokens or"),
        ("prompt_tokens\n1\n", "a.csv:1: expected a column output_tokens or"),
        ("# c\nprompt_tokens,output_tokens\n", "a.csv: expected at least one request, found none"),
        ("# c\nprompt_tokens,output_tokens\n1,2\n3,x\n", "a.csv:4: output_tokens: expected a whole number of tokens"),
        ("prompt_tokens,output_tokens\n1,0\n", "a.csv: expected at least one request, found none (a.csv: 1 of 1 rows"),
        ("prompt_tokens,output_tokens\n1,-2\n", "a.csv:2: output_tokens: expected a whole number of tokens"),
        (f"prompt_tokens,output_tokens\n1,{10**400}\n", "a.csv:2: output_tokens: expected"),
        ("prompt_tokens,output_tokens,output_tokens\n1,2,3\n", "a.csv:1: expected one column 'output_tokens'"),
        ("prompt_tokens,output_tokens\n1\n", "a.csv:2: output_tokens: expected a whole number of tokens"),
        ("prompt_tokens,output_tokens\n1,²\n", "a.csv:2: output_tokens: expected a whole number of tokens"),
        ('prompt_tokens,output_tokens\n"1\n2",3\n', "a.csv:2: expected a row that ends on its own line"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n9e12,2,3\n", "a.csv: expected arrivals within 1e+09 s"),
        ("time,prompt_tokens,output_tokens\n2024-13-01,2,3\n", "a.csv:2: time: expected a time (an ISO time such"),
        (
            "prompt_tokens,output_tokens,time\n1,2,now\n",
            "a.csv:2: time: expected a time (an ISO time such as",
        ),
    ],
)
def test_a_bad_file_names_its_line(text: str, message: str, tmp_path: Path):
    with pytest.raises(BadInput) as caught:
        _read(tmp_path / "a.csv", text)
    assert str(caught.value).startswith(str(tmp_path / message))


def test_a_missing_file():
    with pytest.raises(BadInput, match=r"nowhere\.csv: missing; expected a CSV"):
        read_lengths(Workload(trace="nowhere.csv"))


def test_a_run_of_several_workers_is_read_whole(tmp_path: Path):
    for worker in range(2):
        one = {"id": worker, "sent": float(worker), "prompt_tokens": 10 + worker, "output_tokens": 3, "status": "ok"}
        (tmp_path / f"requests-{worker}.jsonl").write_text(json.dumps(one) + "\n")
    lengths = read_lengths(Workload(empirical=str(tmp_path)))
    assert lengths is not None
    assert sorted(lengths.prompt_tokens.tolist()) == [10, 11]


def test_a_request_that_says_nothing_of_its_length_is_refused(tmp_path: Path):
    (tmp_path / "requests.jsonl").write_text('{"id": 4, "sent": 0.0, "prompt_tokens": 10, "status": "aborted"}\n')
    with pytest.raises(BadInput, match="request 4 does not say how many tokens it asked for"):
        read_lengths(Workload(empirical=str(tmp_path)))
