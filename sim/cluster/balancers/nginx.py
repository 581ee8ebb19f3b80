"""nginx 1.22.1's upstream: one worker, no queue. A peer that has failed is left out for a while.

Source: src/http/ngx_http_upstream_round_robin.c (get_peer, free_round_robin_peer) and the modules named below. A policy
says which peer of a group is next; when all are out, the backup group is asked in the same way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, count
from math import floor, inf
from operator import itemgetter
from typing import ClassVar
from zlib import crc32

from sim.cluster.balancers.balancer import Backend, Change, Draws, Ending, Starts, Target, key_of
from sim.model.request import Request
from sim.model.status import Status

MOST_TRIES = 21  # of peers that are out, until round robin chooses


class Peer:
    """A target as nginx keeps it; times in whole seconds."""

    __slots__ = (
        "accessed",
        "checked",
        "config",
        "connections",
        "current",
        "effective",
        "fails",
        "index",
        "limited",
        "weight",
    )

    def __init__(self, index: int, config: Backend):
        self.index, self.config, self.weight = index, config, config.weight
        self.limited = config.down or config.max_connections > 0
        self.effective, self.current = config.weight, 0  # weights
        self.connections = self.fails = 0
        self.accessed = self.checked = -inf  # when it last failed; when it last failed or was tried after that


class Nginx:
    """Smooth weighted round robin; the other policies override `_next`."""

    cancels: bool = True
    queue_timeout: float = inf

    def __init__(self, backends: Sequence[Backend]):
        if len(backends) == 1:  # no other peer could answer: failures of a lone peer are not counted
            backends = [backends[0]._replace(max_fails=0)]
        self._peers = [Peer(i, backend) for i, backend in enumerate(backends)]
        groups = [[p for p in self._peers if p.config.backup is backup] for backup in (False, True)]
        self._groups = [group for group in groups if group]
        self._all_in = not any(p.limited for p in self._peers)  # no peer has failed, is down or has a limit

    def choose(
        self, request: Request, targets: Sequence[Target], now: float, tried: Sequence[int] = ()
    ) -> int | Status | None:
        """The next peer that is not out, of the first group that has one; or a refusal (502)."""
        second = floor(now)
        for group in self._groups:
            all_in = self._all_in and not tried
            free = group if all_in else [p for p in group if not self._out(p, targets, second, tried)]
            if (peer := self._next(request, group, free, tried)) is not None:
                if second - peer.checked > peer.config.fail_timeout:
                    peer.checked = second
                peer.connections += 1
                return peer.index
        return Status.GENERATION

    def _out(self, peer: Peer, targets: Sequence[Target], second: int, tried: Sequence[int]) -> bool:
        config = peer.config
        return (
            config.down
            or not targets[peer.index].up
            or peer.index in tried
            or 0 < config.max_connections <= peer.connections
            or (0 < config.max_fails <= peer.fails and second - peer.checked <= config.fail_timeout)
        )

    def _next(self, request: Request, group: list[Peer], free: list[Peer], tried: Sequence[int]) -> Peer | None:
        """One of those of a group that are not out."""
        return smooth(free)

    def ended(self, request: Request, target: int | None, how: Ending, targets: Sequence[Target], now: float) -> Starts:
        """Count a failure or a success; no request waits here."""
        assert target is not None
        peer, config = self._peers[target], self._peers[target].config
        peer.connections -= 1
        if how is Ending.FAILED:
            peer.fails += 1
            peer.accessed = peer.checked = floor(now)
            self._all_in = False
            if config.max_fails:
                peer.effective = max(0, peer.effective - config.weight // config.max_fails)
        elif peer.accessed < peer.checked:  # that a client left counts as a success, too
            peer.fails = 0
            self._look(targets)
        return ()

    def changed(self, target: int, change: Change, targets: Sequence[Target], now: float) -> Starts:
        """The configuration does not change, and `targets` say who is up."""
        self._look(targets)
        return ()

    def _look(self, targets: Sequence[Target]) -> None:
        self._all_in = all(target.up for target in targets) and not any(p.limited or p.fails for p in self._peers)


def smooth(peers: Sequence[Peer]) -> Peer | None:
    """One step of smooth weighted round robin: the first peer of the largest current weight."""
    if not peers:
        return None
    total, best = 0, peers[0]
    for peer in peers:
        effective = peer.effective
        peer.current += effective
        total += effective
        if effective < peer.weight:
            peer.effective += 1
        if peer.current > best.current:
            best = peer
    best.current -= total
    return best


def weighted(peers: Sequence[Peer], number: int) -> Peer:
    """The peer at a number, modulo the sum of all weights, of the cumulative weights."""
    number %= sum(p.config.weight for p in peers)
    return next(p for p, end in zip(peers, accumulate(p.config.weight for p in peers), strict=True) if number < end)


class LeastConnections(Nginx):
    """Fewest connections by weight, ties by a smooth round robin among the tied (ngx_http_upstream_least_conn)."""

    def _next(self, request: Request, group: list[Peer], free: list[Peer], tried: Sequence[int]) -> Peer | None:
        tied = free[:1]
        connections, weight = (tied[0].connections, tied[0].weight) if tied else (0, 1)
        for peer in free[1:]:
            difference = peer.connections * weight - connections * peer.weight
            if difference < 0:
                tied, connections, weight = [peer], peer.connections, peer.weight
            elif difference == 0:
                tied.append(peer)
        return smooth(tied) if len(tied) > 1 or not tied else tied[0]


class Random(Nginx):
    """Drawn by weight; after 21 draws of peers that are out, round robin (ngx_http_upstream_random)."""

    def __init__(self, backends: Sequence[Backend], draws: Draws):
        super().__init__(backends)
        self._draws = draws

    def _next(self, request: Request, group: list[Peer], free: list[Peer], tried: Sequence[int]) -> Peer | None:
        if len(self._peers) > 1:
            for _ in range(MOST_TRIES):
                if (peer := weighted(group, self._draws(request))) in free:
                    return peer
        return smooth(free)


class RandomTwo(Random):
    """Two different peers drawn by weight: the first if it has fewer connections by weight, else the second."""

    def _next(self, request: Request, group: list[Peer], free: list[Peer], tried: Sequence[int]) -> Peer | None:
        first: Peer | None = None
        if len(self._peers) > 1:
            for _ in range(MOST_TRIES):  # the successful first one is a try, too
                peer = weighted(group, self._draws(request))
                if peer not in free or peer is first:
                    continue
                if first is None:
                    first = peer
                elif peer.connections * first.config.weight > first.connections * peer.config.weight:
                    return first
                else:
                    return peer
        return smooth(free)


class Hash(Nginx):
    """By key, else by round robin; peers are tried in a sequence (ngx_http_upstream_hash)."""

    _steps: ClassVar[bool] = False  # whether the peer found takes a step of a round robin of its own

    def _sequence(self, key: str, group: list[Peer]) -> Iterator[Peer]:
        number = 0
        for attempt in count():
            number += crc32(f"{attempt or ''}{key}".encode()) >> 16 & 0x7FFF
            yield weighted(group, number)

    def _next(self, request: Request, group: list[Peer], free: list[Peer], tried: Sequence[int]) -> Peer | None:
        if len(self._peers) > 1:
            before, tries = list(tried), 0
            for peer in self._sequence(key_of(request), group):
                if peer in free:
                    return smooth([peer]) if self._steps else peer
                if before and peer.index == before[0]:  # where the search for this request's last peer ended
                    del before[0]
                elif (tries := tries + 1) >= MOST_TRIES:
                    break
        return smooth(free)


class IpHash(Hash):
    """By the first three bytes of the client's IPv4 address, its key (ngx_http_upstream_ip_hash)."""

    def _sequence(self, key: str, group: list[Peer]) -> Iterator[Peer]:
        number = 89
        while True:
            for part in key.split(".")[:3]:
                number = (113 * number + int(part)) % 6271
            yield weighted(group, number)


class ConsistentHash(Hash):
    """By key on a ring of 160 points for each unit of weight: ketama (ngx_http_upstream_hash)."""

    _steps = True

    def __init__(self, backends: Sequence[Backend]):
        super().__init__(backends)
        self._points: list[tuple[int, Peer]] = []
        for peer in self._peers:
            host, _, port = peer.config.address.rpartition(":")
            start, point = crc32(f"{host}\0{port}".encode()), 0
            for _ in range(160 * peer.config.weight):
                point = crc32(point.to_bytes(4, "little"), start)
                self._points.append((point, peer))
        self._points.sort(key=itemgetter(0))

    def _sequence(self, key: str, group: list[Peer]) -> Iterator[Peer]:
        first = bisect_left(self._points, crc32(key.encode()), key=itemgetter(0))
        for at in count(first):
            yield self._points[at % len(self._points)][1]
