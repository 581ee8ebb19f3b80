"""Who asks: users who wait for their answer (closed loop), and streams of arrivals who do not (open loop).

Times on a client's clock differ from the server's by an uplink, a downlink and, between two requests of a user, a
turnaround. Milliseconds decide which users share a prefill, so all three are distributions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from sim.cluster.clock import Clock
from sim.cluster.frontend import FrontEnd
from sim.cluster.request_log import RequestLog
from sim.model.calibration import Clocks, Delay
from sim.model.request import Request
from sim.model.status import Status
from sim.model.workload import RequestSpec, Source


class Delays:
    """Draws from a `Delay`, s."""

    BLOCK = 4096

    def __init__(self, law: Delay, rng: np.random.Generator):
        self._law, self._rng = np.asarray(law.quantiles, dtype=np.float64), rng
        self._per_token = law.per_token
        self._block: list[float] = []
        self._constant = float(self._law[0]) if len(self._law) == 1 else None

    def draw(self, prompt_tokens: int) -> float:
        """One delay of a request with so many prompt tokens."""
        if self._constant is not None:
            return self._constant + self._per_token * prompt_tokens
        if not self._block:
            u = self._rng.random(self.BLOCK) * (len(self._law) - 1)
            self._block = np.interp(u, np.arange(len(self._law)), self._law).tolist()
        return self._block.pop() + self._per_token * prompt_tokens


class Patience(NamedTuple):
    """After how long a client gives a request up, s: without a first token, or without the `whole` answer."""

    seconds: float = math.inf
    whole: bool = False


FOR_EVER = Patience()


class Clients:
    """What users and streams share: they send to one server and keep the log.

    `on_ended(request, ended)` is called as each request ends, at the server's instant, with the client's.
    """

    def __init__(
        self,
        clock: Clock,
        source: Source,
        clocks: Clocks,
        rng: np.random.Generator,
        *,
        think: float = 0.0,
        retry: float = 0.2,
        patience: Patience = FOR_EVER,
    ):
        self.clock, self.source = clock, source
        self.uplink, self.downlink, self.turnaround, self.spacing = (
            Delays(law, child)
            for law, child in zip(
                (clocks.uplink, clocks.downlink, clocks.turnaround, clocks.spacing), rng.spawn(4), strict=True
            )
        )
        self._turn = -float("inf")  # when the client last began to deal with an answer: it does one at a time
        self._burst: set[int] = set()  # requests whose turns followed one another, not yet on their way
        self._burst_end = -float("inf")  # when the last of them was sent
        self._reading = clocks.reading
        self.think, self.retry, self.patience = think, retry, patience
        self.log = RequestLog()
        self.server: FrontEnd
        self.on_ended: Callable[[Request, float], None] = lambda request, ended: None
        self._in_flight: dict[int, Request] = {}
        self._ids = 0

    def add_user(self, user: int) -> None:
        """A closed-loop user begins now and goes on for ever."""
        self._send(user, self.source.next(user), self.clock.now)

    def ask(self, asked: RequestSpec, sent: float, scheduled: float | None = None) -> None:
        """One open-loop request; `scheduled` is when it was due, if it is sent later than that."""
        self._send(-1, asked, sent, scheduled)

    def arrive(self, arrivals: Iterator[tuple[float, RequestSpec]], scheduled: Iterator[float] | None = None) -> None:
        """A stream of open-loop requests, each with the time at which it is sent; these do not decrease.

        `scheduled` are the times at which a late client should have sent them.
        """
        first = next(arrivals, None)
        if first is None:
            return
        sent, asked = first
        due = None if scheduled is None else next(scheduled)

        def fire(_: object) -> None:
            self.ask(asked, sent, due)
            self.arrive(arrivals, scheduled)

        self.clock.call(sent, fire)

    def ended(self, r: Request) -> None:
        """The server has answered (`FrontEnd.on_end`): note when the client saw it, and let a user go on."""
        del self._in_flight[r.id]
        downlink = self.downlink.draw(0)
        ended = last = r.last_token + downlink
        if r.status == Status.OK:
            first = last if r.received == 1 else min(last, r.first_token + self.downlink.draw(0))
            self.log.append(r, ended, first, last)
        else:
            self.log.append(r, ended, float("nan"), float("nan"))
        self.on_ended(r, ended)
        if r.user >= 0:
            pause = self.think if r.status == Status.OK else self.retry
            asked = self.source.next(r.user)
            free = self._turn + self.spacing.draw(asked.prompt_tokens)
            self._turn = max(ended, free)
            read = self._reading * self.server.running
            at = self._turn + pause + read + self.turnaround.draw(asked.prompt_tokens)
            self._send(r.user, asked, at)
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
        if math.isnan(r.queued):
            r.gone = True  # on its way there
        else:
            self.server.cancel(r)
        first = r.first_token + self.downlink.draw(0) if r.received else float("nan")
        self.log.append(r, now, min(first, now), float("nan"))
        if r.user >= 0:
            asked = self.source.next(r.user)
            self._send(r.user, asked, now + self.retry + self.turnaround.draw(asked.prompt_tokens))

    def abort(self) -> None:
        """The run ends now: what is in flight is kept as `aborted`."""
        now = self.clock.now
        for r in self._in_flight.values():
            if r.sent >= now:
                continue  # its user would have sent it later
            r.status = Status.ABORTED
            r.received = self.server.received(r)
            first = r.first_token + self.downlink.draw(0) if r.received else float("nan")
            self.log.append(r, now, first if first <= now else float("nan"), float("nan"))
        self._in_flight.clear()

    def _send(self, user: int, asked: RequestSpec, at: float, scheduled: float | None = None) -> None:
        prompt, output, new = asked
        self._ids += 1
        r = Request(self._ids, prompt, output, new, user, at, scheduled)
        self._in_flight[r.id] = r
        self.clock.call(at + self.uplink.draw(0), self._reach, r)
        if self.patience.seconds < math.inf:
            self.clock.call(at + self.patience.seconds, self._give_up, r)

    def _reach(self, r: Request) -> None:
        if r.id in self._burst:
            self._burst.remove(r.id)
            if self._burst_end > r.sent:  # the client wrote nothing before it had dealt with all the answers it had
                self.clock.call(self._burst_end + self.uplink.draw(0), self._reach, r)
                return
        self.server.reach(r)
