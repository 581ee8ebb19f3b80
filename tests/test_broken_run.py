"""A run with something in it that cannot be: refused in one line that names it, or read without it, with a warning."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warned import texts

from scenarios.cli.main import status

RECORDED = Path("data/tgi-0.9.4-cpu/long-again")
Head = dict[str, Any]
Records = list[dict[str, Any]]


def copied(folder: Path, head: Callable[[Head], object], requests: Callable[[Records], object]) -> Path:
    """The recorded run with changes to its head and its requests."""
    shutil.copytree(RECORDED, folder)
    said = json.loads((folder / "run.json").read_bytes())
    head(said)
    (folder / "run.json").write_text(json.dumps(said, indent=1))
    records = [json.loads(line) for line in gzip.decompress((folder / "requests.jsonl.gz").read_bytes()).splitlines()]
    requests(records)
    (folder / "requests.jsonl.gz").unlink()
    (folder / "requests.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def nothing(_: object) -> None:
    """No change."""


def rung(number: int, **values: Any) -> Callable[[Head], None]:
    return lambda head: head["rungs"][number].update(values)


def server(**values: Any) -> Callable[[Head], None]:
    return lambda head: head["scenario"].setdefault("server", {}).update(values)


def one(**values: Any) -> Callable[[Records], None]:
    return lambda records: records[5].update(values)


def every(**values: Any) -> Callable[[Records], None]:
    return lambda records: [record.update(values) for record in records] and None


def backward(records: Records) -> None:
    records[5]["token_times"][3] = records[5]["token_times"][1] - 0.001


REFUSED: dict[str, tuple[Callable[[Head], object], Callable[[Records], object], str]] = {
    "a window that ends before it begins": (
        rung(1, end=1.0),
        nothing,
        "rungs[1].end: expected no time before its sett",
    ),
    "a window before its rung": (rung(1, settled=0.5), nothing, "rungs[1].settled: expected no time before its start"),
    "rungs out of order": (rung(1, start=-9.0), nothing, "rungs[1].start: expected no time before the rung before"),
    "a window of 1e300 s": (rung(2, end=1e300), nothing, "rungs[2].end: expected s since the run began, found 1e+300"),
    "no users": (rung(0, users=0), nothing, "rungs[0].users: expected 1 to 100000000, found 0"),
    "fewer than no users": (rung(0, users=-4), nothing, "rungs[0].users: expected 1 to 100000000, found -4"),
    "a thousand million users": (rung(0, users=10**9), nothing, "rungs[0].users: expected 1 to 100000000, found 1000"),
    "a negative rate": (
        rung(0, users=None, rate=-1),
        nothing,
        "rungs[0].rate: expected 0 to 100000000 requests/s, fou",
    ),
    "no prefill budget": (
        server(max_batch_prefill_tokens=0),
        nothing,
        "scenario.server.max_batch_prefill_tokens: expected 1 or more, found 0",
    ),
    "a negative token budget": (
        server(max_batch_total_tokens=-4800),
        nothing,
        "scenario.server.max_batch_total_tokens: expected 1 or more, found -4800",
    ),
    "users who never think": (
        lambda head: head["scenario"].setdefault("load", {}).update(think=-1),
        nothing,
        "scenario.load.think: expected 0 or more, found -1",
    ),
    "a server that is a list": (lambda head: head["scenario"].update(server=[1]), nothing, "scenario.server"),
    "an impossible status": (nothing, one(status="fine"), "requests.jsonl:6: status: expected one of ok, overloaded"),
    "an id that is text": (nothing, one(id="six"), "requests.jsonl:6: id: expected a whole number, found 'six'"),
    "negative lengths": (
        nothing,
        one(prompt_tokens=-1),
        "requests.jsonl:6: prompt_tokens: expected 0 or more, found -1",
    ),
    "an end before its start": (
        nothing,
        one(ended=0.0),
        "requests.jsonl:6: ended: expected no time before it was sent",
    ),
    "nothing of this run": (nothing, every(ended=1e300), "requests.jsonl: expected possible requests: 538"),
}

WARNED: dict[str, tuple[Callable[[Head], object], Callable[[Records], object], str]] = {
    "token times that go backward": (nothing, backward, "requests are left out: token times go backward (id "),
    "a token before its request": (
        nothing,
        lambda records: records[5]["token_times"].__setitem__(0, records[5]["sent"] - 1),
        "requests are left out: a token came before the request was sent (id ",
    ),
    "a token after the end": (
        nothing,
        lambda records: records[5]["token_times"].__setitem__(-1, records[5]["ended"] + 1),
        "requests are left out: a token came after the answer had ended (id ",
    ),
    "a time of 1e300 s": (nothing, one(ended=1e300), "requests are left out: a time is not of this run (id "),
    "a prompt of 1e15 tokens": (
        nothing,
        one(prompt_tokens=10**15),
        "requests are left out: no model takes so many tokens (id ",
    ),
    "a rung that does not exist": (nothing, one(rung=99), "requests name a rung that run.json does not list"),
    "other output tokens than times": (
        nothing,
        one(output_tokens=7),
        "requests have another number of output tokens than of token times",
    ),
    "an id that is there twice": (
        nothing,
        lambda records: records[5].update(id=records[4]["id"]),
        "requests have the id of another one",
    ),
    "a server that told nonsense": (
        lambda head: head.update(info={"max_batch_total_tokens": -5}),
        nothing,
        "the server told max_batch_total_tokens -5, which is impossible",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("command", ["report", "calibrate"])
def test_a_broken_run_is_refused_by_name(what: str, command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    head, requests, said = REFUSED[what]
    run, out = copied(tmp_path / "run", head, requests), tmp_path / "out"
    assert status([command, str(run), "-o", str(out)]) == 2
    shown, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"servecast: {run}/") and said in line, line
    assert not shown and not out.exists()


@pytest.mark.parametrize("what", WARNED)
def test_single_requests_that_cannot_be_are_left_out_and_named(
    what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    head, requests, said = WARNED[what]
    run = copied(tmp_path / "run", head, requests)
    assert status(["compare", str(run), str(RECORDED), "--json"]) == 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    assert said in "\n".join(texts(json.loads(out)["warnings"]))


def test_the_looks_of_a_server_that_are_garbage_are_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = copied(tmp_path / "run", nothing, nothing)
    with (run / "server.jsonl").open("ab") as out:
        for line in (
            b'{"t": "noon", "metrics": {}}',
            b'{"t": 1, "metrics": {"a": "b", "c": [1]}}',
            b"\xff",
            b"[" * 9999,
        ):
            out.write(line + b"\n")
    assert status(["compare", str(run), str(RECORDED)]) == 0
    assert "Traceback" not in capfd.readouterr().err


STEPS = {
    "kind": ("idle", "kind: expected prefill or decode, found 'idle'"),
    "count": (0, "count: expected 1 to 1000000000, found 0"),
    "sequences": (-1, "sequences: expected 1 to 1000000000, found -1"),
    "end": (-1.0, "end: expected no time before its start"),
    "start": (1e300, "start: expected s since the run began, found 1e+300"),
    "tokens": ("many", "tokens: expected a whole number, found 'many'"),
    "used": (-1, "used: expected 0 or more, found -1"),
    "first": (1e300, "first: expected seconds, found 1e+300"),
}


def test_broken_steps_are_refused_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = copied(tmp_path / "run", nothing, nothing)
    good = {"start": 0.0, "end": 0.5, "kind": "prefill", "count": 1, "sequences": 1}
    for key, (value, said) in STEPS.items():
        (run / "steps.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | {key: value}) + "\n")
        assert status(["report", str(run), "-o", str(tmp_path / "report.html")]) == 2
        assert capfd.readouterr().err.startswith(f"servecast: {run}/steps.jsonl:2: {said}"), key


def test_a_run_without_prompt_lengths_is_not_calibrated_from(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """As genai-perf's file makes one, which counts no tokens where the server told none."""
    run = copied(tmp_path / "run", nothing, every(prompt_tokens=0))
    assert status(["calibrate", str(run), "-o", str(tmp_path / "out.json")]) == 2
    err = capfd.readouterr().err
    assert (
        "it does not say how many tokens its prompts had: nothing to calibrate from" in err and "Traceback" not in err
    )
    assert not (tmp_path / "out.json").exists()
