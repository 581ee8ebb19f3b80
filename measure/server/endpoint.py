"""The server's address, for everything but the load: its limits, its health, its metrics, a probe."""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from measure.apis.refusal import PATHS, clean, explain, inflated, shown_url
from measure.apis.sse import EventParser
from measure.deadline import Deadline, run_within
from measure.server.key import VARIABLE, api_key
from sim.model.errors import UserError

ANSWER_SECONDS = 10.0  # for the whole of an answer that needs no forward pass
STREAM = (b"data:", b":", b"event:")  # how a stream of events begins
MOST_BYTES = 1 << 25  # of an answer: decoder_input_details of a 128k prompt take 12 MB, /metrics well under one
TLS_ALERT = "\x15\x03"  # how a TLS server begins what it has to say to a client that speaks plain HTTP
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Unreachable(UserError):
    """Nobody answers at the URL, or not what was expected."""


class Answer(NamedTuple):
    """An HTTP answer; `headers` by their names in lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str] = {}


class Endpoint:
    """A base URL and the key for it, which comes from the environment and reaches no file.

    `timeout` limits a whole exchange, from the look-up of the name to the last byte of the answer. Redirects are not
    followed: the load would not follow them either.
    """

    def __init__(self, url: str, timeout: float = ANSWER_SECONDS):
        self.scheme, self.host, self.port, path = _parts(url)
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = (("http", 80), ("https", 443))
        port = "" if self.port is None or (self.scheme, self.port) in usual else f":{self.port}"
        self.url = f"{self.scheme}://{host}{port}{path}"
        self.timeout, self._path = timeout, path
        api_key()  # one that cannot be sent is refused before anything is

    def get(self, path: str, deadline: Deadline | None = None) -> Answer:
        """The answer; `Unreachable` when there is none, `OutOfTime` when the phase's `deadline` has passed."""
        return self._exchange("GET", path, None, self.timeout, deadline)

    def post(self, path: str, body: dict[str, Any], deadline: Deadline) -> Answer:
        """The answer to a JSON request, which may take as long as the deadline of its phase allows."""
        return self._exchange("POST", path, msgspec.json.encode(body), deadline.left(), deadline)

    def explain(self, path: str, answer: Answer) -> str:
        """Why an answer is not what was asked for; see `refusal`."""
        return explain(answer.status, answer.headers, answer.body, self.url + path)

    def _exchange(
        self, method: str, path: str, body: bytes | None, seconds: float, deadline: Deadline | None
    ) -> Answer:
        if deadline is not None:
            seconds = min(seconds, deadline.left())
        exchange = _Exchange(self, method, self._path + path, body, seconds)
        try:
            return run_within(seconds, exchange.run, exchange.give_up)
        except TimeoutError:
            why = f"{shown_url(self.url + path)}: {exchange.stage}"
            if deadline is not None and not deadline.left():
                raise deadline.passed(why) from None
            raise Unreachable(f"{shown_url(self.url)}: no server answers within {seconds:.3g} s ({why})") from None
        except (OSError, ValueError, http.client.HTTPException) as e:
            said = self._reason(e, seconds)
            raise Unreachable(f"{shown_url(self.url)}: no server answers ({said}){_proxy_hint(self.scheme)}") from e

    def _reason(self, error: Exception, seconds: float) -> str:
        where = f"{self.host}:{self.port or (443 if self.scheme == 'https' else 80)}"
        if isinstance(error, socket.gaierror | UnicodeError):
            return (
                f"the name {clean(self.host)!r} is not known: {clean(str(getattr(error, 'strerror', None) or error))}"
            )
        if isinstance(error, ConnectionRefusedError):
            return f"connection refused: nothing listens at {where}"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"TLS: its certificate is not trusted: {clean(error.verify_message)}"
        if isinstance(error, ssl.SSLError):
            if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
                return f"it does not speak TLS: give --url {shown_url(self.url).replace('https', 'http', 1)}"
            return f"TLS: {clean(error.reason or str(error))}"
        if self.scheme == "http" and _speaks_tls(error, self.host, self.port or 80, min(2.0, seconds)):
            return f"it speaks TLS: give --url {shown_url(self.url).replace('http', 'https', 1)}"
        if isinstance(error, http.client.BadStatusLine) and not isinstance(error, ConnectionError):
            return f"it does not speak HTTP: {clean(str(error))}"
        if isinstance(error, http.client.IncompleteRead):
            return f"it closed the connection in the middle of an answer, after {len(error.partial)} bytes"
        return clean(str(error)) or type(error).__name__


