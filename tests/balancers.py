"""All balancers under one interface, and a queue simulation as small as can be to try them with."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from sim.cluster.balancers import haproxy, nginx, routers
from sim.cluster.balancers.balancer import Backend, Balancer, Ending, SeededDraws, Target
from sim.model.request import Request
from sim.model.status import Status


class Made(NamedTuple):
    """How a balancer is made of backends and draws; whether it heeds limits, and queues what is beyond them."""

    make: Callable[[Sequence[Backend], SeededDraws], Balancer]
    limits: bool = False
    queues: bool = False


NGINX = {
    "nginx round_robin": Made(lambda b, d: nginx.Nginx(b), limits=True),
    "nginx least_conn": Made(lambda b, d: nginx.LeastConnections(b), limits=True),
    "nginx random": Made(nginx.Random, limits=True),
    "nginx random two": Made(nginx.RandomTwo, limits=True),
    "nginx hash": Made(lambda b, d: nginx.Hash(b), limits=True),
    "nginx hash consistent": Made(lambda b, d: nginx.ConsistentHash(b), limits=True),
}
HAPROXY = {
    "haproxy roundrobin": Made(lambda b, d: haproxy.RoundRobin(b), True, True),
    "haproxy leastconn": Made(lambda b, d: haproxy.LeastConnections(b), True, True),
    "haproxy first": Made(lambda b, d: haproxy.First(b), True, True),
    "haproxy random(1)": Made(lambda b, d: haproxy.Random(b, d, 1), True, True),
    "haproxy random(2)": Made(haproxy.Random, True, True),
    "haproxy hash": Made(lambda b, d: haproxy.Hash(b), True, True),
    "haproxy bounded hash": Made(lambda b, d: haproxy.Hash(b, balance_factor=125), True, True),
    "haproxy map": Made(lambda b, d: haproxy.MapHash(b), True, True),
}
ROUTERS = {
    "router round_robin": Made(lambda b, d: routers.RoundRobin(b)),
    "router random": Made(routers.Random),
    "router power_of_two": Made(routers.PowerOfTwo),
    "router cache_aware sglang": Made(lambda b, d: routers.CacheAware(b)),
    "router cache_aware vllm": Made(lambda b, d: routers.CacheAwareByLoad(b)),
    "router consistent_hash": Made(lambda b, d: routers.ConsistentHash(b)),
    "router sticky": Made(lambda b, d: routers.Sticky(b)),
    "router manual": Made(routers.Manual),
    "router least_tokens": Made(lambda b, d: routers.LeastTokens(b)),
    "router least_kv": Made(lambda b, d: routers.LeastKV(b)),
}
ALL = NGINX | HAPROXY | ROUTERS


def backends(weights: Sequence[int], max_connections: int = 0) -> list[Backend]:
    return [Backend(w, max_connections, address=f"10.0.0.{i}:8000") for i, w in enumerate(weights)]


def numbered(user: int = -1) -> Iterator[Request]:
    for number in count():
        yield Request(number, 100, 10, 10, user)


class Served(NamedTuple):
    """Of each request its wait, s, its target, and how many were present at each target when it came."""

    waits: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray  # requests × targets


def serve(balancer: Balancer, targets: int, load: float, requests: int, seed: int, servers: int = 1) -> Served:
    """Poisson arrivals at `load` per server, exponential service times of mean 1 s, in order of arrival per target."""
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / (load * targets * servers), requests)).tolist()
    services = random.exponential(1.0, requests).tolist()
    told = [Target() for _ in range(targets)]
    waiting: list[deque[Request]] = [deque() for _ in range(targets)]
    busy = [0] * targets
    ends: list[tuple[float, int, Request]] = []
    waits, chosen = np.zeros(requests), np.full(requests, -1)
    lengths = np.zeros((requests, targets), dtype=np.int32)

    def begin(request: Request, target: int, now: float) -> None:
        if busy[target] == servers:
            waiting[target].append(request)
            return
        busy[target] += 1
        waits[request.id], chosen[request.id] = now - arrivals[request.id], target
        heapq.heappush(ends, (now + services[request.id], target, request))

    def finish(until: float) -> None:
        while ends and ends[0][0] <= until:
            now, target, request = heapq.heappop(ends)
            busy[target] -= 1
            for started, where in balancer.ended(request, target, Ending.ANSWERED, told, now):
                begin(started, where, now)
            if waiting[target]:
                begin(waiting[target].popleft(), target, now)

    for now, request in zip(arrivals, numbered(), strict=False):
        finish(now)
        lengths[request.id] = [b + len(w) for b, w in zip(busy, waiting, strict=True)]
        where = balancer.choose(request, told, now)
        assert not isinstance(where, Status)
        if where is not None:
            begin(request, where, now)
    finish(float("inf"))
    assert (chosen >= 0).all()
    return Served(waits, chosen, lengths)
