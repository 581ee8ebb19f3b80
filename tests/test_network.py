"""Servers that do not answer, or not as wanted: every wait has an end and is announced, every cause is named."""

from __future__ import annotations

import io
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from servers import END, HEAD, Script, Scripted, Standin, chunk, say, tgi_event
from warned import texts

from scenarios.cli.main import status

SCENARIO = """\
format: 2
name: live
server:
  {max_input_length: 512, max_total_tokens: 1024, max_batch_prefill_tokens: 2048, max_batch_total_tokens: 16000}
workload: {prompt_tokens: 60, output_tokens: 40}
load: {users: [1], seconds: 0.5, max_seconds: 1, spawn_rate: 20}
"""
INFO = {"model_id": "m", "version": "0.9.4", "max_input_length": 512, "max_total_tokens": 1024}
KEY = "sk-s3cret"


def answer(body: object = b"", code: int = 200, **headers: str) -> Script:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"content-length": str(len(data))} | {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return say(f"HTTP/1.1 {code} X\r\n{head}\r\n".encode() + data)


class Routed(Scripted):
    """Answers each path with a script of its own, any other with 404."""

    def __init__(self, paths: dict[bytes, Script]):
        self.paths = paths
        super().__init__(self._play)

    def _play(self, connection: socket.socket) -> None:
        path = self.heads[-1].split(b" ")[1]
        self.paths.get(path, answer(b"", 404))(connection)


@contextmanager
def serving(scripts: dict[bytes, Script] | Script) -> Iterator[Scripted]:
    server = Routed(scripts) if isinstance(scripts, dict) else Scripted(scripts)
    try:
        yield server
    finally:
        server.close()


def drip(lead: bytes, byte: bytes, every: float = 0.1) -> Script:
    """A byte now and then, for 5 s at most."""

    def play(connection: socket.socket) -> None:
        connection.sendall(lead)
        for _ in range(int(5 / every)):
            time.sleep(every)
            connection.sendall(byte)

    return play


def flood(lead: bytes, block: bytes, most: int = 100 << 20) -> Script:
    """The same bytes again and again, as fast as they are taken."""

    def play(connection: socket.socket) -> None:
        connection.sendall(lead)
        for _ in range(most // len(block)):
            connection.sendall(block)

    return play


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    path = tmp_path / "live.yaml"
    path.write_text(SCENARIO)
    return str(path)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command: its exit status, what it printed on stdout (unwrapped) and on stderr."""

    def ran(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        found = status([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return found, " ".join(out.split()), err

    return ran


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
    script: Script, file: str, run: Run, tmp_path: Path
) -> None:
    with serving(script) as server:
        began = time.monotonic()
        found, _, said = run("measure", file, "--url", server.url, "-o", tmp_path / "run", "--timeout", 0.4)
        doctor, out, told = run("doctor", "--url", server.url, "--timeout", 0.4)
        assert time.monotonic() - began < 20
    assert (found, doctor) == (2, 1)
    assert said.count(f"waiting for {server.url} to say what it is (at most 0.4 s)\n") == 1
    assert told.count(f"waiting for {server.url} to say what it is (at most 0.4 s)\n") == 1
    assert said.count("\n") == 2 and "Traceback" not in said
    assert server.url in said.splitlines()[1] and server.url in out
    assert not (tmp_path / "run").exists()


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
    code: int, cause: tuple[str, object, dict[str, str]], run: Run, file: str, tmp_path: Path
) -> None:
    expected, body, headers = cause
    if code in (301, 307):
        headers = {"location": f"https://user:{KEY}@other/base/info?token={KEY}"}
    with serving(answer(body, code, **headers)) as server:
        found, out, said = run("measure", file, "--url", server.url, "-o", tmp_path / "run")
        _, told, _ = run("doctor", "--url", server.url)
        assert server.requests <= 8  # redirects are not followed
    assert found == 2 and out == ""
    assert expected in " ".join(said.replace("\\u001b", "").split())
    assert expected in " ".join(told.replace("\\u001b", "").split())
    assert KEY not in said + told and "\x1b" not in said + told


def test_a_gzipped_answer_is_read_and_another_encoding_named(run: Run) -> None:
    import gzip

    packed = gzip.compress(json.dumps({"error": {"message": "wrapped up"}}).encode())
    with serving(answer(packed, 400, content_encoding="gzip")) as server:
        assert "HTTP 400: wrapped up" in run("doctor", "--url", server.url)[1]
    with serving(answer(packed, 400, content_encoding="br")) as server:
        assert "HTTP 400: an answer encoded as br, which was not requested" in run("doctor", "--url", server.url)[1]


def test_a_key_that_the_server_repeats_is_not_shown_and_a_wrong_one_is_called_so(
    run: Run, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVECAST_API_KEY", KEY + "\n")  # as `$(cat key)` does not leave it, but env files do
    with serving(answer({"error": f"bad key {KEY}"}, 401)) as server:
        _, _, said = run("measure", file, "--url", server.url, "-o", tmp_path / "run")
        assert f"Authorization: Bearer {KEY}\r\n".encode() in server.heads[0]
    assert "HTTP 401: the server does not accept the key in SERVECAST_API_KEY (bad key ***)" in said
    monkeypatch.setenv("SERVECAST_API_KEY", f"{KEY}\nX: y")
    found, _, said = run("measure", file, "--url", "http://127.0.0.1:9", "-o", tmp_path / "run")
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
    url: str, expected: str, run: Run, file: str, tmp_path: Path
) -> None:
    found, out, said = run("measure", file, "--url", url, "-o", tmp_path / "run", "--timeout", 2)
    _, told, more = run("doctor", "--url", url, "--timeout", 2)
    assert (found, out) == (2, "")
    assert expected in said and expected in told
    assert KEY not in said + told + more and "Traceback" not in said + more


def test_a_proxy_of_the_environment_is_named_without_its_password(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://u:{KEY}@127.0.0.1:9")
    _, out, said = run("doctor", "--url", "http://127.0.0.1:9")
    assert "HTTP_PROXY is set, but servecast uses no proxy" in out and KEY not in out + said


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/models", "/generate_stream"])
def test_a_url_may_be_that_of_a_request(path: str, run: Run) -> None:
    paths = {b"/info": answer(INFO), b"/health": answer()}
    with serving(paths) as server:
        assert "TGI 0.9.4, m" in run("doctor", "--url", server.url + path)[1]


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


def test_http_and_https_are_told_apart(tmp_path: Path, run: Run) -> None:
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
        assert f"the server uses TLS: give --url https://{host}" in run("doctor", "--url", f"http://{host}")[1]
        assert "TLS: the certificate is not trusted" in run("doctor", "--url", f"https://{host}")[1]
    with listening(say(b"HTTP/1.1 400 Bad Request\r\n\r\n", 0.1)) as port:
        host = f"127.0.0.1:{port}"
        assert f"the server does not use TLS: give --url http://{host}" in run("doctor", "--url", f"https://{host}")[1]
    with listening(say(1.0)) as port:  # a server that waits for a whole line first
        _, out, _ = run("doctor", "--url", f"https://127.0.0.1:{port}", "--timeout", 0.5)
        assert "no TLS handshake" in out


STREAM = HEAD + chunk(b'data: {"choices":[{"text":"x","finish_reason":"length"}]}\n\ndata: [DONE]\n\n') + END


def openai(prompt: int = 60, stream: Script | None = None, **model: object) -> dict[bytes, Script]:
    """An OpenAI-style server's paths; what it says about its model, and what it streams."""
    good = {"choices": [{"text": "x"}], "usage": {"prompt_tokens": prompt}}
    asked = [0]

    def completions(connection: socket.socket) -> None:
        asked[0] += 1  # before the warm-up: what it is, the tokens of a prompt, whether it streams
        first = [answer(good), answer(good), say(STREAM)]
        (answer(good) if stream is None else [*first, stream][min(asked[0], 4) - 1])(connection)

    return {b"/v1/models": answer({"data": [{"id": "m"} | model]}), b"/v1/completions": completions}


@pytest.mark.parametrize("name", ["max_model_len", "context_length"])
def test_a_profile_that_would_be_cut_silently_is_refused_before_the_first_request(
    name: str, run: Run, file: str, tmp_path: Path
) -> None:
    with serving(openai(**{name: 99})) as server:
        found, out, said = run("measure", file, "--url", server.url, "-o", tmp_path / "run")
        told, findings, _ = run("doctor", file, "--url", server.url)
        assert not any(b'"stream"' in body for body in server.bodies)
    expected = f"the server's {name} is 99, the scenario's prompts plus answers have up to 100 tokens"
    assert (found, told, out) == (2, 1, "")
    assert expected in said and "--max-model-len 100" in said and expected in findings
    assert not (tmp_path / "run").exists()
    with serving(openai(**{name: 100})) as server:
        _, findings, _ = run("doctor", file, "--url", server.url)
        assert "the server can serve it" in findings
        lengths = "workload.prompt_tokens={lognormal: {mean: 60, cv: 1}}"
        _, findings, _ = run("doctor", file, "--url", server.url, "--set", lengths)
        assert f"may exceed the server's {name} 100; such answers are cut short" in findings
        uniform = "workload.prompt_tokens={uniform: [10, 70]}"
        told, findings, _ = run("doctor", file, "--url", server.url, "--set", uniform)
        assert told == 1 and "have up to 110 tokens" in findings


def test_llama_cpp_says_its_context_elsewhere(run: Run, file: str) -> None:
    props = {b"/props": answer({"default_generation_settings": {"n_ctx": 64}})}
    with serving(openai(owned_by="llamacpp") | props) as server:
        assert "the server's n_ctx is 64" in run("doctor", file, "--url", server.url)[1]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"max_input_length": 59}, "max_input_length is 59, the scenario's prompts have 60 tokens"),
        ({"max_input_tokens": 59, "max_input_length": None}, "max_input_length is 59"),
        ({"max_total_tokens": 99}, "max_total_tokens is 99"),
        ({"max_batch_total_tokens": 99, "version": "2.0.1"}, "max_batch_total_tokens is 99"),
        ({"max_batch_prefill_tokens": 59, "version": "2.0.1"}, "max_batch_prefill_tokens is 59"),
        ({"max_concurrent_requests": 0.5}, "the server can serve it"),
    ],
)
def test_a_profile_is_held_against_every_limit_that_tgi_tells(
    told: dict[str, object], said: str, run: Run, file: str
) -> None:
    with serving({b"/info": answer(INFO | told), b"/health": answer()}) as server:
        assert said in run("doctor", file, "--url", server.url)[1]


