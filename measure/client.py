"""One streamed request over HTTP: when each token came, and what became of it.

Lines are read with geventhttpclient's `readline`, which hands over what has arrived; reading blocks of a fixed size
would hold tokens back until a block is full. An event ends at a blank line, with LF or CRLF.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable
from time import perf_counter_ns
from urllib.parse import urlsplit

import msgspec
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError, HTTPSocketPoolResponse

from measure.dialect import INCOMPLETE, Dialect, Prompt, refusal

ABORTED, OK, TIMEOUT, CONNECT, RESET = "aborted", "ok", "timeout", "connect", "reset"
CONNECT_SECONDS = 10.0


class Record(msgspec.Struct):
    """A line of `requests.jsonl` (`formats.md`). `generated_tokens` and `counted_prompt` are the server's counts."""

    id: int
    rung: int
    user: int
    scheduled: float
    sent: float
    prompt_tokens: int
    max_new_tokens: int
    ended: float = 0.0
    output_tokens: int = 0
    token_times: list[float] = []
    finish_reason: str | None = None
    status: str = ABORTED  # whoever is stopped midway stays that
    error: str | None = None
    generated_tokens: int | None = None
    counted_prompt: int | None = None


class Stopwatch:
    """Seconds since a run began, to the microsecond; `zero` is `perf_counter_ns` at that instant, on this machine."""

    def __init__(self, zero: int):
        self.zero = zero

    def now(self) -> float:
        """Seconds since the run began."""
        return (perf_counter_ns() - self.zero) // 1000 / 1e6


class Client:
    """A user's connection: kept alive between requests, one request at a time.

    Some servers close, without saying so, what they promised to keep (llama.cpp after every stream). A request that
    meets such a connection, closed before a byte of an answer, goes out again on a new one, and from then on every
    request has its own. Apart from that nothing is ever sent twice. `patience` is how long it waits for the next token,
    s; comment lines show that a server lives, not that it works.
    """

    def __init__(
        self, url: str, dialect: Dialect, now: Callable[[], float], *, patience: float, token: str | None = None
    ):
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._http = HTTPClient.from_url(
            url, headers=headers, concurrency=1, network_timeout=patience, connection_timeout=CONNECT_SECONDS
        )
        self._dialect, self._now, self._patience = dialect, now, patience
        self._kept, self._keep = False, True  # whether the connection has been used before; whether it may be again
        self._path = urlsplit(url).path.rstrip("/") + dialect.path

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def ask(self, record: Record, prompt: Prompt) -> None:
        """Send the request and fill the record, `sent` and `status` included; never raises for what a server does.

        Only being stopped (`GreenletExit`) passes through, and leaves the record `aborted` with the tokens so far.
        """
        body = self._dialect.body(prompt, record.prompt_tokens, record.max_new_tokens)
        record.sent = self._now()
        response = None
        try:
            try:
                response = self._post(record.id, body)
            except (HTTPConnectionClosed, ConnectionError):
                if not self._kept:
                    raise
                self._keep = self._kept = False
                response = self._post(record.id, body)
            if response.status_code != 200:
                heard = refusal(response.status_code, response.read())
                record.status, record.error = heard.status or INCOMPLETE, heard.error
                return
            self._listen(record, response.readline)
        except TimeoutError:
            self._fail(record, TIMEOUT, f"no token for {self._patience:g} s")
        except (ConnectionRefusedError, socket.gaierror) as e:
            self._fail(record, CONNECT, str(e))
        except (HTTPParseError, OSError) as e:
            # errors of connecting, like "no route to host", come before there is a response, and are not resets
            connected = isinstance(e, HTTPParseError | ConnectionError)
            self._fail(record, RESET if connected else CONNECT, str(e) or type(e).__name__)
        except msgspec.DecodeError as e:
            self._fail(record, INCOMPLETE, f"an event that is not this API's: {e}")
        finally:
            if response is not None:
                response.release()
            self._kept = self._keep and record.status == OK
            record.output_tokens = len(record.token_times)

    def _post(self, number: int, body: bytes) -> HTTPSocketPoolResponse:
        headers = {"X-Request-Id": str(number)}
        if not self._keep:
            headers["Connection"] = "close"
        return self._http.request("POST", self._path, body, headers)

    def _listen(self, record: Record, readline: Callable[[bytes], bytes]) -> None:
        now, hear = self._now, self._dialect.hear
        times = record.token_times = []
        progress = record.sent
        data = b""
        while line := readline(b"\n"):
            if line.startswith(b"data:"):
                data += line[5:]
            elif line in (b"\n", b"\r\n"):
                if not data:
                    continue
                at = now()
                heard = hear(data)
                data = b""
                progress = at
                if heard.token:
                    times.append(at)
                if heard.status is not None:
                    record.status, record.error = heard.status, heard.error
                    return
                if heard.finish_reason is not None:
                    record.finish_reason, record.status = heard.finish_reason, OK
                if heard.tokens is not None:
                    record.generated_tokens = heard.tokens
                if heard.prompt_tokens is not None:
                    record.counted_prompt = heard.prompt_tokens
            elif now() - progress > self._patience:  # a comment, or a field we have no use for
                raise TimeoutError
        if record.status != OK:
            record.status, record.error = INCOMPLETE, "the stream ended without a last token"

    @staticmethod
    def _fail(record: Record, status: str, error: str) -> None:
        if record.status != OK:  # after the last token it no longer matters how the connection ended
            record.status, record.error = status, error


def settle_memory() -> None:
    """Keep the collector away from everything that lives as long as the process: its pauses would show as latency."""
    gc.collect()
    gc.freeze()
