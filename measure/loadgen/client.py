"""One request over HTTP: when each token came, and what became of it.

The body is read as it arrives; reading blocks of a fixed size would hold tokens back until a block is full. What an
event says is the `dialect`'s, how many tokens it carries `tokens`'.
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

from measure.apis.dialect import INCOMPLETE, TOKEN, Dialect, Heard, Prompt, refusal
from measure.apis.refusal import clean, explain
from measure.apis.sse import EventParser, UnknownEncoding, unpacker
from measure.apis.tokens import OUTPUT, Counter, Habit

ABORTED, OK, TIMEOUT, CONNECT, RESET = "aborted", "ok", "timeout", "connect", "reset"
CONNECT_SECONDS = 10.0
LINGER_SECONDS = (
    0.02  # from `[DONE]` to the end of the message: more than a packet needs, less than a user would notice
)
LINGERS = 3  # answers in a row after which nobody waits for that any more
MOST_BYTES = 1 << 20  # between two events: the last one repeats the whole answer, half a megabyte for 100,000 tokens
ENDLESS_FACTOR, ENDLESS_EVENTS = 2, 1000  # events of an answer without end, beside the tokens that were asked
REFUSAL_BYTES = 1 << 16  # of an answer that is an error
CLOSING_SECONDS = 2.0  # from the last token to what follows it: the usage, `[DONE]`
COUNTED_SECONDS = 0.25  # the same where the usage has come, so that nothing is lost with the rest


class Record(msgspec.Struct):
    """A line of `requests.jsonl` (`docs/files.md`). `generated_tokens` and `counted_prompt` are the server's counts;
    `event_tokens` is there where an event carried several, and `spread` where only their sum is known.
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
    status: str = ABORTED  # whoever is stopped midway stays that
    error: str | None = None
    generated_tokens: int | None = None
    counted_prompt: int | None = None
    event_tokens: list[int] | msgspec.UnsetType = msgspec.UNSET
    spread: bool | msgspec.UnsetType = msgspec.UNSET


class Stopwatch:
    """Seconds since a run began, to the microsecond; `zero` is `perf_counter_ns` at that instant, on this machine."""

    def __init__(self, zero: int):
        self.zero = zero

    def now(self) -> float:
        """Seconds since the run began."""
        return (perf_counter_ns() - self.zero) // 1000 / 1e6


class Bounded(HTTPSocketPoolResponse):
    """An answer that gives up on headers, lines and comments without end; `unread`: bytes since the last event."""

    unread = 0

    def feed(self, data: str | bytes) -> None:
        """See `HTTPResponse.feed`."""
        self.count(len(data))
        super().feed(data)

    def count(self, more: int) -> None:
        """Give up if there are too many bytes, `more` of them new."""
        self.unread += more
        if self.unread > MOST_BYTES:
            raise HTTPParseError(f"more than {MOST_BYTES >> 20} MiB came without an event")


setattr(geventhttpclient.client, "HTTPSocketPoolResponse", Bounded)  # noqa: B010 - it cannot be told which to make


class Patience:
    """Throws `TimeoutError` into the greenlet that began it, `seconds` after the last `progress` and not before.

    One timer, set anew only when it goes off: tokens cost nothing. A socket's timeout would begin anew with every byte.
    """

    def __init__(self, seconds: float, now: Callable[[], float]):
        self.seconds, self._now = seconds, now
        self._greenlet = gevent.getcurrent()
        self._hub = gevent.get_hub()
        self.progress = now()
        self._timer = self._begin(seconds)

    def limit(self, seconds: float) -> None:
        """Wait no longer than this from now on."""
        self.seconds, self.progress = seconds, self._now()
        self.close()
        self._timer = self._begin(seconds)

    def passed(self) -> bool:
        """Whether it is over: where bytes never stop coming, nobody else gets to run and say so."""
        return self._now() - self.progress > self.seconds

    def close(self) -> None:
        """Stop watching."""
        self._timer.stop()
        self._timer.close()

    def _begin(self, seconds: float) -> Any:
        timer = self._hub.loop.timer(seconds)
        timer.start(self._look)
        return timer

    def _look(self) -> None:
        left = self.progress + self.seconds - self._now()
        if left <= 0.001:
            self._greenlet.throw(TimeoutError)
            return
        self.close()
        self._timer = self._begin(left)


