"""The stand-in answers as TGI 0.9.4 does, over real HTTP (router/src/server.rs)."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from servers import Standin, quick_calibration, reset, standin

from measure.server.exposition import parse
from measure.standin.faults import Faults, parse_faults
from measure.standin.tgi.validation import Body, Parameters, Refused, prompt_length
from sim.engines.tgi_0_9_4 import Flags

SERVER = Flags(max_batch_total_tokens=20000)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(quick_calibration(tmp_path_factory.mktemp("standin")))


@pytest.fixture(scope="module")
def server(calibration: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Standin, Path]]:
    log = tmp_path_factory.mktemp("log")
    with standin("--calibration", calibration, log=log) as process:
        yield process, log


def call(url: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, raw, {"content-type": "application/json"} | headers)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def ask(n: int = 4, inputs: str = "one two three", **parameters: Any) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": {"max_new_tokens": n, **parameters}}


def test_info_says_what_0_9_4_says_and_no_more(server: tuple[Standin, Path]) -> None:
    status, _, body = call(server[0].url, "/info")
    info = json.loads(body)
    assert status == 200
    assert {"max_batch_prefill_tokens", "requires_padding"}.isdisjoint(info)
    assert (info["version"], info["max_batch_total_tokens"], info["max_input_length"]) == ("0.9.4", 20000, 1024)
    assert [call(server[0].url, path)[0] for path in ("/health", "/ping", "/")] == [200, 200, 200]


def test_a_whole_answer_has_its_times_in_whole_milliseconds(server: tuple[Standin, Path]) -> None:
    status, headers, body = call(server[0].url, "/generate", ask(5, details=True, decoder_input_details=True))
    said = json.loads(body)
    assert status == 200
    details = said["details"]
    assert (details["finish_reason"], details["generated_tokens"], len(details["tokens"])) == ("length", 5, 5)
    assert said["generated_text"] == "".join(t["text"] for t in details["tokens"])
    assert [t["logprob"] for t in details["prefill"]] == [None, -0.5, -0.5, -0.5]  # three words and the beginning
    times = {name: int(headers[f"x-{name}-time"]) for name in ("total", "validation", "queue", "inference", "compute")}
    assert times["total"] == times["compute"] >= times["inference"] >= 2 + 4 * 3  # one prefill and four decodes
    assert int(headers["x-time-per-token"]) <= times["inference"]
    assert (headers["x-compute-type"], headers["x-compute-characters"]) == ("gpu+optimized", "13")
    assert "details" not in json.loads(call(server[0].url, "/generate", ask(2))[2])
    assert isinstance(json.loads(call(server[0].url, "/", ask(2))[2]), list)


def test_a_stream_is_an_event_a_token_without_a_space_and_without_done(server: tuple[Standin, Path]) -> None:
    status, headers, body = call(server[0].url, "/generate_stream", ask(3, details=True))
    assert (status, headers["content-type"], headers["x-accel-buffering"]) == (200, "text/event-stream", "no")
    assert "x-total-time" not in headers
    assert body.endswith(b"\n\n") and b"\r" not in body
    events = body.decode().removesuffix("\n\n").split("\n\n")
    assert all(event.startswith('data:{"token":{"id":') for event in events)
    said = [json.loads(event[5:]) for event in events]
    assert len(said) == 3
    assert [e["generated_text"] for e in said[:2]] == [e["details"] for e in said[:2]] == [None, None]
    assert said[2]["generated_text"] == "".join(e["token"]["text"] for e in said)
    assert said[2]["details"] == {"finish_reason": "length", "generated_tokens": 3, "seed": None}
    _, _, plain = call(server[0].url, "/generate_stream", ask(1))
    assert json.loads(plain[5:])["details"] is None
    assert call(server[0].url, "/", ask(3) | {"stream": True})[2].count(b"data:") == 3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"temperature": 0.0}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": -1.0}, "`repetition_penalty` must be strictly positive"),
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 0.0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
        ({"truncate": 1025}, "`truncate` must be strictly positive and less than 1024. Given: 1025"),
        ({"max_new_tokens": 2048}, "must be <= 2048. Given: 4 `inputs` tokens and 2048 `max_new_tokens`"),
        ({"top_p": 1.0, "max_new_tokens": 0}, "`top_p`"),  # the router's own order
        ({"max_new_tokens": 0, "truncate": 0}, "`max_new_tokens`"),
    ],
)
def test_validation_refuses_in_the_routers_words(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused) as refused:
        prompt_length(Body("one two three", Parameters(**parameters)), SERVER, streamed=False)
    assert refused.value.status == 422
    assert message in refused.value.body["error"]
    assert refused.value.body["error_type"] == "validation"


def test_lengths_are_words_and_a_beginning_cut_to_truncate() -> None:
    long = "w " * 1100
    assert prompt_length(Body("a b c", Parameters()), SERVER, True) == 4
    assert prompt_length(Body(long, Parameters(truncate=1024)), SERVER, True) == 1024  # equality is allowed
    with pytest.raises(Refused, match=r"less than 1024 tokens\. Given: 1101"):
        prompt_length(Body(long, Parameters(max_new_tokens=10)), SERVER, True)
    with pytest.raises(Refused, match="cannot be empty"):
        prompt_length(Body("", Parameters()), SERVER, True)


def test_errors_over_http(server: tuple[Standin, Path]) -> None:
    url = server[0].url
    status, _, body = call(url, "/generate", ask(0))
    assert (status, json.loads(body)["error_type"]) == (422, "validation")
    status, _, body = call(url, "/generate_stream", ask(0))
    assert status == 200
    assert body.startswith(b'data:{"error"') and json.loads(body[5:])["error_type"] == "validation"
    assert b"decoder_input_details" in call(url, "/generate_stream", ask(2, decoder_input_details=True))[2]
    assert b"`best_of` must be" in call(url, "/generate", ask(2, best_of=3, do_sample=True))[2]
    assert json.loads(call(url, "/generate", ask(2, best_of=2, do_sample=True))[2])["generated_text"]
    # what is no request at all is refused in plain text
    assert call(url, "/generate", b"{")[0] == 400
    assert call(url, "/generate", {"input": "x"})[0] == 422
    assert call(url, "/generate", b"{}", **{"content-type": "text/plain"})[0] == 415
    assert call(url, "/generate", b" " * (3 << 20))[0] == 413


def request_of(body: dict[str, Any]) -> bytes:
    raw = json.dumps(body).encode()
    head = "POST /generate_stream HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
    return f"{head}{len(raw)}\r\n\r\n".encode() + raw


def test_429_comes_before_422_and_a_client_that_leaves_frees_its_permit(calibration: str) -> None:
    with standin("--calibration", calibration, "--max-concurrent-requests", "1") as process:
        address = urlsplit(process.url)
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as holder:
            holder.sendall(request_of(ask(1500)))
            received = b""
            while b"data:" not in received:
                received += holder.recv(4096)
            status, _, body = call(process.url, "/generate", ask(0))
            assert (status, json.loads(body)["error_type"]) == (429, "overloaded")
            assert json.loads(call(process.url, "/generate_stream", ask(2))[2][5:])["error_type"] == "overloaded"
        deadline = time.monotonic() + 10
        while call(process.url, "/generate", ask(2))[0] != 200:  # it takes the server a moment to notice
            assert time.monotonic() < deadline
        seen = parse(call(process.url, "/metrics")[2].decode())
    assert seen['tgi_request_failure{err="overloaded"}'] >= 2
    assert seen["tgi_request_success"] == 1


@pytest.mark.parametrize("go", [socket.socket.close, reset], ids=["closed", "reset"])
def test_clients_that_leave_at_once_are_no_fault(
    calibration: str, go: Callable[[socket.socket], None], capfd: pytest.CaptureFixture[str]
) -> None:
    with standin("--calibration", calibration) as process:
        address = urlsplit(process.url)
        for _ in range(20):
            connection = socket.create_connection((address.hostname or "", address.port or 0), timeout=10)
            connection.sendall(request_of(ask(20)))
            go(connection)
        assert call(process.url, "/generate", ask(2))[0] == 200  # and it has got over all of them
    assert capfd.readouterr().err == ""


def test_silence_is_broken_by_comments(calibration: str) -> None:
    faults = ("--fault", "stall=1", "--fault", "comments=0.1")
    with standin("--calibration", calibration, *faults) as process:
        address = urlsplit(process.url)
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as connection:
            connection.sendall(request_of(ask(1)))
            received = b""
            while received.count(b":\n\n") < 2:
                received += connection.recv(4096)
    assert b"data:" not in received


def test_crlf_on_demand(calibration: str) -> None:
    with standin("--calibration", calibration, "--fault", "crlf") as process:
        body = call(process.url, "/generate_stream", ask(2))[2]
    assert body.count(b"\r\n\r\n") == 2


def test_it_dies_on_demand(calibration: str) -> None:
    with standin("--calibration", calibration, "--fault", "die=0.2") as process:
        assert process.wait(20) == 1


def test_metrics_appear_with_their_first_event_and_add_up(calibration: str) -> None:
    with standin("--calibration", calibration) as process:
        assert b"tgi_request_success" not in call(process.url, "/metrics")[2]
        for n in (1, 3, 5):
            call(process.url, "/generate_stream", ask(n))
        call(process.url, "/generate", ask(0))
        text = call(process.url, "/metrics")[2].decode()
        seen = parse(text)
    assert seen["tgi_request_count"] == 4
    assert seen["tgi_request_success"] == seen["tgi_request_generated_tokens_count"] == 3
    assert seen['tgi_request_failure{err="validation"}'] == 1
    assert seen["tgi_request_generated_tokens_sum"] == 9
    assert seen["tgi_request_input_length_sum"] == 12
    assert seen['tgi_batch_inference_count{method="prefill"}'] == seen["tgi_batch_next_size_count"] == 3
    assert seen['tgi_batch_inference_duration_count{method="decode"}'] == 6
    assert seen['tgi_batch_inference_duration_sum{method="decode"}'] >= 6 * 0.0030
    assert seen["tgi_batch_current_size"] == seen["tgi_queue_size"] == 0
    assert 'tgi_request_duration_bucket{le="+Inf"} 3' in text
    assert 'tgi_request_duration_bucket{le="0.00015000000000000001"} 0' in text  # 0.0001 · 1.5^k


def test_the_log_is_what_was_done(server: tuple[Standin, Path]) -> None:
    process, log = server
    call(process.url, "/generate_stream", ask(6), **{"X-Request-Id": "mine"})
    tokens = [json.loads(line) for line in (log / "tokens.jsonl").read_text().splitlines()]
    mine = next(t for t in tokens if t["id"] == "mine")
    assert len(mine["sent"]) == 6
    steps = [json.loads(line) for line in (log / "steps.jsonl").read_text().splitlines()]
    for before, after in itertools.pairwise(steps):  # one step at a time
        assert after["start"] >= before["end"] - 1e-9
    for step in steps:
        assert step["end"] - step["start"] == pytest.approx(
            0.006 + 1e-5 * step["decode_sequences"]
            if step["decode_sequences"]
            else 0.004 + 1e-6 * step["prefill_tokens"]
        )
        assert len(step["members"]) == step["decode_sequences"] + step["prefill_sequences"]
        assert step["sent"] >= step["end"]
    ends = [s["end"] for s in steps if s["start"] >= mine["queued"]][:6]
    assert all(sent >= end for sent, end in zip(mine["sent"], ends, strict=True))


def test_faults_are_shares_of_requests_and_bad_ones_are_refused() -> None:
    assert parse_faults(["reset=0.5", "crlf", "die=3"]) == Faults(reset=0.5, crlf=True, die=3.0)
    for text, message in (("resett=1", "expected one of"), ("reset=x", "a number"), ("reset=2", "a share of requests")):
        with pytest.raises(ValueError, match=message):
            parse_faults([text])
