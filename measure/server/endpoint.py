"""HTTP to the server for everything but the load: detection, health, metrics, probes."""

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

from measure.apis.http_error import PATHS, clean, explain, inflated, shown_url
from measure.apis.sse import EventParser
from measure.deadline import Deadline, run_within
from measure.server.key import VARIABLE, api_key
from sim.model.errors import UserError

ANSWER_SECONDS = 10.0  # for a whole answer that needs no forward pass
STREAM = (b"data:", b":", b"event:")  # beginnings of an event stream
MAX_BYTES = 1 << 25  # of an answer: decoder_input_details of a 128k prompt take 12 MB, /metrics well under one
TLS_ALERT = "\x15\x03"  # the first bytes of a TLS server's answer to plain HTTP
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Unreachable(UserError):
    """No server answers at the URL, or not as expected."""


class Answer(NamedTuple):
    """An HTTP answer; `headers` by their names in lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str] = {}


class Endpoint:
    """A server's base URL. The API key comes from the environment and is written to no file.

    `timeout` limits a whole exchange, from the look-up of the name to the last byte of the answer. Redirects are not
    followed, as the load does not follow them either.
    """

    def __init__(self, url: str, timeout: float = ANSWER_SECONDS):
        self.scheme, self.host, self.port, path = _parts(url)
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = (("http", 80), ("https", 443))
        port = "" if self.port is None or (self.scheme, self.port) in usual else f":{self.port}"
        self.url = f"{self.scheme}://{host}{port}{path}"
        self.timeout, self._path = timeout, path
        api_key()  # refuses an invalid key before anything is sent

    def get(self, path: str, deadline: Deadline | None = None) -> Answer:
        """GET a path: the answer; `Unreachable` if there is none, `OutOfTime` if the phase's `deadline` has passed."""
        return self._exchange("GET", path, None, self.timeout, deadline)

    def post(self, path: str, body: dict[str, Any], deadline: Deadline) -> Answer:
        """POST a JSON request, which may take until the deadline of its phase."""
        return self._exchange("POST", path, msgspec.json.encode(body), deadline.left(), deadline)

    def explain(self, path: str, answer: Answer) -> str:
        """Explain an unexpected answer; see `http_error`."""
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
            reason = self._reason(e, seconds)
            raise Unreachable(f"{shown_url(self.url)}: no server answers ({reason}){_proxy_hint(self.scheme)}") from e

    def _reason(self, error: Exception, seconds: float) -> str:
        where = f"{self.host}:{self.port or (443 if self.scheme == 'https' else 80)}"
        if isinstance(error, socket.gaierror | UnicodeError):
            reason = clean(str(getattr(error, "strerror", None) or error))
            return f"the host name {clean(self.host)!r} cannot be resolved: {reason}"
        if isinstance(error, ConnectionRefusedError):
            return f"connection refused: nothing listens at {where}"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"TLS: the certificate is not trusted: {clean(error.verify_message)}"
        if isinstance(error, ssl.SSLError):
            if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
                return f"the server does not use TLS: give --url {shown_url(self.url).replace('https', 'http', 1)}"
            return f"TLS: {clean(error.reason or str(error))}"
        if self.scheme == "http" and _speaks_tls(error, self.host, self.port or 80, min(2.0, seconds)):
            return f"the server uses TLS: give --url {shown_url(self.url).replace('http', 'https', 1)}"
        if isinstance(error, http.client.BadStatusLine) and not isinstance(error, ConnectionError):
            return f"the answer is not HTTP: {clean(str(error))}"
        if isinstance(error, http.client.IncompleteRead):
            return f"the server closed the connection during an answer, after {len(error.partial)} bytes"
        return clean(str(error)) or type(error).__name__


class _Exchange:
    """One request and its answer; `stage` says what it waits for."""

    def __init__(self, endpoint: Endpoint, method: str, target: str, body: bytes | None, seconds: float):
        self.stage = f"looking up the host name {clean(endpoint.host)!r}"
        self._endpoint, self._method, self._target, self._body = endpoint, method, target, body
        made = http.client.HTTPSConnection if endpoint.scheme == "https" else http.client.HTTPConnection
        # proxies of the environment are not used, as the load does not use them either
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
            self.stage = "the connection is not accepted"
            plain = connection.sock = socket.create_connection((connection.host, connection.port), connection.timeout)
            if self._endpoint.scheme == "https":
                self.stage = "no TLS handshake; if the server uses plain HTTP, give --url http://..."
                connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=connection.host)
            self.stage = "connected, but no byte of an answer has arrived"
            connection.request(self._method, self._target, self._body, headers)
            body = bytearray()
            with connection.getresponse() as response:
                fields = {name.lower(): value for name, value in response.getheaders()}
                while block := response.read1(1 << 16):
                    body += block
                    self.stage = f"the answer, HTTP {response.status}, has not ended after {len(body)} bytes"
                    if len(body) > MAX_BYTES:
                        raise http.client.HTTPException(f"the answer has more than {MAX_BYTES >> 20} MiB")
                if response.length:  # fewer bytes than announced
                    raise http.client.IncompleteRead(bytes(body), response.length)
        finally:
            connection.close()
        unpacked = inflated(fields.get("content-encoding", "").strip().lower(), bytes(body), MAX_BYTES)
        if unpacked is not None:
            del fields["content-encoding"]
        return Answer(response.status, bytes(body) if unpacked is None else unpacked, fields)

    def give_up(self) -> None:
        """Wake the waiting thread."""
        if (waiting := self._connection.sock) is not None:
            with suppress(OSError):
                waiting.shutdown(socket.SHUT_RDWR)


def _parts(url: str) -> tuple[str, str, int | None, str]:
    """Scheme, host, port and path of a base URL; errors show no part that may be secret."""
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
    """Whether a server that failed on plain HTTP accepts a TLS handshake."""
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
    return f"; {found} is set, but servecast uses no proxy: give a URL that is reachable without one" if found else ""


def decoded(body: bytes) -> dict[str, Any]:
    """A JSON object; empty for anything else. If the answer is a stream although none was requested, each key has its
    last non-empty value."""
    if body.lstrip().startswith(STREAM):
        parser = EventParser()
        merged: dict[str, Any] = {}
        for event in (*parser.feed(body), *parser.end()):
            merged |= {key: value for key, value in _object(event.data).items() if value or key not in merged}
        return merged
    return _object(body)


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def table(found: Any) -> dict[str, Any]:
    """A value that should be a JSON object; empty if it is not."""
    return found if isinstance(found, dict) else {}


def rows(found: Any) -> list[Any]:
    """A value that should be a JSON list; empty if it is not."""
    return found if isinstance(found, list) else []
