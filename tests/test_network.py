"""Servers that do not answer, or never to an end: every wait has an end and is announced."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import (
    END,
    HEAD,
    INFO,
    KEY,
    STREAM,
    Command,
    Script,
    Standin,
    answer,
    chunk,
    drip,
    flood,
    openai,
    say,
    serving,
    tgi_event,
)
from warned import texts

SLOW = {
    "never answers": say(5.0),
    "a byte of a status line now and then": drip(b"HTTP/1.1 ", b"2"),
    "headers without end": flood(b"HTTP/1.1 200 OK\r\n", b"x-a: b\r\n" * 1000),
    "a header without end": flood(b"HTTP/1.1 200 OK\r\nx-a: ", b"b" * 65536),
    "interim answers without end": flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "a body a byte at a time": drip(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n", b"{"),
    "a body without end": flood(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536),
}


@pytest.mark.parametrize("script", SLOW.values(), ids=SLOW)
def test_a_server_that_comes_to_no_end_is_given_up_by_doctor_and_measure(
    script: Script, live: str, command: Command, tmp_path: Path
) -> None:
    with serving(script) as server:
        began = time.monotonic()
        found, _, said = command("measure", live, "--url", server.url, "-o", tmp_path / "run", "--timeout", 0.4)
        doctor, out, told = command("doctor", "--url", server.url, "--timeout", 0.4)
        assert time.monotonic() - began < 20
    assert (found, doctor) == (2, 1)
    assert said.count(f"waiting for {server.url} to say what it is (at most 0.4 s)\n") == 1
    assert told.count(f"waiting for {server.url} to say what it is (at most 0.4 s)\n") == 1
    assert said.count("\n") == 2 and "Traceback" not in said
    assert server.url in said.splitlines()[1] and server.url in out
    assert not (tmp_path / "run").exists()


STREAMS = {
    "never answers": (say(1.0), "no token for 0.3 s"),
    "a byte now and then": (drip(HEAD, chunk(b"d")), "no token for 0.3 s"),
    "a status line, a byte now and then": (drip(b"HTTP/1.1 ", b"2"), "no token for 0.3 s"),
    "a line without end": (flood(HEAD, chunk(b"x" * 65536), 8 << 20), "more than 1 MiB arrived without an event"),
    "an event without end": (flood(HEAD, chunk(b"data:x\n" * 4096), 8 << 20), "more than 1 MiB arrived"),
    "comments without end": (
        flood(HEAD, chunk((b":" + b"x" * 4000 + b"\n\n") * 16), 8 << 20),
        "more than 1 MiB arrived",
    ),
    "headers without end": (flood(b"HTTP/1.1 200 OK\r\n", b"x-a: b\r\n" * 8192, 8 << 20), "more than 1 MiB arrived"),
    "an error without end": (flood(b"HTTP/1.1 500 X\r\n\r\n", b"x" * 65536, 8 << 20), "HTTP 500: xxx"),
    "an answer without end": (
        flood(HEAD, chunk(b'data: {"choices":[{"text":"x"}]}\n\n') * 64, 8 << 20),
        "far more events than requested tokens",
    ),
    "depth": (
        say(HEAD + chunk(b'data: {"error":' + b"[" * 5000 + b"]" * 5000 + b"}\n\n") + END),
        "does not belong to this API",
    ),
    "not UTF-8": (say(HEAD + chunk(b'data: {"choices":[{"text":"\xff"}]}\n\n') + END), "does not belong to this API"),
    "a redirect": (
        answer(b"", 307, location=f"https://u:{KEY}@elsewhere/v1/completions"),
        "HTTP 307: redirects to https://elsewhere/v1/completions; if that is the server, give --url https://elsewhere",
    ),
}


def test_streams_that_come_to_no_end_fail_with_their_cause(command: Command, live: str, tmp_path: Path) -> None:
    waiting = [say(STREAM)] * 2 + [script for script, _ in STREAMS.values()]

    def next_one(connection: socket.socket) -> None:
        (waiting.pop(0) if waiting else say(STREAM))(connection)

    with serving(openai(stream=next_one)) as server:
        where = ("--url", server.url, "-o", tmp_path / "run", "--set", "load.seconds=4", "--set", "load.retry=0.01")
        _, _, said = command("measure", live, *where, "--patience", 0.3, "--timeout", 5)
    assert "Traceback" not in said
    records = [json.loads(line) for line in (tmp_path / "run" / "requests.jsonl").read_text().splitlines()]
    for (name, (_, cause)), record in zip(STREAMS.items(), records, strict=False):
        assert cause in (record["error"] or ""), name
        assert record["status"] != "ok" and KEY not in record["error"]
    assert len(records) >= len(STREAMS)


def test_a_warm_up_that_fails_says_why(command: Command, live: str, tmp_path: Path) -> None:
    with serving(openai(stream=answer({"detail": "Not Found"}, 404))) as server:
        found, out, said = command("measure", live, "--url", server.url, "-o", tmp_path / "run")
    assert (found, out) == (2, "")
    assert "a warm-up request failed: validation: HTTP 404: not found" in said
    assert "HTTP 404" in json.loads((tmp_path / "run" / "run.json").read_text())["stopped"]


def test_a_warm_up_that_takes_too_long_is_given_up(command: Command, live: str, tmp_path: Path) -> None:
    with serving(openai(stream=say(4.0))) as server:
        found, _, said = command("measure", live, "--url", server.url, "-o", tmp_path / "run", "--timeout", 0.7)
    assert found == 2
    assert f"timed out after 0.7 s waiting for 2 warm-up requests at {server.url}" in said


def test_the_budget_counts_from_the_start(command: Command, live: str, tmp_path: Path) -> None:
    with serving(say(4.0)) as server:
        found, _, said = command("measure", live, "--url", server.url, "-o", tmp_path / "a", "--budget", 0.5)
        assert found == 2 and f"the budget of 0.5 s was spent waiting for {server.url} to say what it is" in said
    with serving(openai(stream=say(5.0))) as server:
        began = time.monotonic()
        found, _, said = command("measure", live, "--url", server.url, "-o", tmp_path / "b", "--budget", 2)
        assert time.monotonic() - began < 15  # and not a warm-up's ten minutes
        assert found == 2 and "the budget of 2 s was spent waiting for " in said
    assert "the budget of 2 s was spent" in json.loads((tmp_path / "b" / "run.json").read_text())["stopped"]


def test_every_phase_says_once_what_is_waited_for_and_how_long(
    server: tuple[Standin, Path], command: Command, live: str, tmp_path: Path
) -> None:
    url = server[0].url
    found, _, said = command("measure", live, "--url", url, "-o", tmp_path / "run", "--budget", 100)
    assert found == 0
    for what in (
        f"{url} to say what it is (at most 100 s)",
        f"{url} to count the tokens of a prompt (at most ",
        "the load generator to start (at most 30 s)",
        f"2 warm-up requests at {url} (at most ",
        f"1 user to be measured at {url} (at most ",
        "the load generator to stop (at most 7 s)",
    ):
        assert said.count(f"waiting for {what}") == 1, what


def test_metrics_without_end_are_a_gap_that_is_said(command: Command, live: str, tmp_path: Path) -> None:
    tokens = chunk(tgi_event() * 39 + tgi_event(last=40)) + END
    details = {"details": {"prefill": [1] * 60}}
    scraped = [0]

    def metrics(connection: socket.socket) -> None:
        scraped[0] += 1
        (answer(b"tgi_x 1\n") if scraped[0] <= 3 else flood(b"HTTP/1.1 200 OK\r\n\r\n", b"#" * 65536))(connection)

    paths = {
        b"/info": answer(INFO),
        b"/health": answer(),
        b"/metrics": metrics,
        b"/generate": answer(details),
        b"/generate_stream": say(HEAD, 0.02, tokens),
    }
    with serving(paths) as server:
        found, _, said = command("measure", live, "--url", server.url, "-o", tmp_path / "run")
    assert found == 0
    assert "scrapes of the server's metrics failed: " in said and "more than 32 MiB" in said
    assert any(
        "more than 32 MiB" in warning
        for warning in texts(json.loads((tmp_path / "run" / "run.json").read_text())["warnings"])
    )


def test_waits_are_announced_when_piped(tmp_path: Path) -> None:
    with serving(say(3.0)) as server:
        words = [sys.executable, "-m", "scenarios", "doctor", "--url", server.url, "--timeout", "0.3"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert f"waiting for {server.url} to say what it is (at most 0.3 s)\n" in done.stderr
    assert done.returncode == 1


def test_a_started_server_that_is_never_well_is_given_up_with_its_last_answer() -> None:
    from rich.console import Console

    from measure.server.docker import CannotStart, _wait
    from measure.server.endpoint import Endpoint

    class Container:
        status = "running"

        def reload(self) -> None:
            pass

        def logs(self, tail: int) -> bytes:
            return b"Downloading shards\n"

    said = io.StringIO()
    with serving(answer({"error": "Loading"}, 503)) as server, pytest.raises(CannotStart) as given_up:
        _wait(Container(), Endpoint(server.url), Console(file=said, width=200), 0.4)
    assert f"waiting for the started server to be healthy at {server.url} (at most 0.4 s)" in said.getvalue()
    assert "not healthy within 0.4 s (HTTP 503: overloaded, or not ready yet (Loading)): Downloading shards" in str(
        given_up.value
    )
    with serving(say(3.0)) as server, pytest.raises(CannotStart, match="but no byte of an answer has arrived"):
        _wait(Container(), Endpoint(server.url), Console(file=said, width=200), 0.4)
