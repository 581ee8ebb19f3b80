"""The HTTP client: sends one request and records when each token arrived and how the request ended.

The body is read as it arrives; reading blocks of a fixed size would delay tokens until a block is full. Events are
parsed by the API (`apis.api`), and their tokens counted by `apis.tokens`.
"""

from __future__ import annotations

import gc
import socket
import zlib
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any
from urllib.parse import urlsplit

import gevent
import geventhttpclient.client
import msgspec
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError, HTTPSocketPoolResponse

from measure.apis import failure
from measure.apis.api import TOKEN, Api, ParsedEvent, Prompt
from measure.apis.http_error import clean, explain
from measure.apis.sse import EventParser, UnknownEncoding, unpacker
from measure.apis.tokens import OUTPUT, EventProfile, TokenCounter
from sim.model.status import Status

CONNECT_SECONDS = 10.0
DRAIN_SECONDS = 0.02  # from `[DONE]` to the end of the message: longer than a packet takes, too short to delay a user
MAX_SLOW_DRAINS = 3  # in a row, after which the end of the message is no longer awaited
MAX_BYTES = 1 << 20  # between two events: the last one repeats the whole answer, half a megabyte for 100,000 tokens
MAX_EVENTS_PER_TOKEN, MAX_EXTRA_EVENTS = 2, 1000  # of an answer, per requested token and in addition
ERROR_BYTES = 1 << 16  # read of an error's body
USAGE_SECONDS = 2.0  # from the last token to the usage and `[DONE]`
DONE_SECONDS = 0.25  # from the usage to `[DONE]`


class Record(msgspec.Struct):
    """A line of `requests.jsonl` (`docs/files.md`).

    `generated_tokens` and `counted_prompt` are the server's counts. `event_tokens` is set if an event carried several
    tokens, `spread` if only the total is known and was spread over the events.
    """

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
    status: Status = Status.ABORTED  # stays so if the user is stopped midway
    error: str | None = None
    generated_tokens: int | None = None
    counted_prompt: int | None = None
    event_tokens: list[int] | msgspec.UnsetType = msgspec.UNSET
    spread: bool | msgspec.UnsetType = msgspec.UNSET


class RunClock:
    """Seconds since the run began, in whole microseconds; `zero` is `perf_counter_ns` at that instant."""

    def __init__(self, zero: int):
        self.zero = zero

    def now(self) -> float:
        """Seconds since the run began."""
        return (perf_counter_ns() - self.zero) // 1000 / 1e6


class BoundedResponse(HTTPSocketPoolResponse):
    """A response that limits the bytes between two events (`unread`), so that no header or comment is endless."""

    unread = 0

    def feed(self, data: str | bytes) -> None:
        """See `HTTPResponse.feed`."""
        self.count(len(data))
        super().feed(data)

    def count(self, more: int) -> None:
        """Count bytes; raise `HTTPParseError` beyond the limit."""
        self.unread += more
        if self.unread > MAX_BYTES:
            raise HTTPParseError(f"more than {MAX_BYTES >> 20} MiB arrived without an event")


setattr(geventhttpclient.client, "HTTPSocketPoolResponse", BoundedResponse)  # noqa: B010 - the class is not configurable


class Patience:
    """Raises `TimeoutError` in the greenlet that created it, `seconds` after the last `progress`.

    The one timer is rearmed only when it fires, so recording progress costs nothing. A socket timeout would restart
    with every byte, and comments are bytes.
    """

    def __init__(self, seconds: float, now: Callable[[], float]):
        self.seconds, self._now = seconds, now
        self._greenlet = gevent.getcurrent()
        self._hub = gevent.get_hub()
        self.progress = now()
        self._timer = self._begin(seconds)

    def restart(self, seconds: float) -> None:
        """Start again from now with another limit."""
        self.seconds, self.progress = seconds, self._now()
        self.close()
        self._timer = self._begin(seconds)

    def expired(self) -> bool:
        """Whether the limit has passed; while bytes keep arriving, the timer gets no chance to fire."""
        return self._now() - self.progress > self.seconds

    def close(self) -> None:
        """Stop the timer."""
        self._timer.stop()
        self._timer.close()

    def _begin(self, seconds: float) -> Any:
        timer = self._hub.loop.timer(seconds)
        timer.start(self._check)
        return timer

    def _check(self) -> None:
        left = self.progress + self.seconds - self._now()
        if left <= 0.001:
            self._greenlet.throw(TimeoutError)
            return
        self.close()
        self._timer = self._begin(left)


