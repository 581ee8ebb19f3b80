"""Clients: users who wait for their answer (closed loop), and streams of arrivals that do not wait (open loop).

An uplink delay lies between a client and the server, a downlink delay between the server and the client, and a
turnaround between two requests of a user. Milliseconds decide which users share a prefill, so all three are
distributions.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count, repeat
from typing import NamedTuple, Protocol

import numpy as np

from sim.cluster.clock import Clock
from sim.cluster.request_log import RequestLog
from sim.cluster.sessions import Ask, SessionSource
from sim.engines.engine import ServerState
from sim.model.calibration import Clocks
from sim.model.request import Request
from sim.model.status import Status
from sim.model.workload import RequestSpec, Source
from sim.randomness import ARRIVALS, BLOCK, Kind, Randomness

SPACING, TURNAROUND, UPLINK, BURST_UPLINK, FIRST, LAST = range(6)  # of the delays of a request
_ROWS = slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 6)  # of spacing, turnaround, uplink and downlink


class Delays:
    """Draws the delays of requests (`Clocks`), s. Those of an owner's k-th request depend on the seed, the owner and k
    only."""

    def __init__(self, clocks: Clocks, seed: int | Sequence[int]):
        self._random = Randomness(seed)
        laws = [
            np.asarray(law.quantiles) for law in (clocks.spacing, clocks.turnaround, clocks.uplink, clocks.downlink)
        ]
        self._laws = [(np.linspace(0.0, 1.0, len(law)), law, rows) for law, rows in zip(laws, _ROWS, strict=True)]
        self._constant = max(map(len, laws)) == 1

    def requests(self, owner: int) -> Iterator[tuple[float, ...]]:
        """The delays of each request of an owner, without end: spacing and turnaround before it, two uplinks (the
        second for a request that is written at the end of a burst), and the downlinks of its first and last token."""
        if self._constant:
            return repeat(next(self._draw(owner, 0)))
        return chain.from_iterable(self._draw(owner, block) for block in count())

    def _draw(self, owner: int, block: int) -> Iterator[tuple[float, ...]]:
        drawn = self._random.block(Kind.DELAYS, owner, block).random((6, BLOCK))
        for ranks, law, rows in self._laws:
            drawn[rows] = np.interp(drawn[rows], ranks, law)
        numbers = iter(array("d", drawn.T.tobytes()))  # objects are made when they are asked for: users are many
        return zip(*[numbers] * len(drawn), strict=True)


class Patience(NamedTuple):
    """How long a client waits before it gives a request up, s: for the first token, or for the `whole` answer."""

    seconds: float = math.inf
    whole: bool = False


FOR_EVER = Patience()


class Server(Protocol):
    """What clients talk to: one server, or a fleet of them."""

    @property
    def running(self) -> int:
        """How many requests are in the engines' batches."""

    def reach(self, request: Request) -> None:
        """A request arrives now."""

    def cancel(self, request: Request) -> None:
        """The request's client goes away now; the request may be on its way yet."""

    def received(self, request: Request) -> int:
        """The tokens that the server has made by now for a request that has not ended."""

    def state(self) -> ServerState:
        """The gauges now."""