class _Exchange:
    """One request and its answer; `stage` is what it waits for."""

    def __init__(self, endpoint: Endpoint, method: str, target: str, body: bytes | None, seconds: float):
        self.stage = f"looking up the name {clean(endpoint.host)!r}"
        self._endpoint, self._method, self._target, self._body = endpoint, method, target, body
        made = http.client.HTTPSConnection if endpoint.scheme == "https" else http.client.HTTPConnection
        # no proxy from the environment: the load goes straight to the server, so do the questions about it
        self._connection = made(endpoint.host, endpoint.port, timeout=max(seconds, 1e-3))

    def run(self) -> Answer:
        connection = self._connection
        headers = {"Accept-Encoding": "identity", "Connection": "close"}
        if self._body is not None:
            headers["Content-Type"] = "application/json"
        if key := api_key():
            headers["Authorization"] = f"Bearer {key}"
        try:
            socket.getaddrinfo(connection.host, connection.port)
            self.stage = "it does not take the connection"
            plain = connection.sock = socket.create_connection((connection.host, connection.port), connection.timeout)
            if self._endpoint.scheme == "https":
                self.stage = "it does not answer in TLS; if it speaks plain HTTP, give --url http://..."
                connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=connection.host)
            self.stage = "connected, and not a byte of an answer has come"
            connection.request(self._method, self._target, self._body, headers)
            body = bytearray()
            with connection.getresponse() as response:
                fields = {name.lower(): value for name, value in response.getheaders()}
                while block := response.read1(1 << 16):
                    body += block
                    self.stage = f"its answer, HTTP {response.status}, has not ended after {len(body)} bytes"
                    if len(body) > MOST_BYTES:
                        raise http.client.HTTPException(f"its answer has more than {MOST_BYTES >> 20} MiB")
                if response.length:  # what was promised, and did not come
                    raise http.client.IncompleteRead(bytes(body), response.length)
        finally:
            connection.close()
        unpacked = inflated(fields.get("content-encoding", "").strip().lower(), bytes(body), MOST_BYTES)
        if unpacked is not None:
            del fields["content-encoding"]
        return Answer(response.status, bytes(body) if unpacked is None else unpacked, fields)

    def give_up(self) -> None:
        """Wake the thread that waits for it."""
        if (waiting := self._connection.sock) is not None:
            with suppress(OSError):
                waiting.shutdown(socket.SHUT_RDWR)


def _parts(url: str) -> tuple[str, str, int | None, str]:
    """Scheme, host, port and path of a base URL; nothing that is refused is shown if it may be secret."""
    text = url.strip()
    scheme = SCHEME.match(text)
    try:
        parts = urlsplit(text if scheme else f"http://{text}")
        port = parts.port
        host = parts.hostname or ""
    except ValueError:
        parts, port, host = urlsplit(""), None, ""
    if "@" in text.partition("//")[2].partition("?")[0].partition("/")[0] or (not scheme and "@" in text):
        raise Unreachable(f"--url: put the secret into {VARIABLE}, not into the URL")
    plain = clean(text.partition("?")[0].partition("#")[0])
    bare = text.partition("//")[2] if scheme else text
    if not bare.startswith("[") and bare.partition("/")[0].count(":") > 1:
        raise Unreachable(f"{plain}: expected an IPv6 address in brackets, like http://[::1]:8080")
    if parts.scheme not in ("http", "https") or not host or port == 0 or re.search(r"\s|[\x00-\x1f\x7f]", text):
        raise Unreachable(f"{plain}: expected a URL like http://127.0.0.1:8080")
    if parts.query or parts.fragment:
        raise Unreachable(f"{plain}: expected a URL without ? and #; an API key goes into {VARIABLE}")
    path = PATHS.sub("", parts.path.rstrip("/")).rstrip("/")
    if not path.isascii():
        raise Unreachable(f"{plain}: expected a URL in ASCII; other characters are written as %C3%BC")
    return parts.scheme, host, port, path


def _speaks_tls(error: Exception, host: str, port: int, seconds: float) -> bool:
    """Whether a port that had nothing to say to plain HTTP takes a TLS handshake."""
    if isinstance(error, http.client.BadStatusLine) and str(error).lstrip("'\"").startswith((TLS_ALERT, "\\x15\\x03")):
        return True
    if not isinstance(error, ConnectionError):
        return False
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def shake() -> bool:
        with socket.create_connection((host, port), seconds) as plain, context.wrap_socket(plain, server_hostname=host):
            return True

    try:
        return run_within(seconds, shake)
    except (OSError, ValueError):  # TimeoutError and SSLError are OSErrors
        return False


def _proxy_hint(scheme: str) -> str:
    names = [f"{scheme}_proxy".upper(), f"{scheme}_proxy", "ALL_PROXY", "all_proxy"]
    found = next((name for name in names if os.environ.get(name)), None)
    return f"; {found} is set, and servecast uses no proxy: give a URL that is reached without one" if found else ""


def decoded(body: bytes) -> dict[str, Any]:
    """A JSON object, or an empty one for anything else. Of an answer that was streamed although nobody asked for it,
    every key has the last value that says something."""
    if body.lstrip().startswith(STREAM):
        parser = EventParser()
        said: dict[str, Any] = {}
        for event in (*parser.feed(body), *parser.end()):
            said |= {key: value for key, value in _object(event.data).items() if value or key not in said}
        return said
    return _object(body)


def _object(body: bytes) -> dict[str, Any]:
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def table(found: Any) -> dict[str, Any]:
    """What should be an object of a server's JSON, empty if it is anything else."""
    return found if isinstance(found, dict) else {}


def rows(found: Any) -> list[Any]:
    """What should be a list of a server's JSON, empty if it is anything else."""
    return found if isinstance(found, list) else []
