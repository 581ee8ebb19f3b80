"""What a server does with a request before its engine sees it: permits, and workers that count the prompt's tokens."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapreplace
from math import inf, isnan, nextafter

from sim.cluster.clock import Clock
from sim.cluster.replica import Replica
from sim.engines.engine import Engine, ServerState
from sim.model.request import Request
from sim.model.status import Status


class FrontEnd:
    """In front of one engine and behind the clients. `on_end(request)` is called as `Replica` calls it.

    `permits` is how many requests are let in at once, queued and running alike; others end as `overloaded`. Each of
    `workers` counts the tokens of one prompt at a time, in the order of arrival, and takes `seconds_per_token`.
    `allowed` (`EngineFlags.allowed`) says to how many tokens a request is cut. `index` is its replica's.
    """

    def __init__(
        self,
        clock: Clock,
        on_end: Callable[[Request], None],
        permits: int | None = None,
        workers: int = 1,
        seconds_per_token: float = 0.0,
        allowed: Callable[[int, int], int] | None = None,
        index: int = 0,
    ):
        self.clock, self.on_end, self.allowed = clock, on_end, allowed
        self.permits = inf if permits is None else permits
        self.index, self.in_use = index, 0  # permits in use
        self.replica: Replica
        self._arrived = -inf  # of the last request
        self._per_token = seconds_per_token
        self._busy = [-inf] * workers  # until when each counts; the first is free first

    @property
    def running(self) -> int:
        """How many requests are in the engine's batch."""
        return self.replica.running

    def reach(self, request: Request) -> None:
        """A request arrives at the server now; its client may leave while its tokens are counted."""
        request.replica = self.index
        if not self._per_token or self.in_use >= self.permits:
            self._counted(request)  # who is turned away is not counted
            return
        done = max(self.clock.now, self._busy[0]) + self._per_token * request.prompt_tokens
        heapreplace(self._busy, done)
        self.clock.call(done, self._counted, request)

    def submit(self, request: Request) -> None:
        """Let a request whose tokens are counted in, or refuse it (a permit that is missing before wrong lengths).

        Raises `CannotFit` for one that the real server would keep for ever.
        """
        if self.in_use >= self.permits:
            request.status, request.last_token = Status.OVERLOADED, self.clock.now
            self.on_end(request)
            return
        self.in_use += 1
        if self.allowed is not None:
            most = self.allowed(request.prompt_tokens, request.max_new_tokens)
            if most <= 0:
                request.status, request.last_token = Status.VALIDATION, self.clock.now
                self.ended(request)
                return
            if most < request.max_new_tokens:
                request.max_new_tokens, request.output_tokens = most, min(request.output_tokens, most)
        now = self.clock.now  # a server's clock shows no two requests the same time, and vLLM's priorities need that
        request.arrived = self._arrived = now if now > self._arrived else nextafter(self._arrived, inf)
        self.replica.submit(request)

    def cancel(self, request: Request) -> None:
        """The request's client goes away now; it may be on its way, or its tokens be counted yet."""
        request.gone = True
        if not isnan(request.queued):
            self.in_use -= 1
            self.replica.cancel(request)

    def restart(self, engine: Engine) -> None:
        """The server dies now, with all that it holds; it starts again with an `engine` that holds nothing."""
        self.in_use, self._busy = 0, [-inf] * len(self._busy)
        self.replica.restart(engine)

    def received(self, request: Request) -> int:
        """The tokens that the server has made by now for a request that has not ended."""
        return self.replica.received(request)

    def state(self) -> ServerState:
        """The engine's gauges now."""
        return self.replica.state()

    def ended(self, request: Request) -> None:
        """The engine has ended a request (`Replica.on_end`)."""
        self.in_use -= 1
        self.on_end(request)

    def _counted(self, request: Request) -> None:
        if not request.gone:
            self.submit(request)