def test_users_beyond_the_servers_permits_are_said(run: Run, file: str) -> None:
    with serving({b"/info": answer(INFO | {"max_concurrent_requests": 3}), b"/health": answer()}) as server:
        _, out, _ = run("doctor", file, "--url", server.url, "--set", "load.users=[1, 4]")
        assert "the ladder goes to 4 users, but the server accepts 3 at a time" in out


NONSENSE = {
    "deep": b'{"data":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "not UTF-8": b'{"data":[{"id":"\xff"}]}',
    "other types": {"data": 5, "usage": [], "details": [], "choices": {}, "error": [1]},
    "huge": b'{"data":[{"id":"m","max_model_len":' + b"9" * 400 + b"}]}",
}


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
def test_no_answer_is_taken_for_more_than_it_is(body: object, run: Run, file: str, tmp_path: Path) -> None:
    for paths in ({b"/v1/models": answer(body)}, {b"/v1/models": answer(body)} | {b"/v1/completions": answer(body)}):
        with serving(paths) as server:
            found, _, said = run("measure", file, "--url", server.url, "-o", tmp_path / "run")
        assert found == 2 and "Traceback" not in said


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


def test_streams_that_come_to_no_end_fail_with_their_cause(run: Run, file: str, tmp_path: Path) -> None:
    waiting = [say(STREAM)] * 2 + [script for script, _ in STREAMS.values()]

    def next_one(connection: socket.socket) -> None:
        (waiting.pop(0) if waiting else say(STREAM))(connection)

    with serving(openai(stream=next_one)) as server:
        where = ("--url", server.url, "-o", tmp_path / "run", "--set", "load.seconds=4", "--set", "load.retry=0.01")
        _, _, said = run("measure", file, *where, "--patience", 0.3, "--timeout", 5)
    assert "Traceback" not in said
    records = [json.loads(line) for line in (tmp_path / "run" / "requests.jsonl").read_text().splitlines()]
    for (name, (_, cause)), record in zip(STREAMS.items(), records, strict=False):
        assert cause in (record["error"] or ""), name
        assert record["status"] != "ok" and KEY not in record["error"]
    assert len(records) >= len(STREAMS)


