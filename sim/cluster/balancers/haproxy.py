"""HAProxy 2.6's backend: servers with a limit of requests at a time, and a queue for all where they are full.

Source: src/backend.c (assign_server), queue.c and the modules named below. Weights inside are 16 times those that are
configured, so that a server that is starting slowly can have less. A request that failed at a server goes to another
(`option redispatch`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import count
from math import gcd, inf
from operator import itemgetter
from typing import ClassVar, TypedDict, Unpack

from sim.cluster.balancers.balancer import Backend, Change, ChangeKind, Draws, Ending, Starts, Target, key_of
from sim.model.request import Request
from sim.model.status import Status

SCALE = 16  # of weights (BE_WEIGHT_SCALE)
TURNAROUND = 1.0  # s until a failed connection is tried again (back_handle_st_cer); no request takes its slot before
MAX_WEIGHT = 4096  # inside (SRV_EWGHT_MAX): a server has as many keys on the ring at the most
WORD = 2**32


class Queue:
    """Requests that wait, the lowest priority class first, then the oldest."""

    def __init__(self, numbers: Iterator[int]):
        self._numbers = numbers  # of arrivals, of all queues
        self._heap: list[tuple[int, int, Request]] = []
        self._waiting: dict[Request, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting

    def push(self, request: Request) -> None:
        """Let a request wait."""
        self._waiting[request] = number = next(self._numbers)
        heappush(self._heap, (request.priority, number, request))

    def remove(self, request: Request) -> None:
        """A request waits no longer."""
        del self._waiting[request]

    def head(self) -> tuple[int, int] | None:
        """The class and the number of the first request; None: no request waits."""
        while self._heap and self._waiting.get(self._heap[0][2]) != self._heap[0][1]:
            heappop(self._heap)
        return self._heap[0][:2] if self._heap else None

    def pop(self) -> Request:
        """Take the first request out, after `head`."""
        request = heappop(self._heap)[2]
        del self._waiting[request]
        return request


class Server:
    """A target as HAProxy keeps it."""

    def __init__(self, index: int, config: Backend, numbers: Iterator[int], slow_start: int):
        self.index, self.weight, self.max_connections = index, config.weight, config.max_connections
        self.down, self.stopped = config.down, ""  # by the checks; by the operator (maint, drain)
        self.slow_start = self.seconds_up = slow_start  # the latter is counted up to the former
        self.since = -inf  # when it last came up, s
        self.effective = SCALE * config.weight
        self.served = 0  # requests that hold a slot
        self.sessions = 0  # all that it answers: those, and what it took from the queue as it came up
        self.queue = Queue(numbers)  # its own
        self.failing_until = -inf  # s: it takes nothing from the queues before
        self.key, self.place = 0, index  # leastconn, roundrobin: where it is in the tree, and among equals
        self.position = self.last_position = self.rest = 0  # roundrobin
        self.tree: list[Server] | None = None  # roundrobin

    @property
    def usable(self) -> bool:
        """Whether it takes new requests."""
        return not self.down and not self.stopped and self.effective > 0

    @property
    def limit(self) -> float:
        """How many requests it may hold at a time."""
        if self.seconds_up < self.slow_start and self.max_connections:
            return max(1, self.max_connections * (100 * self.seconds_up // self.slow_start) // 100)
        return self.max_connections or inf

    @property
    def full(self) -> bool:
        """Whether a request that is sent to it now must wait."""
        return bool(self.queue) or self.served >= self.limit

    def weigh(self) -> None:
        """Find the effective weight."""
        share = SCALE
        if self.seconds_up < self.slow_start:
            share = (SCALE * self.seconds_up + self.slow_start) // self.slow_start
        self.effective = self.weight * share


class Options(TypedDict, total=False):
    """Settings of all policies: `queue_timeout`, s; `abort_on_close`, the option abortonclose; `slow_start`, for how
    long a server that comes up has less than its weight, whole s."""

    queue_timeout: float
    abort_on_close: bool
    slow_start: int


class HAProxy(ABC):
    """What all policies share. A policy is `_next`, and hears of changes by `_moved` and `_changed`."""

    _waits_behind: ClassVar[bool] = False  # arrivals go to the queue whenever it is not empty
    _hashes: ClassVar[bool] = False  # a request waits for its own server

    def __init__(self, backends: Sequence[Backend], **options: Unpack[Options]):
        self.cancels = options.get("abort_on_close", False)
        self.queue_timeout = options.get("queue_timeout", inf)
        slow_start = options.get("slow_start", 0)
        numbers = count()
        self._servers = [Server(i, backend, numbers, slow_start) for i, backend in enumerate(backends)]
        self._queue = Queue(numbers)
        self._places = count(len(backends))
        self._uncounted: set[Request] = set()  # those that hold no slot
        self._failing: dict[Server, None] = {}

    @abstractmethod
    def _next(self, request: Request, usable: list[Server]) -> Server | None:
        """One of those that can be used. If it is full, or None, the request waits."""

    def _moved(self, server: Server) -> None:  # noqa: B027 - most policies need not know
        """A server has more requests, or fewer."""

    def _changed(self, server: Server, before: int) -> None:  # noqa: B027 - likewise
        """A server has another weight or can be used again, or no longer; `before`: its weight if it could, or 0."""

    def choose(
        self, request: Request, targets: Sequence[Target], now: float, tried: Sequence[int] = ()
    ) -> int | Status | None:
        """The server; None: it waits here; a refusal (503) where there is no server."""
        self._warm_up(now)
        usable = [s for s in self._servers if s.usable and s.index not in tried]
        if not usable:
            return Status.OVERLOADED
        behind = self._waits_behind and self._queue and any(s.sessions for s in self._servers)
        server = None if behind else self._next(request, usable)
        overtakes = server in self._failing and server.served < server.limit  # else its own queue might wait for ever
        if server is not None and (overtakes or not server.full):
            server.served += 1
            server.sessions += 1
            self._moved(server)
            return server.index
        (self._queue if server is None or not self._hashes else server.queue).push(request)
        return None

    def ended(self, request: Request, target: int | None, how: Ending, targets: Sequence[Target], now: float) -> Starts:
        """Its slot, if it held one, goes to the head of the queues."""
        self._warm_up(now)
        if target is None:
            next(q for q in (self._queue, *(s.queue for s in self._servers)) if request in q).remove(request)
            return ()
        server = self._servers[target]
        server.sessions -= 1
        if request in self._uncounted:
            self._uncounted.remove(request)
        else:
            server.served -= 1
        if how is Ending.FAILED:
            server.failing_until = now + TURNAROUND
            self._failing[server] = None
        starts = self._drain(server) if server not in self._failing and server.sessions < server.limit else []
        self._moved(server)  # once: a slot that is passed on does not move it
        for failed in [s for s in self._failing if s.failing_until <= now]:
            del self._failing[failed]
            starts += self._drain(failed)
            self._moved(failed)
        return starts

    def _drain(self, server: Server) -> list[tuple[Request, int]]:
        """Let a server take from the queues while it has slots."""
        starts: list[tuple[Request, int]] = []
        while server.served < server.limit:
            own, common = server.queue.head(), self._queue.head() if server.usable else None
            if own is None and common is None:
                break
            takes_own = common is None or (own is not None and own < common)
            starts.append(((server.queue if takes_own else self._queue).pop(), server.index))
            server.served += 1
            server.sessions += 1
        return starts

    def changed(self, target: int, change: Change, targets: Sequence[Target], now: float) -> Starts:
        """A server that comes up takes up to its limit from the queue; those requests hold no slot."""
        self._warm_up(now)
        server, starts = self._servers[target], list[tuple[Request, int]]()
        before, drained = server.effective if server.usable else 0, server.stopped == ChangeKind.DRAIN
        if change.what is ChangeKind.MAX_CONNECTIONS:
            server.max_connections = change.value
            starts = self._drain(server)
            self._moved(server)
            return starts
        if change.what is ChangeKind.WEIGHT:
            server.weight = change.value
        elif change.what in (ChangeKind.UP, ChangeKind.DOWN):
            server.down = change.what is ChangeKind.DOWN
        else:
            server.stopped = "" if change.what is ChangeKind.READY else change.what
        server.weigh()
        comes_up = server.usable and not before and change.what is not ChangeKind.WEIGHT
        if comes_up and not drained:
            server.since, server.seconds_up = now, 0
            server.weigh()
        self._changed(server, before)
        if comes_up and not drained:
            while self._queue.head() is not None and server.served + len(starts) < server.limit:
                starts.append((self._queue.pop(), server.index))
            self._uncounted.update(request for request, _ in starts)
            server.sessions += len(starts)
        elif not server.usable and server.stopped != ChangeKind.DRAIN:
            while server.queue.head() is not None:
                other = self.choose(request := server.queue.pop(), targets, now)
                if isinstance(other, Status):
                    self._queue.push(request)
                elif other is not None:
                    starts.append((request, other))
        return starts

    def _warm_up(self, now: float) -> None:
        """Renew the weights of servers that start slowly, as the software does each second."""
        for server in self._servers:
            while server.seconds_up < server.slow_start and now >= server.since + server.seconds_up + 1:
                before = server.effective if server.usable else 0
                server.seconds_up += 1
                server.weigh()
                self._changed(server, before)


class First(HAProxy):
    """The first server that is not full, in the order of configuration (backend.c, fas)."""

    _waits_behind = True

    def _next(self, request: Request, usable: list[Server]) -> Server | None:
        return next((s for s in usable if not s.full), None)


class LeastConnections(HAProxy):
    """Fewest requests by weight; of equals the one whose count changed longest ago (lb_fwlc.c)."""

    def _next(self, request: Request, usable: list[Server]) -> Server | None:
        return min((s for s in usable if not s.full), key=lambda s: (s.key, s.place), default=None)

    def _moved(self, server: Server) -> None:
        if not server.usable:  # it is in no tree
            return
        requests = server.served + len(server.queue)
        key = (requests + 1) * MAX_WEIGHT // server.effective if requests else 0
        if key != server.key:
            server.key, server.place = key, next(self._places)

    def _changed(self, server: Server, before: int) -> None:
        if server.usable and server.effective != before:
            server.key = -1  # inserted anew
            self._moved(server)


class RoundRobin(HAProxy):
    """By weight, smooth: servers have positions in a cycle as long as the sum of weights (lb_fwrr.c).

    Servers are in one of three trees: those of this cycle that were not used yet (init, the heaviest first), those that
    were and will be again (current, by position), and those of the next cycle.
    """

    _waits_behind = True

    def __init__(self, backends: Sequence[Backend], **options: Unpack[Options]):
        super().__init__(backends, **options)
        self._initial: list[Server] = []
        self._following: list[Server] = []
        self._current: list[Server] = []
        usable = [s for s in self._servers if s.usable]
        for server in usable:
            self._insert(self._initial, server, -server.effective)
        self._at = self._cycle = self._next_cycle = sum(s.effective for s in usable)  # position, sums of weights

    def _insert(self, tree: list[Server], server: Server, key: int) -> None:
        if server.tree is not None and server in server.tree:
            server.tree.remove(server)
        server.key, server.tree = key, tree
        insort(tree, server, key=lambda s: s.key)  # after its equals

    def _requeue(self, server: Server) -> None:
        if server.position >= min(2 * self._cycle, self._cycle + self._next_cycle):
            server.position -= self._cycle
            self._insert(self._following, server, -server.effective)
        else:
            fraction = (MAX_WEIGHT + server.rest - server.effective) // SCALE
            self._insert(self._current, server, MAX_WEIGHT // SCALE * server.position + fraction)

    def _first(self) -> Server | None:
        if self._current and self._current[0].position <= self._at:
            return self._current[0]
        if self._initial:
            self._initial[0].position = self._initial[0].rest = 0
            return self._initial[0]
        return self._current[0] if self._current else None

    def _next(self, request: Request, usable: list[Server]) -> Server | None:
        passed: list[Server] = []
        switched = False
        while True:
            if not self._cycle:
                self._at = self._cycle = self._next_cycle
            server = self._first()
            if server is None and not switched:
                switched = True
                self._initial, self._following = self._following, self._initial
                self._at = self._cycle = self._next_cycle
                server = self._first()
            if server is None:
                break
            assert server.tree is not None
            server.tree.remove(server)
            self._advance(server)
            if not server.full and server in usable:
                self._requeue(server)
                break
            passed.append(server)
        for full in reversed(passed):
            if switched:
                self._insert(self._initial, full, -full.effective)
            else:
                self._requeue(full)
        return server

    def _advance(self, server: Server) -> None:
        if not server.position:
            server.position = self._at
        server.last_position = server.position
        step, rest = divmod(self._next_cycle, server.effective)
        server.position += step
        server.rest += rest
        if server.rest >= server.effective:
            server.rest -= server.effective
            server.position += 1
        self._at += 1

    def _changed(self, server: Server, before: int) -> None:
        after = server.effective if server.usable else 0
        if after == before:
            return
        self._next_cycle += after - before
        tree = server.tree
        if not after:
            assert tree is not None
            tree.remove(server)
            server.tree = None
        elif tree is None:
            server.position = self._at + (self._next_cycle + self._cycle - self._at) // after
            self._requeue(server)
        elif tree is self._initial:
            self._insert(tree, server, -after)
        else:
            if tree is self._following:
                server.position += self._cycle
            step = self._next_cycle // after
            server.position = min(server.last_position + step, server.position)
            server.rest = 0
            if server.position < self._at + 2:
                server.position = self._at + step
            self._requeue(server)


class Ring(HAProxy):
    """Servers on a ring of as many points as their weight; the nearer point around a number wins (lb_chash.c).

    `balance_factor`, per cent: a server with more than its share of so much of the mean is passed over; 0: none is.
    """

    def __init__(self, backends: Sequence[Backend], balance_factor: int = 0, **options: Unpack[Options]):
        super().__init__(backends, **options)
        self._factor = balance_factor
        self._place_points()

    def _place_points(self) -> None:
        points = [
            (scatter((s.index + 1) * MAX_WEIGHT + k), s) for s in self._servers if s.usable for k in range(s.effective)
        ]
        self._points = sorted(points, key=itemgetter(0))

    def _changed(self, server: Server, before: int) -> None:
        self._place_points()

    def _nearest(self, number: int, usable: list[Server]) -> Server:
        """The server of the nearer point; where it cannot be used, that of the next point."""
        points, size = self._points, len(self._points)
        at = bisect_left(points, number, key=itemgetter(0)) % size
        if (number - points[at - 1][0]) % WORD <= (points[at][0] - number) % WORD:
            at -= 1

        def around() -> Iterator[Server]:
            return (s for k in range(size) if (s := points[(at + k) % size][1]) in usable)

        spared = (s for s in around() if not (self._factor and self._has_its_share(s)))
        return next(spared, None) or next(around())

    def _has_its_share(self, server: Server) -> bool:
        """Whether it has its part of the slots: the requests there would be × the factor, by cumulative weight."""
        slots = -(-(sum(s.served for s in self._servers) + 1) * self._factor // 100)
        usable = [s for s in self._servers if s.usable]
        total = sum(s.effective for s in usable)
        each, rest = divmod(slots, total)
        below = sum(s.effective for s in usable if s.index < server.index)
        part = (below + server.effective) * rest // total - below * rest // total
        return server.served >= max(1, server.effective * each + part)


class Random(Ring):
    """The best of some servers drawn on the ring, by requests and weight; it does not look who is full (backend.c)."""

    def __init__(self, backends: Sequence[Backend], draws: Draws, choices: int = 2, **options: Unpack[Options]):
        super().__init__(backends, **options)
        self._draws, self._choices = draws, choices

    def _next(self, request: Request, usable: list[Server]) -> Server | None:
        best = self._nearest(self._draws(request), usable)
        for _ in range(self._choices - 1):
            drawn = self._nearest(self._draws(request), usable)
            if drawn.served * best.effective <= best.served * drawn.effective:
                best = drawn
        return best


class Hash(Ring):
    """By key on the ring (`hash-type consistent`); a client's IPv4 address is taken as a number (balance source)."""

    _hashes = True

    def _next(self, request: Request, usable: list[Server]) -> Server | None:
        return self._nearest(scatter(number_of(key_of(request))), usable)


