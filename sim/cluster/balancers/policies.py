"""The balancer that a scenario asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from sim.cluster.balancers import haproxy, nginx, routers
from sim.cluster.balancers.balancer import Backend, Balancer, Draws, SeededDraws
from sim.model.errors import BadInput
from sim.model.fleet import Detection, Fleet, PassiveChecks

Make = Callable[[Sequence[Backend], Draws, float], Balancer]  # of backends, random numbers, a queue's timeout in s


def _plain(policy: Callable[[Sequence[Backend]], Balancer]) -> Make:
    return lambda backends, draws, timeout: policy(backends)


def _drawing(policy: Callable[[Sequence[Backend], Draws], Balancer]) -> Make:
    return lambda backends, draws, timeout: policy(backends, draws)


def _queueing(policy: type[haproxy.HAProxy]) -> Make:
    return lambda backends, draws, timeout: policy(backends, queue_timeout=timeout)


READ_STATE = frozenset({"least_tokens", "least_kv"})  # of the replicas, not their own counts alone
GATEWAY = "a gateway"  # that reads the replicas' gauges; no software of those that are known by name
POLICIES: dict[str, dict[str, Make]] = {  # by name and by software, the usual one first
    "round_robin": {
        "nginx": _plain(nginx.Nginx),
        "haproxy": _queueing(haproxy.RoundRobin),
        "vllm-router": _plain(routers.RoundRobin),
        "sglang-router": _plain(routers.RoundRobin),
    },
    "random": {
        "nginx": _drawing(nginx.Random),
        "haproxy": lambda b, d, t: haproxy.Random(b, d, 1, queue_timeout=t),
        "vllm-router": _drawing(routers.Random),
        "sglang-router": _drawing(routers.Random),
    },
    "power_of_two": {
        "nginx": _drawing(nginx.RandomTwo),
        "haproxy": lambda b, d, t: haproxy.Random(b, d, 2, queue_timeout=t),
        "vllm-router": _drawing(routers.PowerOfTwo),
        "sglang-router": lambda b, d, t: routers.PowerOfTwo(b, d, counts=False),
    },
    "least_outstanding": {
        "nginx": _plain(nginx.LeastConnections),
        "haproxy": _queueing(haproxy.LeastConnections),
    },
    "least_tokens": {GATEWAY: _plain(routers.LeastTokens)},
    "least_kv": {GATEWAY: _plain(routers.LeastKV)},
    "session_affinity": {
        "nginx": _plain(nginx.ConsistentHash),
        "haproxy": _queueing(haproxy.Hash),
        "vllm-router": _plain(routers.ConsistentHash),
        "sglang-router": _drawing(routers.Manual),
    },
    "prefix_affinity": {
        "vllm-router": _plain(routers.CacheAwareByLoad),
        "sglang-router": _plain(routers.CacheAware),
    },
    "bounded_queue": {"haproxy": _queueing(haproxy.LeastConnections)},
}
QUEUES = ("haproxy",)  # what is beyond the limits; others refuse it, or have no limits
LIMITS = ("nginx", *QUEUES)


def check(fleet: Fleet) -> str:
    """The software whose way the balancer of a fleet has; `BadInput` where there is no such balancer."""
    spec, ways = fleet.balancer, POLICIES[fleet.balancer.policy]
    like: str = spec.like or next(iter(ways))
    if like not in ways:
        found = f"{spec.policy} like {spec.like}"
        known = " or ".join(way for way in ways if way != GATEWAY) or "none"
        raise BadInput(f"expected {known}, found {found}", key="fleet.balancer.like")
    if spec.max_connections and like not in LIMITS:
        raise BadInput(f"expected none: {like} has no such limit", key="fleet.balancer.max_connections")
    if spec.policy == "bounded_queue" and not spec.max_connections:
        raise BadInput("expected a number: what is beyond it waits", key="fleet.balancer.max_connections")
    if spec.queue_timeout is not None and (like not in QUEUES or not spec.max_connections):
        raise BadInput("expected none: nothing waits at this balancer", key="fleet.balancer.queue_timeout")
    if fleet.detection.passive is not None and like != "nginx":
        raise BadInput(f"expected active instead: {like} does not count failures", key="fleet.detection.passive")
    return like


def balancer_of(fleet: Fleet, seed: int | Sequence[int] = 0) -> Balancer:
    """The balancer of a fleet; `BadInput` for one that there is not. nginx counts failed requests, if nothing says
    otherwise."""
    like, spec, passive = check(fleet), fleet.balancer, fleet.detection.passive
    if fleet.detection == Detection():
        passive = PassiveChecks()
    fails, timeout = (0, 10.0) if passive is None else (passive.max_fails, passive.fail_timeout)
    weights = [group.weight for group in fleet.groups for _ in range(group.replicas)] or [1] * fleet.count
    backends = [
        Backend(weight, spec.max_connections, fails, timeout, address=f"replica-{i}:80")
        for i, weight in enumerate(weights)
    ]
    queue_timeout = inf if spec.queue_timeout is None else spec.queue_timeout
    return POLICIES[spec.policy][like](backends, SeededDraws(seed), queue_timeout)