def test_a_warm_up_that_fails_says_why(run: Run, file: str, tmp_path: Path) -> None:
    with serving(openai(stream=answer({"detail": "Not Found"}, 404))) as server:
        found, out, said = run("measure", file, "--url", server.url, "-o", tmp_path / "run")
    assert (found, out) == (2, "")
    assert "a warm-up request failed: validation: HTTP 404: not found" in said
    assert "HTTP 404" in json.loads((tmp_path / "run" / "run.json").read_text())["stopped"]


def test_a_warm_up_that_takes_too_long_is_given_up(run: Run, file: str, tmp_path: Path) -> None:
    with serving(openai(stream=say(4.0))) as server:
        found, _, said = run("measure", file, "--url", server.url, "-o", tmp_path / "run", "--timeout", 0.7)
    assert found == 2
    assert f"timed out after 0.7 s waiting for 2 warm-up requests at {server.url}" in said


def test_the_budget_counts_from_the_start(run: Run, file: str, tmp_path: Path) -> None:
    with serving(say(4.0)) as server:
        found, _, said = run("measure", file, "--url", server.url, "-o", tmp_path / "a", "--budget", 0.5)
        assert found == 2 and f"the budget of 0.5 s was spent waiting for {server.url} to say what it is" in said
    with serving(openai(stream=say(5.0))) as server:
        began = time.monotonic()
        found, _, said = run("measure", file, "--url", server.url, "-o", tmp_path / "b", "--budget", 2)
        assert time.monotonic() - began < 15  # and not a warm-up's ten minutes
        assert found == 2 and "the budget of 2 s was spent waiting for " in said
    assert "the budget of 2 s was spent" in json.loads((tmp_path / "b" / "run.json").read_text())["stopped"]