class Client:
    """One user's connection: kept alive between requests, one request at a time.

    Some servers close connections that they announced to keep (llama.cpp after every stream). If a reused connection is
    closed before the first byte of the answer, the request is sent again on a new one, and later requests are sent with
    `Connection: close`. Nothing else is ever sent twice. Other servers do not end the message after `[DONE]`: the
    connection is then closed by the client. `profile` is shared by all clients of a server. `patience` is the longest
    wait for the next token, s; comment lines do not count as tokens.
    """

    def __init__(
        self,
        url: str,
        api: Api,
        now: Callable[[], float],
        *,
        patience: float,
        token: str | None = None,
        profile: EventProfile | None = None,
    ):
        headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",
        }
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._http = HTTPClient.from_url(
            url, headers=headers, concurrency=1, network_timeout=patience, connection_timeout=CONNECT_SECONDS
        )
        self._api, self._now, self._patience = api, now, patience
        self._profile = profile or EventProfile()
        self._slow_drains = 0  # in a row
        self._reused, self._keep_alive = False, True
        self._path = urlsplit(url).path.rstrip("/") + api.path
        self._url = url + api.path

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def send(self, record: Record, prompt: Prompt) -> None:
        """Send a request and fill in its record; never raises for anything that the server does.

        Only `GreenletExit` (the user is stopped) is passed on; the record is then `aborted`, with the tokens so far.
        """
        body = self._api.request_body(prompt, record.prompt_tokens, record.max_new_tokens)
        record.sent = self._now()
        response = None
        patience = Patience(self._patience, self._now)
        try:
            try:
                response = self._post(record.id, body)
            except (HTTPConnectionClosed, ConnectionError):
                if not self._reused:
                    raise
                self._keep_alive = self._reused = False
                response = self._post(record.id, body)
            if response.status_code != 200:
                text = response.read(ERROR_BYTES)
                failed = failure.from_response(response.status_code, text, headers_of(response), self._url)
                record.status, record.error = failed.status or Status.INCOMPLETE, failed.error
                return
            self._receive(record, response, patience)
        except TimeoutError:
            self._fail(record, Status.TIMEOUT, f"no token for {self._patience:g} s")
        except (ConnectionRefusedError, socket.gaierror) as e:
            self._fail(record, Status.CONNECT, str(e))
        except (HTTPParseError, OSError) as e:
            # errors of connecting, like "no route to host", are no resets
            connected = isinstance(e, HTTPParseError | ConnectionError)
            self._fail(record, Status.RESET if connected else Status.CONNECT, clean(str(e)) or type(e).__name__)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
            self._fail(record, Status.INCOMPLETE, f"an event that does not belong to this API: {clean(str(e))}")
        except (UnknownEncoding, zlib.error) as e:
            self._fail(record, Status.INCOMPLETE, f"the answer cannot be decompressed: {clean(str(e))}")
        finally:
            patience.close()
            if response is not None:
                self._reused = self._keep_alive and record.status == Status.OK and not response.should_close()
                response.release()
            else:
                self._reused = False

    def _post(self, number: int, body: bytes) -> HTTPSocketPoolResponse:
        headers = {"X-Request-Id": str(number)}
        if not self._keep_alive:
            headers["Connection"] = "close"
        return self._http.request("POST", self._path, body, headers)

    def _receive(self, record: Record, response: HTTPSocketPoolResponse, patience: Patience) -> None:
        """Read an answer to its end, streamed or not."""
        counter, parser = TokenCounter(self._profile), EventParser()
        record.token_times = counter.times
        try:
            self._read(record, response, parser, counter, patience)
        finally:
            if parser.body is None:
                limited = record.finish_reason == "length"
                found = counter.finish(record.status == Status.OK, record.max_new_tokens if limited else None)
                record.token_times, record.output_tokens = found.times, len(found.times)
                if any(n != 1 for n in found.carried):
                    record.event_tokens = found.carried
                if found.spread:
                    record.spread = True
        if parser.body is not None:
            self._apply_answer(record, bytes(parser.body), headers_of(response))

    def _read(
        self,
        record: Record,
        response: HTTPSocketPoolResponse,
        parser: EventParser,
        counter: TokenCounter,
        patience: Patience,
    ) -> None:
        now, parse = self._now, self._api.parse_event
        assert isinstance(response, BoundedResponse)
        events_left = MAX_EVENTS_PER_TOKEN * record.max_new_tokens + MAX_EXTRA_EVENTS
        unpack = unpacker(str(response.get("content-encoding") or ""))
        while block := read_available(response):
            unpacked = unpack(block)
            response.count(len(unpacked) - len(block))
            for event in parser.feed(unpacked):
                at = patience.progress = now()
                response.unread = 0
                events_left -= 1
                if events_left < 0:
                    record.status, record.error = (
                        Status.INCOMPLETE,
                        "the answer has far more events than requested tokens",
                    )
                    return
                if self._apply(record, counter, at, parse(event)):
                    self._drain(response, patience)
                    return
                if record.status == Status.OK:
                    patience.restart(USAGE_SECONDS if record.generated_tokens is None else DONE_SECONDS)
            if patience.expired():  # only comments or unused fields arrived
                raise TimeoutError
        for event in parser.end():
            if self._apply(record, counter, now(), parse(event)):
                return
        if parser.body is None and record.status != Status.OK:
            record.status, record.error = Status.INCOMPLETE, "the stream ended without a last token"

    def _apply(self, record: Record, counter: TokenCounter, at: float, event: ParsedEvent) -> bool:
        """Record an event; returns whether the answer ends with it."""
        if event is TOKEN:
            counter.add(at, OUTPUT, None)
            return False
        if event.status is not None:
            record.status, record.error = event.status, event.error
            return True
        if event.kind or event.tokens is not None:
            counter.add(at, event.kind, event.tokens)
        if event.finish_reason is not None:
            record.finish_reason, record.status = event.finish_reason, Status.OK
        if event.tokens is not None:
            record.generated_tokens = event.tokens
        if event.prompt_tokens is not None:
            record.counted_prompt = event.prompt_tokens
        if event.done and counter.begun:
            record.status = Status.OK
        if record.status == Status.OK:
            record.ended = at
        return event.done

    def _apply_answer(self, record: Record, body: bytes, headers: dict[str, str]) -> None:
        """Record a body that is not an event stream."""
        if body.startswith(b"<"):
            self._fail(record, Status.INCOMPLETE, explain(200, headers | {"content-encoding": ""}, body))
            return
        answer = self._api.parse_answer(body)
        record.finish_reason, record.error = answer.finish_reason, answer.error
        record.status = answer.status or Status.OK
        record.generated_tokens, record.counted_prompt = answer.tokens, answer.prompt_tokens
        if answer.tokens is not None:
            record.output_tokens = answer.tokens
        elif answer.finish_reason == "length":
            record.output_tokens = record.max_new_tokens

    def _drain(self, response: HTTPSocketPoolResponse, patience: Patience) -> None:
        """Read to the end of the message after the end of the answer, so that the connection can be reused."""
        if self._slow_drains >= MAX_SLOW_DRAINS:
            return
        patience.restart(DRAIN_SECONDS)
        try:
            while read_available(response):
                pass
        except TimeoutError:
            self._slow_drains += 1
        except (HTTPParseError, OSError):
            pass
        else:
            self._slow_drains = 0

    @staticmethod
    def _fail(record: Record, status: Status, error: str) -> None:
        if record.status != Status.OK:  # after the last token the connection no longer matters
            record.status, record.error = status, error


def read_available(response: HTTPSocketPoolResponse) -> bytes:
    """The bytes of a body that have arrived, at least one; empty at its end."""
    buffer = response._body_buffer
    while not buffer and not response.message_complete:
        if response._sock is None:
            raise HTTPConnectionClosed("connection closed.")
        response.feed(response._sock.recv(response.block_size))
    block = bytes(buffer)
    buffer.clear()
    return block


def headers_of(response: HTTPSocketPoolResponse) -> dict[str, str]:
    """The headers of an answer, by their names in lower case."""
    return {name.lower(): value for name, value in response.items()}


def freeze_heap() -> None:
    """Exclude all current objects from garbage collection, whose pauses would show as latency."""
    gc.collect()
    gc.freeze()
