"""Several servers behind a balancer: to its clients one server, to each of its replicas a client.

The fleet decides nothing. It tells the balancer what it can know (requests that come and end, checks that fail, gauges
as old as their scrape), and does what the balancer says. A replica that dies loses all that it holds; until the
balancer knows, requests are sent to it and fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from math import ceil, inf

from sim.cluster.balancers.balancer import Balancer, Change, ChangeKind, Ending, Starts, Target
from sim.cluster.clock import Clock
from sim.cluster.frontend import FrontEnd
from sim.engines.engine import Engine, ServerState
from sim.model.fleet import ActiveChecks, Outage
from sim.model.request import Request
from sim.model.status import Status


class Fleet:
    """Replicas, each behind its own front end, that share requests. `on_end(request)` is called as `FrontEnd` calls it.

    With `per_connection` a user, or a session, stays with the replica that was chosen for its first request for as long
    as the connection holds: the balancer hears of connections. It sees gauges that are up to `scrape_seconds` old; none
    at all with None. `in_flight` are the requests that have not ended: a replica that dies takes its own with it.
    """

    def __init__(
        self,
        clock: Clock,
        fronts: Sequence[FrontEnd],
        balancer: Balancer,
        on_end: Callable[[Request], None],
        *,
        per_connection: bool = False,
        scrape_seconds: float | None = None,
        in_flight: Callable[[], Iterable[Request]] = tuple,
    ):
        self.clock, self.fronts, self.balancer, self.on_end = clock, fronts, balancer, on_end
        self._targets = [Target(seen=front.state(), seen_at=clock.now) for front in fronts]
        self._in_flight = in_flight
        self._queued: set[Request] = set()  # at the balancer
        self._left: set[Request] = set()  # whose clients have left, and which go on
        self._dead: set[int] = set()
        self._connections: dict[object, Request] | None = {} if per_connection else None  # the first request of each
        self._scrape_seconds, self._always_fresh = scrape_seconds, scrape_seconds == 0.0
        if scrape_seconds:
            clock.call(clock.now + scrape_seconds, self._scrape)
        for front in fronts:
            front.on_end = self._ended

    @property
    def running(self) -> int:
        """How many requests are in the engines' batches."""
        return sum(front.running for front in self.fronts)

    def reach(self, request: Request) -> None:
        """A request arrives at the balancer now."""
        if request.gone:
            return
        if self._connections is not None:
            opened = self._connections.get(_connection(request))
            if opened is not None:
                self._start(request, opened.replica)
                return
        self._route(request, ())

    def cancel(self, request: Request) -> None:
        """The request's client goes away now; it may be on its way yet, or wait at the balancer."""
        if request in self._queued:
            if self.balancer.cancels:
                request.gone = True
                self._queued.remove(request)
                self._tell(request, None, Ending.LEFT)
            else:
                self._left.add(request)
        elif request.replica < 0:
            request.gone = True  # on its way
        elif self.balancer.cancels:
            self.fronts[request.replica].cancel(request)
            self._closed(request, Ending.LEFT)
        else:
            self._left.add(request)

    def received(self, request: Request) -> int:
        """The tokens that a replica has made by now for a request that has not ended."""
        return 0 if request.replica < 0 else self.fronts[request.replica].received(request)

    def state(self) -> ServerState:
        """The gauges of all replicas together now."""
        return ServerState(*map(sum, zip(*(_numbers(front.state()) for front in self.fronts), strict=True)))

    def plan_outages(
        self, outages: Iterable[Outage], checks: ActiveChecks | None, engines: Sequence[Callable[[], Engine]]
    ) -> None:
        """Have replicas die and come back, as the balancer's `checks` notice, if it makes any."""
        for outage in outages:
            number, start, end = outage.replica, outage.at, outage.at + outage.seconds
            self.clock.call(start, self._die, (number, engines[number]))
            self.clock.call(end, self._dead.discard, number)
            if checks is not None and (seen := seen_between(start, end, checks)) is not None:
                self.clock.call(seen[0], self._noticed, (number, False))
                self.clock.call(seen[1], self._noticed, (number, True))

    def _route(self, request: Request, tried: tuple[int, ...]) -> None:
        """Have the balancer choose, after `tried` replicas had failed."""
        if self._always_fresh:
            self._scrape()
        chosen = self.balancer.choose(request, self._targets, self.clock.now, tried)
        if type(chosen) is int:
            if self._connections is None and chosen not in self._dead:  # nearly always: a call less
                self.fronts[chosen].reach(request)
            else:
                self._start(request, chosen, tried)
        elif chosen is None:
            self._queued.add(request)
            if self.balancer.queue_timeout < inf:
                self.clock.call(self.clock.now + self.balancer.queue_timeout, self._timed_out, request)
        else:
            assert isinstance(chosen, Status)
            self._end(request, chosen)

    def _start(self, request: Request, target: int, tried: tuple[int, ...] = ()) -> None:
        """Send a request to a replica; where that one does not answer, to another."""
        if target not in self._dead:
            if self._connections is not None and (key := _connection(request)) is not None:
                self._connections.setdefault(key, request)
            self.fronts[target].reach(request)
            return
        request.replica = -1
        self._tell(request, target, Ending.FAILED)
        if target in tried:  # the balancer knows no other
            self._end(request, Status.CONNECT)
        else:
            self._route(request, (*tried, target))

    def _end(self, request: Request, status: Status) -> None:
        """A request ends without an answer, now."""
        request.status, request.last_token = status, self.clock.now
        if request in self._left:
            self._left.remove(request)
        else:
            self.on_end(request)

    def _ended(self, request: Request) -> None:
        """A replica has ended a request (`FrontEnd.on_end`)."""
        connections, keeps = self._connections, False
        if connections is None:
            ended = self.balancer.ended(request, request.replica, Ending.ANSWERED, self._targets, self.clock.now)
            if ended:
                self._start_all(ended)
        if not self._left or request not in self._left:
            self.on_end(request)
            if connections is not None:
                keeps = request.user >= 0 or (request.session is not None and not request.session.over)
        else:
            self._left.remove(request)
        if connections is not None and not keeps:
            self._closed(request, Ending.ANSWERED)

    def _closed(self, request: Request, how: Ending) -> None:
        """The connection by which a request came is closed."""
        if self._connections is not None:
            request = self._connections.pop(_connection(request), request)
        self._tell(request, request.replica, how)

    def _timed_out(self, request: Request) -> None:
        if request in self._queued:
            self._queued.remove(request)
            self._tell(request, None, Ending.TIMEOUT)
            self._end(request, Status.OVERLOADED)

    def _tell(self, request: Request, target: int | None, how: Ending) -> None:
        """The balancer hears how a request ended, and starts others that wait there."""
        if starts := self.balancer.ended(request, target, how, self._targets, self.clock.now):
            self._start_all(starts)

    def _start_all(self, starts: Starts) -> None:
        for request, target in starts:
            self._queued.remove(request)
            request.replica = target  # where its client cancels it from now on
            self.clock.call(self.clock.now, self._start_waiting, request)

    def _start_waiting(self, request: Request) -> None:
        if not request.gone:
            self._start(request, request.replica)

    def _die(self, what: tuple[int, Callable[[], Engine]]) -> None:
        """A replica dies, and loses what it holds; the connections to it break."""
        number, engine = what
        self._dead.add(number)
        lost = [r for r in chain(self._in_flight(), self._left) if r.replica == number]
        for request in lost:
            request.received, request.gone = self.fronts[number].received(request), True
        self.fronts[number].restart(engine())
        for request in lost:
            self._closed(request, Ending.FAILED)
            self._end(request, Status.RESET)
        for request in [r for r in (self._connections or {}).values() if r.replica == number]:
            self._closed(request, Ending.FAILED)  # nothing was under way there

    def _noticed(self, what: tuple[int, bool]) -> None:
        """The balancer's checks take a replica out, or back."""
        number, up = what
        self._targets[number] = self._targets[number]._replace(up=up)
        change = Change(ChangeKind.UP if up else ChangeKind.DOWN)
        self._start_all(self.balancer.changed(number, change, self._targets, self.clock.now))

    def _scrape(self, _: object = None) -> None:
        """The balancer reads the gauges of the replicas that answer."""
        now = self.clock.now
        for number, front in enumerate(self.fronts):
            if number not in self._dead:
                self._targets[number] = self._targets[number]._replace(seen=front.state(), seen_at=now)
        if self._scrape_seconds:
            self.clock.call(now + self._scrape_seconds, self._scrape)


def seen_between(start: float, end: float, checks: ActiveChecks) -> tuple[float, float] | None:
    """When the checks, at multiples of their interval, take a replica out that is dead in [start, end), and when back,
    s; None if it is back before."""
    first, back = ceil(start / checks.interval), ceil(end / checks.interval)
    if first + checks.fall > back:
        return None
    return (first + checks.fall - 1) * checks.interval, (back + checks.rise - 1) * checks.interval


def _connection(request: Request) -> object:
    """Whose connection a request comes by; None for one of its own."""
    return request.user if request.user >= 0 else request.session


def _numbers(state: ServerState) -> Iterator[int]:
    return (getattr(state, name) for name in state.__struct_fields__)