def test_every_phase_says_once_what_is_waited_for_and_how_long(
    server: tuple[Standin, Path], run: Run, file: str, tmp_path: Path
) -> None:
    url = server[0].url
    found, _, said = run("measure", file, "--url", url, "-o", tmp_path / "run", "--budget", 100)
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


def test_metrics_without_end_are_a_gap_that_is_said(run: Run, file: str, tmp_path: Path) -> None:
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
        found, _, said = run("measure", file, "--url", server.url, "-o", tmp_path / "run")
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


def test_a_server_that_streams_whatever_is_asked_is_known_by_its_stream(run: Run, file: str, tmp_path: Path) -> None:
    def event(data: str) -> bytes:
        return f"data: {data}\n\n".encode()

    pieces = [event('{"id": "x", "choices": [{"index": 0, "text": " w"}], "usage": null}')] * 40
    usage = event('{"id": "x", "choices": [], "usage": {"prompt_tokens": 60, "completion_tokens": 40}}')
    streamed = answer(b": hello\n\n" + b"".join(pieces) + usage + event("[DONE]"), content_type="text/event-stream")
    with serving({b"/v1/models": answer({"data": [{"id": "m"}]}), b"/v1/completions": streamed}) as server:
        code, out, err = run("measure", file, "--url", server.url, "-o", tmp_path / "run")
    assert code == 0, out + err
    assert "no TGI and" not in err and "does not count prompt tokens" not in err
    assert json.loads((tmp_path / "run" / "requests.jsonl").read_text().splitlines()[0])["output_tokens"] == 40