class MapHash(HAProxy):
    """By key in a table, as long as the sum of weights, in the order of a weighted round robin (lb_map.c)."""

    _hashes = True

    def _next(self, request: Request, usable: list[Server]) -> Server | None:
        factor = gcd(*(s.weight for s in self._servers))
        total = sum(s.weight for s in usable) // factor
        scores = dict.fromkeys(usable, 0)
        at = number_of(key_of(request)) % total
        for _ in range(at + 1):
            for server in usable:
                scores[server] += server.weight // factor
            best = max(usable, key=lambda s: (scores[s] + total) // total)
            scores[best] -= total
        return best


def number_of(key: str) -> int:
    """The number of a key: of an IPv4 address its four bytes, the first the highest; else its hash (sdbm)."""
    parts = key.split(".")
    if len(parts) == 4 and all(part.isdecimal() for part in parts):
        return int.from_bytes(bytes(map(int, parts)))
    number = 0
    for byte in key.encode():
        number = (byte + (number << 6) + (number << 16) - number) % WORD
    return number


def scatter(number: int) -> int:
    """Spread numbers over 32 bits: Bob Jenkins' integer hash in six shifts, times a prime (full_hash)."""
    number = (number + 0x7ED55D16 + (number << 12)) % WORD
    number = number ^ 0xC761C23C ^ number >> 19
    number = (number + 0x165667B1 + (number << 5)) % WORD
    number = (number + 0xD3A2646C ^ number << 9) % WORD
    number = (number + 0xFD7046C5 + (number << 3)) % WORD
    number = number ^ 0xB55A4F09 ^ number >> 16
    return number * 3221225473 % WORD