class Client:
    """A user's connection: kept alive between requests, one request at a time.

    Some servers close, without saying so, what they promised to keep (llama.cpp after every stream). A request that
    meets such a connection, closed before a byte of an answer, goes out again on a new one, and from then on every
    request has its own. Apart from that nothing is ever sent twice. Others keep open what they have ended: an answer
    ends at its `[DONE]`, and its connection is then given up. `habit` is what is known of how the server counts, shared
    by all its clients. `patience` is how long it waits for the next token,
    s; comment lines show that a server lives, not that it works.
    """

    def __init__(
        self,
        url: str,
        dialect: Dialect,
        now: Callable[[], float],
        *,
        patience: float,
        token: str | None = None,
        habit: Habit | None = None,
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
        self._dialect, self._now, self._patience = dialect, now, patience
        self._habit = habit or Habit()
        self._lingered = 0  # answers in a row whose message did not end
        self._kept, self._keep = False, True  # whether the connection has been used before; whether it may be again
        self._path = urlsplit(url).path.rstrip("/") + dialect.path
        self._url = url + dialect.path

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
        waiting = Patience(self._patience, self._now)
        try:
            try:
                response = self._post(record.id, body)
            except (HTTPConnectionClosed, ConnectionError):
                if not self._kept:
                    raise
                self._keep = self._kept = False
                response = self._post(record.id, body)
            if response.status_code != 200:
                said = response.read(REFUSAL_BYTES)
                heard = refusal(response.status_code, said, headers_of(response), self._url)
                record.status, record.error = heard.status or INCOMPLETE, heard.error
                return
            self._listen(record, response, waiting)
        except TimeoutError:
            self._fail(record, TIMEOUT, f"no token for {self._patience:g} s")
        except (ConnectionRefusedError, socket.gaierror) as e:
            self._fail(record, CONNECT, str(e))
        except (HTTPParseError, OSError) as e:
            # errors of connecting, like "no route to host", come before there is a response, and are not resets
            connected = isinstance(e, HTTPParseError | ConnectionError)
            self._fail(record, RESET if connected else CONNECT, clean(str(e)) or type(e).__name__)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
            self._fail(record, INCOMPLETE, f"an event that is not this API's: {clean(str(e))}")
        except (UnknownEncoding, zlib.error) as e:
            self._fail(record, INCOMPLETE, f"the answer cannot be unpacked: {clean(str(e))}")
        finally:
            waiting.close()
            if response is not None:
                self._kept = self._keep and record.status == OK and not response.should_close()
                response.release()
            else:
                self._kept = False

    def _post(self, number: int, body: bytes) -> HTTPSocketPoolResponse:
        headers = {"X-Request-Id": str(number)}
        if not self._keep:
            headers["Connection"] = "close"
        return self._http.request("POST", self._path, body, headers)

    def _listen(self, record: Record, response: HTTPSocketPoolResponse, waiting: Patience) -> None:
        """Read an answer to its end, whatever it turns out to be."""
        counter, parser = Counter(self._habit), EventParser()
        record.token_times = counter.times
        try:
            self._read(record, response, parser, counter, waiting)
        finally:
            if parser.body is None:
                limited = record.finish_reason == "length"
                found = counter.settle(record.status == OK, record.max_new_tokens if limited else None)
                record.token_times, record.output_tokens = found.times, len(found.times)
                if any(n != 1 for n in found.carried):
                    record.event_tokens = found.carried
                if found.spread:
                    record.spread = True
        if parser.body is not None:
            self._take_whole(record, bytes(parser.body), headers_of(response))

    def _read(
        self,
        record: Record,
        response: HTTPSocketPoolResponse,
        parser: EventParser,
        counter: Counter,
        waiting: Patience,
    ) -> None:
        now, hear = self._now, self._dialect.hear
        assert isinstance(response, Bounded)
        most = ENDLESS_FACTOR * record.max_new_tokens + ENDLESS_EVENTS
        unpack = unpacker(str(response.get("content-encoding") or ""))
        while block := arrived(response):
            unpacked = unpack(block)
            response.count(len(unpacked) - len(block))
            for event in parser.feed(unpacked):
                at = waiting.progress = now()
                response.unread = 0
                most -= 1
                if most < 0:
                    record.status, record.error = INCOMPLETE, "far more came than was asked: the answer has no end"
                    return
                if self._take(record, counter, at, hear(event)):
                    self._finish(response, waiting)
                    return
                if record.status == OK:
                    waiting.limit(CLOSING_SECONDS if record.generated_tokens is None else COUNTED_SECONDS)
            if waiting.passed():  # meanwhile came comments, or fields we have no use for
                raise TimeoutError
        for event in parser.end():
            if self._take(record, counter, now(), hear(event)):
                return
        if parser.body is None and record.status != OK:
            record.status, record.error = INCOMPLETE, "the stream ended without a last token"

    def _take(self, record: Record, counter: Counter, at: float, heard: Heard) -> bool:
        """Write down what an event says; whether the answer ends with it."""
        if heard is TOKEN:
            counter.hear(at, OUTPUT, None)
            return False
        if heard.status is not None:
            record.status, record.error = heard.status, heard.error
            return True
        if heard.kind or heard.tokens is not None:
            counter.hear(at, heard.kind, heard.tokens)
        if heard.finish_reason is not None:
            record.finish_reason, record.status = heard.finish_reason, OK
        if heard.tokens is not None:
            record.generated_tokens = heard.tokens
        if heard.prompt_tokens is not None:
            record.counted_prompt = heard.prompt_tokens
        if heard.done and counter.begun:
            record.status = OK
        if record.status == OK:
            record.ended = at
        return heard.done

    def _take_whole(self, record: Record, body: bytes, headers: dict[str, str]) -> None:
        """An answer that was not streamed, or no answer at all."""
        if body.startswith(b"<"):
            self._fail(record, INCOMPLETE, explain(200, headers | {"content-encoding": ""}, body))
            return
        heard = self._dialect.whole(body)
        record.finish_reason, record.error = heard.finish_reason, heard.error
        record.status = heard.status or OK
        record.generated_tokens, record.counted_prompt = heard.tokens, heard.prompt_tokens
        if heard.tokens is not None:
            record.output_tokens = heard.tokens
        elif heard.finish_reason == "length":
            record.output_tokens = record.max_new_tokens

    def _finish(self, response: HTTPSocketPoolResponse, waiting: Patience) -> None:
        """See the message to its end after the answer's, so that its connection can be used again; but hardly wait."""
        if self._lingered >= LINGERS:
            return
        waiting.limit(LINGER_SECONDS)
        try:
            while arrived(response):
                pass
        except TimeoutError:
            self._lingered += 1
        except (HTTPParseError, OSError):
            pass
        else:
            self._lingered = 0

    @staticmethod
    def _fail(record: Record, status: str, error: str) -> None:
        if record.status != OK:  # after the last token it no longer matters how the connection ended
            record.status, record.error = status, error


def arrived(response: HTTPSocketPoolResponse) -> bytes:
    """What has come of a body since the last time, waiting for a first byte; nothing at its end."""
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


def settle_memory() -> None:
    """Keep the collector away from everything that lives as long as the process: its pauses would show as latency."""
    gc.collect()
    gc.freeze()