class Clients:
    """Users and streams of arrivals: they send to one server and keep the log.

    `on_ended(request, ended)` is called as each request ends, at the server's instant, with the client's.
    """

    def __init__(
        self,
        clock: Clock,
        source: Source,
        clocks: Clocks,
        seed: int | Sequence[int],
        *,
        sessions: SessionSource | None = None,
        think: float = 0.0,
        retry: float = 0.2,
        patience: Patience = FOR_EVER,
        classes: Sequence[str] = (),
    ):
        self.clock, self.source, self.sessions = clock, source, sessions
        self._delays, self._reading = Delays(clocks, seed), clocks.reading
        self._spacing, self._turnaround = clocks.spacing.per_token, clocks.turnaround.per_token
        self._asks: dict[int, Iterator[Ask]] = {}  # what users ask next, but for later turns of sessions
        self._turn = -float("inf")  # when the client last began to deal with an answer: it does one at a time
        self._burst: set[int] = set()  # requests whose turns followed one another, not yet on their way
        self._burst_end = -float("inf")  # when the last of them was sent
        self.think, self.retry, self.patience = think, retry, patience
        self.log = RequestLog(classes)
        self.server: Server
        self.on_ended: Callable[[Request, float], None] = lambda request, ended: None
        self._in_flight: dict[int, Request] = {}
        self._ids = 0

    def in_flight(self) -> Iterable[Request]:
        """The requests that have not ended, in the order in which they are sent; of some that is yet to come."""
        return self._in_flight.values()

    def add_user(self, user: int) -> None:
        """Start a closed-loop user, who sends requests until the run ends."""
        self._asks[user] = self._first(user, self.source.requests(user))
        self._send(user, next(self._asks[user]), self.clock.now)

    def arrive(
        self,
        sent: Iterator[float],
        asked: Iterator[RequestSpec],
        owner: int = ARRIVALS,
        scheduled: Iterator[float] | None = None,
    ) -> None:
        """A stream of open-loop requests, or sessions, with the times at which they are sent, which do not decrease.

        `owner` is whose delays they have; `scheduled` are the times at which a late client should have sent them.
        """
        arrivals = zip(sent, repeat(None) if scheduled is None else scheduled, strict=False)
        self._arrive(zip(arrivals, self._first(owner, asked), strict=False))

    def _first(self, owner: int, asked: Iterator[RequestSpec]) -> Iterator[Ask]:
        delays = self._delays.requests(owner)
        if self.sessions is None:
            return map(Ask, asked, delays)
        return self.sessions.begin(owner, zip(asked, delays, strict=False))

    def _arrive(self, stream: Iterator[tuple[tuple[float, float | None], Ask]]) -> None:
        if (first := next(stream, None)) is None:
            return
        (sent, scheduled), ask = first

        def fire(_: object) -> None:
            self._send(-1, ask, sent, scheduled)
            self._arrive(stream)

        self.clock.call(sent, fire)

    def ended(self, r: Request) -> None:
        """The server has answered (`FrontEnd.on_end`): note when the client saw it, and let a user go on."""
        del self._in_flight[r.id]
        ended = last = r.last_token + r.delays[LAST]
        if r.status == Status.OK:
            first = last if r.received == 1 else min(last, r.first_token + r.delays[FIRST])
            self.log.append(r, ended, first, last)
        else:
            first = min(last, r.first_token + r.delays[FIRST]) if r.received else float("nan")
            self.log.append(r, ended, first, float("nan"))
        self.on_ended(r, ended)
        if (following := self._following(r)) is not None:
            ask, pause = following
            asked, delays, _ = ask
            free = self._turn + delays[SPACING] + self._spacing * asked.prompt_tokens
            self._turn = max(ended, free)
            read = self._reading * self.server.running if self._reading else 0.0
            at = self._turn + pause + read + delays[TURNAROUND] + self._turnaround * asked.prompt_tokens
            self._send(r.user, ask, at)
            if pause == 0.0:
                if free < ended:
                    self._burst, self._burst_end = set(), at
                self._burst.add(self._ids)
                self._burst_end = max(self._burst_end, at)

    def _give_up(self, r: Request) -> None:
        """The client has waited long enough, if it waits still; its user tries again."""
        if r.id not in self._in_flight or not (self.patience.whole or math.isnan(r.first_token)):
            return
        del self._in_flight[r.id]
        r.status, r.received, now = Status.TIMEOUT, self.server.received(r), self.clock.now
        self.server.cancel(r)
        first = r.first_token + r.delays[FIRST] if r.received else float("nan")
        self.log.append(r, now, min(first, now), float("nan"))
        if (following := self._following(r)) is not None:
            ask, pause = following
            turnaround = ask.delays[TURNAROUND] + self._turnaround * ask.asked.prompt_tokens
            self._send(r.user, ask, now + pause + turnaround)

    def _following(self, r: Request) -> tuple[Ask, float] | None:
        """What the client of a request that has ended sends next, and after which pause, s: the session's next turn or
        the user's next request."""
        pause = self.think if r.status == Status.OK else self.retry
        if r.session is not None and (turn := r.session.after(r)) is not None:
            return turn, r.session.think if r.status == Status.OK else self.retry
        return (next(self._asks[r.user]), pause) if r.user >= 0 else None

    def abort(self) -> None:
        """The run ends now: what is in flight is kept as `aborted`."""
        now = self.clock.now
        for r in self._in_flight.values():
            if r.sent >= now:
                continue  # its user would have sent it later
            r.status = Status.ABORTED
            r.received = self.server.received(r)
            first = r.first_token + r.delays[FIRST] if r.received else float("nan")
            self.log.append(r, now, first if first <= now else float("nan"), float("nan"))
        self._in_flight.clear()

    def _send(self, user: int, ask: Ask, at: float, scheduled: float | None = None) -> None:
        (prompt, output, new, of), delays, session = ask
        self._ids += 1
        r = Request(self._ids, prompt, output, new, user, at, scheduled)
        self._in_flight[r.id] = r
        r.delays, r.of = delays, of
        if session is not None:
            r.session, r.text = session, session.text
        self.clock.call(at + delays[UPLINK], self._reach, r)
        if self.patience.seconds < math.inf:
            self.clock.call(at + self.patience.seconds, self._give_up, r)

    def _reach(self, r: Request) -> None:
        if r.id in self._burst:
            self._burst.remove(r.id)
            if self._burst_end > r.sent:  # the client wrote nothing before it had dealt with all the answers it had
                self.clock.call(self._burst_end + r.delays[BURST_UPLINK], self._reach, r)
                return
        self.server.reach(r)
