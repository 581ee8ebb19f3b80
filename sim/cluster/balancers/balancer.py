"""What chooses a target, a server behind it, for each request: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from math import inf
from typing import NamedTuple, Protocol

from sim.engines.engine import ServerState
from sim.model.request import Request
from sim.model.status import Status
from sim.randomness import BLOCK, Kind, Randomness

Draws = Callable[[Request], int]
"""The next random number, 0 to 2³² − 1, that belongs to this request."""
Starts = Sequence[tuple[Request, int]]
"""Requests that leave the balancer's queue now, in order, and the target of each."""


class Backend(NamedTuple):
    """What a balancer's configuration says of a target."""

    weight: int = 1
    max_connections: int = 0  # at a time (nginx: max_conns, HAProxy: maxconn); 0: no limit
    max_fails: int = 1  # nginx: failures until it is left out for `fail_timeout`; 0: it never is
    fail_timeout: float = 10.0  # s
    backup: bool = False  # nginx: chosen only when all others are out
    down: bool = False  # never chosen
    address: str = ""  # host:port; the routers': a URL. Consistent hashing places targets by it


class Target(NamedTuple):
    """What a balancer is told of a target."""

    up: bool = True  # according to the health checks, if there are any; a change is told to `changed`
    seen: ServerState = ServerState(0, 0, 0, 0, 0)  # at the last scrape
    seen_at: float = -inf  # when that was, s


class Ending(StrEnum):
    """How a request left its target, or the balancer's queue."""

    ANSWERED = "answered"
    FAILED = "failed"  # not answered, or with what counts as a failure (nginx: proxy_next_upstream)
    LEFT = "left"  # its client left, and the balancer closed its connection
    TIMEOUT = "timeout"  # it was in the queue for too long


class ChangeKind(StrEnum):
    """What can happen to a target. It is down until it is up, and in maintenance or draining until it is ready."""

    UP = "up"
    DOWN = "down"
    MAINTENANCE = "maint"  # takes nothing new
    DRAIN = "drain"  # takes nothing new, and what is queued for it
    READY = "ready"
    WEIGHT = "weight"
    MAX_CONNECTIONS = "maxconn"


class Change(NamedTuple):
    """A change of a target; `value` is its new weight or limit."""

    what: ChangeKind
    value: int = 0


class Balancer(Protocol):
    """Keeps its own counts, queues and health of targets. Times in seconds."""

    cancels: bool
    """Whether a request whose client leaves is given up at once (`ended` with LEFT, and its server cancels it); if not,
    it keeps its place, is sent to a target and is answered there, and `ended` is called then."""
    queue_timeout: float
    """For how long a request may be in the queue (`ended` with TIMEOUT, by whoever has the clock), s."""

    def choose(
        self, request: Request, targets: Sequence[Target], now: float, tried: Sequence[int] = ()
    ) -> int | Status | None:
        """The target of a request; or how it ends at once; or None: it is queued here.

        After a failure it is called again, with all the targets that were tried.
        """
        ...

    def ended(self, request: Request, target: int | None, how: Ending, targets: Sequence[Target], now: float) -> Starts:
        """A request ended at a target, or in the queue (None). Who starts where in its place?"""
        ...

    def changed(self, target: int, change: Change, targets: Sequence[Target], now: float) -> Starts:
        """A target changed, and `targets` say so. Who starts where?"""
        ...


def key_of(request: Request) -> str:
    """What an affinity knows a request by: its key, else its session, its user or, of a stream, itself."""
    if request.key is not None:
        return request.key
    if request.text:
        return str(request.text[-1][1])  # what only this conversation has
    return f"user {request.user}" if request.user >= 0 else f"request {request.id}"


class SeededDraws:
    """Random numbers by seed and by user (or stream of arrivals): others' requests do not change them."""

    def __init__(self, seed: int | Sequence[int]):
        self._random = Randomness(seed)
        self._drawn: dict[int, tuple[int, list[int]]] = {}  # by user: blocks so far, what is left of the last one

    def __call__(self, request: Request) -> int:
        """The next number of the request's user."""
        blocks, left = self._drawn.get(request.user, (0, []))
        if not left:
            drawn = self._random.block(Kind.BALANCER, request.user, blocks).integers(2**32, size=BLOCK).tolist()
            blocks, left = blocks + 1, drawn[::-1]
        self._drawn[request.user] = blocks, left
        return left.pop()
