"""Servers that answer otherwise than wanted: every cause is named, and no secret is shown."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from servers import (
    INFO,
    KEY,
    Command,
    Script,
    answer,
    say,
    serving,
)

CAUSES = {
    401: ("HTTP 401: set SERVECAST_API_KEY (no key)", {"error": {"message": "no key"}}, {}),
    403: ("HTTP 403: forbidden; the key in SERVECAST_API_KEY lacks the permission, or is not set", b"", {}),
    404: (
        "HTTP 404: not found; check the URL and --model (Not Found)",
        {"detail": "Not Found"},
        {},
    ),
    429: ("HTTP 429: too many requests (slow down; retry after 30)", {"error": "slow down"}, {"retry_after": "30"}),
    503: ("HTTP 503: overloaded, or not ready yet (Loading model)", {"error": {"message": "Loading model"}}, {}),
    422: ("HTTP 422: field required", {"detail": [{"msg": "field required", "loc": []}]}, {}),
    500: ("HTTP 500: it broke [31m here", b"it broke \x1b[31m here", {}),
    200: ('HTTP 200, but an HTML page, "Log in & out"', b"<html><title>Log in &amp; out</title>", {}),
    301: (
        "HTTP 301: redirects to https://other/base/info; if that is the server, give --url https://other/base",
        b"",
        {},
    ),
    307: (
        "HTTP 307: redirects to https://other/base/info; if that is the server, give --url https://other/base",
        b"",
        {},
    ),
}


@pytest.mark.parametrize(("code", "cause"), CAUSES.items(), ids=map(str, CAUSES))
def test_the_http_status_is_the_cause_that_is_reported(
    code: int, cause: tuple[str, object, dict[str, str]], command: Command, live: str, tmp_path: Path
) -> None:
    expected, body, headers = cause
    if code in (301, 307):
        headers = {"location": f"https://user:{KEY}@other/base/info?token={KEY}"}
    with serving(answer(body, code, **headers)) as server:
        found, out, said = command("measure", live, "--url", server.url, "-o", tmp_path / "run")
        _, told, _ = command("doctor", "--url", server.url)
        assert server.requests <= 8  # redirects are not followed
    assert found == 2 and out == ""
    assert expected in " ".join(said.replace("\\u001b", "").split())
    assert expected in " ".join(told.replace("\\u001b", "").split())
    assert KEY not in said + told and "\x1b" not in said + told


def test_a_gzipped_answer_is_read_and_another_encoding_named(command: Command) -> None:
    import gzip

    packed = gzip.compress(json.dumps({"error": {"message": "wrapped up"}}).encode())
    with serving(answer(packed, 400, content_encoding="gzip")) as server:
        assert "HTTP 400: wrapped up" in command("doctor", "--url", server.url)[1]
    with serving(answer(packed, 400, content_encoding="br")) as server:
        assert "HTTP 400: an answer encoded as br, which was not requested" in command("doctor", "--url", server.url)[1]


def test_a_key_that_the_server_repeats_is_not_shown_and_a_wrong_one_is_called_so(
    command: Command, live: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVECAST_API_KEY", KEY + "\n")  # as `$(cat key)` does not leave it, but env files do
    with serving(answer({"error": f"bad key {KEY}"}, 401)) as server:
        _, _, said = command("measure", live, "--url", server.url, "-o", tmp_path / "run")
        assert f"Authorization: Bearer {KEY}\r\n".encode() in server.heads[0]
    assert "HTTP 401: the server does not accept the key in SERVECAST_API_KEY (bad key ***)" in said
    monkeypatch.setenv("SERVECAST_API_KEY", f"{KEY}\nX: y")
    found, _, said = command("measure", live, "--url", "http://127.0.0.1:9", "-o", tmp_path / "run")
    assert found == 2 and "SERVECAST_API_KEY: expected a key" in said and KEY not in said


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://no-such-host.invalid:80", "the host name 'no-such-host.invalid' cannot be resolved"),
        ("http://127.0.0.1:9", "connection refused: nothing listens at 127.0.0.1:9"),
        ("http://[::1]:9", "[::1]:9"),
        ("http://::1:8080", "expected an IPv6 address in brackets"),
        ("http://[::1", "expected a URL like http://127.0.0.1:8080"),
        ("ftp://h", "expected a URL like"),
        ("http://h:99999999", "expected a URL like"),
        ("http:// h", "expected a URL like"),
        ("", "expected a URL like"),
        (f"http://u:{KEY}@h:port", "put the secret into SERVECAST_API_KEY"),
        (f"u:{KEY}@h", "put the secret into SERVECAST_API_KEY"),
        (f"http://h/?api_key={KEY}", "expected a URL without ? and #"),
    ],
)
def test_a_url_that_leads_nowhere_is_explained_and_secrets_in_it_are_not_repeated(
    url: str, expected: str, command: Command, live: str, tmp_path: Path
) -> None:
    found, out, said = command("measure", live, "--url", url, "-o", tmp_path / "run", "--timeout", 2)
    _, told, more = command("doctor", "--url", url, "--timeout", 2)
    assert (found, out) == (2, "")
    assert expected in said and expected in told
    assert KEY not in said + told + more and "Traceback" not in said + more


def test_a_proxy_of_the_environment_is_named_without_its_password(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://u:{KEY}@127.0.0.1:9")
    _, out, said = command("doctor", "--url", "http://127.0.0.1:9")
    assert "HTTP_PROXY is set, but servecast uses no proxy" in out and KEY not in out + said


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/models", "/generate_stream"])
def test_a_url_may_be_that_of_a_request(path: str, command: Command) -> None:
    paths = {b"/info": answer(INFO), b"/health": answer()}
    with serving(paths) as server:
        assert "TGI 0.9.4, m" in command("doctor", "--url", server.url + path)[1]


@contextmanager
def listening(answer: Script) -> Iterator[int]:
    """A port whose connections `answer` gets as they are accepted, before anything is read."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with suppress(OSError), connection:
                        answer(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_http_and_https_are_told_apart(tmp_path: Path, command: Command) -> None:
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    try:
        subprocess.run([*made, "-keyout", "key.pem", "-out", "cert.pem"], cwd=tmp_path, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    def shake(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as wrapped:
            wrapped.recv(1)

    with listening(shake) as port:
        host = f"127.0.0.1:{port}"
        assert f"the server uses TLS: give --url https://{host}" in command("doctor", "--url", f"http://{host}")[1]
        assert "TLS: the certificate is not trusted" in command("doctor", "--url", f"https://{host}")[1]
    with listening(say(b"HTTP/1.1 400 Bad Request\r\n\r\n", 0.1)) as port:
        host = f"127.0.0.1:{port}"
        assert (
            f"the server does not use TLS: give --url http://{host}" in command("doctor", "--url", f"https://{host}")[1]
        )
    with listening(say(1.0)) as port:  # a server that waits for a whole line first
        _, out, _ = command("doctor", "--url", f"https://127.0.0.1:{port}", "--timeout", 0.5)
        assert "no TLS handshake" in out


NONSENSE = {
    "deep": b'{"data":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "not UTF-8": b'{"data":[{"id":"\xff"}]}',
    "other types": {"data": 5, "usage": [], "details": [], "choices": {}, "error": [1]},
    "huge": b'{"data":[{"id":"m","max_model_len":' + b"9" * 400 + b"}]}",
}


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
def test_no_answer_is_taken_for_more_than_it_is(body: object, command: Command, live: str, tmp_path: Path) -> None:
    for paths in ({b"/v1/models": answer(body)}, {b"/v1/models": answer(body)} | {b"/v1/completions": answer(body)}):
        with serving(paths) as server:
            found, _, said = command("measure", live, "--url", server.url, "-o", tmp_path / "run")
        assert found == 2 and "Traceback" not in said


def test_a_server_that_streams_whatever_is_asked_is_known_by_its_stream(
    command: Command, live: str, tmp_path: Path
) -> None:
    def event(data: str) -> bytes:
        return f"data: {data}\n\n".encode()

    pieces = [event('{"id": "x", "choices": [{"index": 0, "text": " w"}], "usage": null}')] * 40
    usage = event('{"id": "x", "choices": [], "usage": {"prompt_tokens": 60, "completion_tokens": 40}}')
    streamed = answer(b": hello\n\n" + b"".join(pieces) + usage + event("[DONE]"), content_type="text/event-stream")
    with serving({b"/v1/models": answer({"data": [{"id": "m"}]}), b"/v1/completions": streamed}) as server:
        code, out, err = command("measure", live, "--url", server.url, "-o", tmp_path / "run")
    assert code == 0, out + err
    assert "no TGI and" not in err and "does not count prompt tokens" not in err
    assert json.loads((tmp_path / "run" / "requests.jsonl").read_text().splitlines()[0])["output_tokens"] == 40
