"""Each trap of streaming: what the client writes down when a server does this."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import gevent
import pytest
from servers import END, HEAD, Scripted, chunk, reset, say, tgi_event

from measure.apis import APIS
from measure.loadgen.client import Client, Record, RunClock
from measure.server.endpoint import Endpoint, Unreachable

OPEN: list[Scripted | Client] = []


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def client(server: Scripted | str, api: str = "tgi", patience: float = 5.0) -> Client:
    if isinstance(server, Scripted):
        OPEN.append(server)
        server = server.url
    c = Client(server, APIS[api](), RunClock(time.perf_counter_ns()).now, patience=patience)
    OPEN.append(c)
    return c


def ask(c: Client, tokens: int = 3) -> Record:
    record = Record(7, 0, 0, 0.0, 0.0, 10, tokens)
    c.send(record, "one two three")
    return record


def test_tokens_are_timed_when_they_come_not_when_a_block_is_full() -> None:
    # a hundred bytes, then a second of silence: a reader of 1,024-byte blocks sees nothing until the end
    server = Scripted(say(HEAD, chunk(tgi_event()), 0.3, chunk(tgi_event()), 0.3, chunk(tgi_event(last=3)) + END))
    got = ask(client(server))
    assert got.status == "ok"
    assert len(got.token_times) == 3
    gaps = [b - a for a, b in zip(got.token_times, got.token_times[1:], strict=False)]
    assert min(gaps) > 0.15
    assert got.token_times[0] - got.sent < 0.3


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("space", ["", " "])
def test_events_end_at_a_blank_line_with_or_without_a_space_after_data(end: str, space: str) -> None:
    events = (tgi_event() + tgi_event(last=2)).decode().replace("data:", f"data:{space}").replace("\n", end).encode()
    got = ask(client(Scripted(say(HEAD, chunk(events) + END))))
    assert (got.status, got.output_tokens, got.finish_reason) == ("ok", 2, "length")


def test_an_event_may_come_in_pieces_and_several_in_one() -> None:
    whole = tgi_event() + tgi_event() + tgi_event(last=3)
    pieces = [chunk(whole[i : i + 7]) for i in range(0, len(whole), 7)]
    got = ask(client(Scripted(say(HEAD, *pieces, END))))
    assert (got.status, got.output_tokens) == ("ok", 3)


def test_comments_are_no_tokens() -> None:
    got = ask(client(Scripted(say(HEAD, chunk(b":\n\n"), 0.2, chunk(b":\n\n" + tgi_event(last=1)) + END))))
    assert got.output_tokens == 1
    assert got.token_times[0] - got.sent >= 0.2


def test_an_empty_text_is_a_token_too() -> None:
    got = ask(client(Scripted(say(HEAD, chunk(tgi_event("") + tgi_event("") + tgi_event(last=3)) + END))))
    assert (got.output_tokens, got.generated_tokens) == (3, 3)


@pytest.mark.parametrize(
    ("error_type", "status"),
    [
        ("overloaded", "overloaded"),
        ("validation", "validation"),
        ("generation", "generation"),
        ("incomplete_generation", "incomplete"),
    ],
)
def test_an_error_inside_http_200_is_a_failure_and_keeps_the_tokens_before_it(error_type: str, status: str) -> None:
    error = json.dumps({"error": "said so", "error_type": error_type}).encode()
    got = ask(client(Scripted(say(HEAD, chunk(tgi_event() + b"data:" + error + b"\n\n") + END))))
    assert (got.status, got.error, got.output_tokens) == (status, "said so", 1)


@pytest.mark.parametrize(
    ("code", "body", "status", "error"),
    [
        (
            429,
            b'{"error":"Model is overloaded","error_type":"overloaded"}',
            "overloaded",
            "HTTP 429: too many requests (Model is overloaded)",
        ),
        (422, b'{"error":"too long","error_type":"validation"}', "validation", "HTTP 422: too long"),
        (422, b"Failed to deserialize", "validation", "HTTP 422: Failed to deserialize"),
        (424, b'{"error":"Request failed","error_type":"generation"}', "generation", "HTTP 424: Request failed"),
        (500, b'{"error":"x","error_type":"incomplete_generation"}', "incomplete", "HTTP 500: x"),
        (503, b"", "overloaded", "HTTP 503: overloaded, or not ready yet"),
        (502, b"<html>", "generation", "HTTP 502: a gateway cannot reach the server behind it (an HTML page)"),
        (
            401,
            b'{"error":{"message":"no key","type":"auth","code":401}}',
            "validation",
            "HTTP 401: set SERVECAST_API_KEY (no key)",
        ),
    ],
)
def test_an_answer_that_is_no_stream_is_classified(code: int, body: bytes, status: str, error: str) -> None:
    answer = b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (code, len(body), body)
    got = ask(client(Scripted(say(answer))))
    assert (got.status, got.error, got.output_tokens) == (status, error, 0)


def test_a_reset_midway_keeps_what_came() -> None:
    server = Scripted(lambda s: (s.sendall(HEAD + chunk(tgi_event())), time.sleep(0.1), reset(s)))  # type: ignore[arg-type,return-value]
    got = ask(client(server))
    assert (got.status, got.output_tokens) == ("reset", 1)


def test_a_connection_closed_before_an_answer_is_a_reset() -> None:
    got = ask(client(Scripted(lambda s: s.shutdown(socket.SHUT_RDWR))))
    assert (got.status, got.output_tokens) == ("reset", 0)


def test_a_stream_that_ends_without_a_last_token_is_incomplete() -> None:
    got = ask(client(Scripted(say(HEAD, chunk(tgi_event()) + END))))
    assert (got.status, got.output_tokens) == ("incomplete", 1)


def test_a_stream_cut_in_the_middle_of_a_chunk_is_a_reset() -> None:
    server = Scripted(lambda s: (s.sendall(HEAD + b"ff\r\ndata:{"), s.shutdown(socket.SHUT_RDWR)))  # type: ignore[arg-type,return-value]
    assert ask(client(server)).status == "reset"


def test_refused_is_connect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    got = ask(client(f"http://127.0.0.1:{port}"))
    assert got.status == "connect"


def test_silence_is_a_timeout() -> None:
    got = ask(client(Scripted(say(HEAD, chunk(tgi_event()), 3.0)), patience=0.3))
    assert (got.status, got.output_tokens) == ("timeout", 1)


def test_comments_without_a_token_are_a_timeout_too() -> None:
    comments: list[bytes | float] = [chunk(b":\n\n"), 0.1] * 30
    got = ask(client(Scripted(say(HEAD, *comments, chunk(tgi_event(last=1)) + END)), patience=0.4))
    assert (got.status, got.output_tokens) == ("timeout", 0)


def test_an_event_of_another_api_is_incomplete_and_not_a_crash() -> None:
    got = ask(client(Scripted(say(HEAD, chunk(b"data:<html>\n\n") + END))))
    assert got.status == "incomplete"
    assert "does not belong to this API" in (got.error or "")


def test_being_stopped_leaves_the_record_aborted_with_its_tokens() -> None:
    c = client(Scripted(say(HEAD, chunk(tgi_event() + tgi_event()), 5.0)))
    record = Record(7, 0, 0, 0.0, 0.0, 10, 3)
    user = gevent.spawn(c.send, record, "x")
    for _ in range(200):
        gevent.sleep(0.01)
        if len(record.token_times) == 2:
            break
    user.kill()
    assert (record.status, record.output_tokens) == ("aborted", 2)


def test_what_happens_after_the_last_token_does_not_matter() -> None:
    server = Scripted(lambda s: (s.sendall(HEAD + chunk(tgi_event(last=1))), time.sleep(0.1), reset(s)))  # type: ignore[arg-type,return-value]
    assert ask(client(server)).status == "ok"


def test_a_connection_is_kept_and_a_failed_one_replaced() -> None:
    good = say(HEAD, chunk(tgi_event(last=1)) + END)
    server = Scripted(good, good, say(HEAD, chunk(tgi_event()) + b"ff"), good)
    c = client(server, patience=1.0)
    assert [ask(c).status for _ in range(4)] == ["ok", "ok", "timeout", "ok"]
    assert server.connections == 2


def test_a_kept_connection_that_the_server_has_closed_is_no_failure_and_the_last_that_is_kept() -> None:
    good = say(HEAD, chunk(tgi_event(last=1)) + END)
    server = Scripted(good, reset, good)
    c = client(server)
    assert [ask(c).status for _ in range(4)] == ["ok"] * 4
    assert server.requests == 5  # one met a closed connection
    assert [b"Connection: close" in head for head in server.heads] == [False, False, True, True, True]


def test_a_post_is_never_sent_twice() -> None:
    server = Scripted(reset)
    assert ask(client(server)).status == "reset"
    assert server.requests == 1


def test_what_is_asked_of_tgi() -> None:
    server = Scripted(say(HEAD, chunk(tgi_event(last=1)) + END))
    ask(client(server), tokens=3)
    assert server.heads[0].startswith(b"POST /generate_stream HTTP/1.1\r\n")
    assert json.loads(server.bodies[0]) == {
        "inputs": "one two three",
        "parameters": {"max_new_tokens": 3, "truncate": 10, "details": True},
    }


def test_an_openai_stream_with_a_usage_chunk_and_done() -> None:
    def event(text: str, reason: str | None = None) -> bytes:
        return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": reason}]}).encode() + b"\n\n"

    usage = b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":4}}\n\ndata: [DONE]\n\n'
    server = Scripted(say(HEAD, chunk(event("a") + event("b c") + event("", "length") + usage) + END))
    got = ask(client(server, "completions"))
    assert (got.status, got.output_tokens, got.finish_reason) == ("ok", 4, "length")
    assert (got.generated_tokens, got.counted_prompt) == (4, 11)
    assert (got.event_tokens, got.spread) == ([2, 2], True)  # an event was not a token: the record says so


def test_a_chat_stream_begins_with_a_role_that_is_no_token() -> None:
    def event(delta: dict[str, str | None], reason: str | None = None) -> bytes:
        return b"data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": reason}]}).encode() + b"\r\n\r\n"

    events = event({"role": "assistant", "content": None}) + event({"content": "hi"}) + event({}, "stop")
    got = ask(client(Scripted(say(HEAD, chunk(events) + END)), "chat"))
    assert (got.status, got.output_tokens, got.finish_reason) == ("ok", 1, "eos_token")


def test_an_openai_error_event_is_a_failure() -> None:
    error = b'data: {"error":{"message":"slot unavailable","type":"server_error","code":503}}\n\n'
    got = ask(client(Scripted(say(HEAD, chunk(error) + END)), "completions"))
    assert (got.status, got.error) == ("overloaded", "slot unavailable")


def test_a_prefix_of_the_url_is_kept_and_a_token_goes_only_into_the_header() -> None:
    server = Scripted(say(HEAD, chunk(tgi_event(last=1)) + END))
    OPEN.append(server)
    c = Client(server.url + "/llm", APIS["tgi"](), RunClock(0).now, patience=5.0, token="s3cret")
    OPEN.append(c)
    record = ask(c)
    assert server.heads[0].startswith(b"POST /llm/generate_stream ")
    assert b"Authorization: Bearer s3cret" in server.heads[0]
    assert "s3cret" not in repr(record) and b"s3cret" not in server.bodies[0]


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"])
def test_what_does_not_speak_http_or_dies_in_the_middle_of_a_word_is_no_server(answer: bytes) -> None:
    def play(connection: socket.socket) -> None:
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_RDWR)

    scripted = Scripted(play)
    with pytest.raises(Unreachable, match="no server answers"):
        Endpoint(scripted.url).get("/info")
    scripted.close()
