"""nginx 1.22.1's upstream: one worker, no queue. A peer that has failed is left out for a while.

Source: src/http/ngx_http_upstream_round_robin.c (get_peer, free_round_robin_peer) and the modules named below. A policy
says which peer of a group is next; when all are out, the backup group is asked in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, inf
from typing import ClassVar

from sim.cluster.balancers.balancer import Backend, Change, Ending, Starts, Target
from sim.model.request import Request
from sim.model.status import Status


class Peer:
    """A target as nginx keeps it; times in whole seconds."""

    __slots__ = ("accessed", "checked", "config", "connections", "current", "effective", "fails", "index")

    def __init__(self, index: int, config: Backend):
        self.index, self.config = index, config
        self.effective, self.current = config.weight, 0  # weights
        self.connections = self.fails = 0
        self.accessed = self.checked = -inf  # when it last failed; when it last failed or was tried after that


class Nginx:
    """Smooth weighted round robin; the other policies override `_next`."""

    cancels: ClassVar[bool] = True
    queue_timeout: ClassVar[float] = inf

    def __init__(self, backends: Sequence[Backend]):
        self._peers = [Peer(i, backend) for i, backend in enumerate(backends)]
        groups = [[p for p in self._peers if p.config.backup is backup] for backup in (False, True)]
        self._groups = [group for group in groups if group]

    def choose(
        self, request: Request, targets: Sequence[Target], now: float, tried: Sequence[int] = ()
    ) -> int | Status | None:
        """The next peer that is not out, of the first group that has one; or a refusal (502)."""
        second = floor(now)
        for group in self._groups:
            free = [p for p in group if not self._out(p, targets, second, tried)]
            if free and (peer := self._next(request, group, free, tried)) is not None:
                if second - peer.checked > peer.config.fail_timeout:
                    peer.checked = second
                peer.connections += 1
                return peer.index
        return Status.CONNECT

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
        return smooth(free)

    def ended(self, request: Request, target: int | None, how: Ending, targets: Sequence[Target], now: float) -> Starts:
        """Count a failure or a success; nobody waits."""
        assert target is not None
        peer, config = self._peers[target], self._peers[target].config
        peer.connections -= 1
        if how is Ending.FAILED:
            peer.fails += 1
            peer.accessed = peer.checked = floor(now)
            if config.max_fails:
                peer.effective = max(0, peer.effective - config.weight // config.max_fails)
        elif peer.accessed < peer.checked:  # that a client left counts as a success, too
            peer.fails = 0
        return ()

    def changed(self, target: int, change: Change, targets: Sequence[Target], now: float) -> Starts:
        """Nothing: the configuration does not change, and `targets` say who is up."""
        return ()


def smooth(peers: Sequence[Peer]) -> Peer:
    """One step of smooth weighted round robin: the first peer of the largest current weight."""
    total = 0
    for peer in peers:
        peer.current += peer.effective
        total += peer.effective
        if peer.effective < peer.config.weight:
            peer.effective += 1
    best = max(peers, key=lambda p: p.current)
    best.current -= total
    return best


class LeastConnections(Nginx):
    """Fewest connections by weight, ties by a smooth round robin among the tied (ngx_http_upstream_least_conn)."""

    def _next(self, request: Request, group: list[Peer], free: list[Peer], tried: Sequence[int]) -> Peer | None:
        best, *others = free
        tied = [best]
        for peer in others:
            difference = peer.connections * best.config.weight - best.connections * peer.config.weight
            if difference < 0:
                best, tied = peer, [peer]
            elif difference == 0:
                tied.append(peer)
        return smooth(tied) if len(tied) > 1 else best
