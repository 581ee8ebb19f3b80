"""Balancers in front of exponential servers meet queueing theory, and do not meet another policy's."""

from __future__ import annotations

from math import factorial

import numpy as np
import pytest
from balancers import ALL, backends, serve
from scipy.optimize import brentq

from sim.cluster.balancers import haproxy, routers
from sim.cluster.balancers.balancer import SeededDraws

ALIKE = 64  # the weight of each: HAProxy's ring has 16 points for a unit, too few for equal shares


def mean_wait(name: str, targets: int, load: float, requests: int) -> float:
    balancer = ALL[name].make(backends([ALIKE] * targets), SeededDraws(1))
    return float(serve(balancer, targets, load, requests, seed=2).waits[requests // 10 :].mean())


def tail(name: str, targets: int, load: float, requests: int) -> np.ndarray:
    """The share of queues with at least 1, 2, ... requests, as arrivals see them (PASTA)."""
    balancer = ALL[name].make(backends([ALIKE] * targets), SeededDraws(1))
    lengths = serve(balancer, targets, load, requests, seed=2).lengths[requests // 4 :]
    return np.array([(lengths >= k).mean() for k in range(1, 6)])


def erlang_c(servers: int, offered: float) -> float:
    """The probability that a request waits in M/M/c (Kleinrock, Queueing Systems 1, 3.5)."""
    full = offered**servers / factorial(servers) / (1 - offered / servers)
    return full / (sum(offered**k / factorial(k) for k in range(servers)) + full)


@pytest.mark.parametrize("name", ["router power_of_two", "nginx random two", "haproxy random(2)"])
def test_power_of_two_has_the_tail_of_the_supermarket_model(name: str) -> None:
    """Mitzenmacher, The power of two choices in randomized load balancing, 2001: load^(2^k - 1) for many servers."""
    found = tail(name, 40, 0.85, 20_000)
    load = found[0]  # as it came out
    assert load == pytest.approx(0.85, abs=0.03)
    assert found == pytest.approx([load ** (2**k - 1) for k in range(1, 6)], abs=0.03)
    assert abs(found - load ** np.arange(1, 6)).max() > 0.3  # M/M/1's, which is that of one choice


@pytest.mark.parametrize("name", ["router random", "nginx random", "haproxy random(1)"])
def test_random_is_as_many_mm1_queues(name: str) -> None:
    assert tail(name, 20, 0.6, 20_000) == pytest.approx(0.6 ** np.arange(1, 6), abs=0.03)


@pytest.mark.parametrize("name", ["router round_robin", "nginx round_robin", "haproxy roundrobin"])
def test_round_robin_is_as_many_queues_with_erlang_arrivals(name: str) -> None:
    """GI/M/1 (Kleinrock 1, 6.4): a request waits with the probability s = A*(1 - s), for s / (1 - s) on average."""
    targets, load = 4, 0.8
    stages = targets * load
    s = brentq(lambda s: (stages / (stages + 1 - s)) ** targets - s, 0.0, 0.99)
    assert mean_wait(name, targets, load, 40_000) == pytest.approx(s / (1 - s), rel=0.08)
    assert s / (1 - s) < 0.7 * load / (1 - load)  # M/M/1's


@pytest.mark.parametrize("name", ["nginx least_conn", "haproxy leastconn", "router cache_aware vllm"])
def test_join_the_shortest_queue_is_between_a_central_queue_and_two_choices(name: str) -> None:
    targets, load, requests = 8, 0.9, 20_000
    central = erlang_c(targets, targets * load) / (targets * (1 - load))
    shortest, two, one = (mean_wait(n, targets, load, requests) for n in (name, "nginx random two", "nginx random"))
    assert central < shortest < 0.75 * two < 0.5 * one
    assert tail(name, 40, 0.9, 5_000)[2] < 0.02  # the supermarket model has 0.48


@pytest.mark.parametrize("policy", [haproxy.LeastConnections, haproxy.RoundRobin, haproxy.First])
@pytest.mark.parametrize(("targets", "limit"), [(4, 1), (2, 3)])
def test_a_queue_for_all_is_erlang_c(policy: type[haproxy.HAProxy], targets: int, limit: int) -> None:
    servers, load, requests = targets * limit, 0.8, 40_000
    balancer = policy(backends([1] * targets, limit))
    waits = serve(balancer, targets, load, requests, seed=3, servers=limit).waits[requests // 10 :]
    waiting = erlang_c(servers, servers * load)
    assert (waits > 0).mean() == pytest.approx(waiting, abs=0.03)
    assert waits.mean() == pytest.approx(waiting / (servers * (1 - load)), rel=0.1)


def test_queues_for_each_server_are_not_erlang_c() -> None:
    """The control: HAProxy's hash waits for its own server."""
    balancer = haproxy.Hash(backends([1] * 4, 1))
    waits = serve(balancer, 4, 0.6, 20_000, seed=3).waits
    assert waits.mean() > 3 * erlang_c(4, 2.4) / (4 * 0.4)


@pytest.mark.parametrize("name", ["nginx round_robin", "haproxy roundrobin"])
@pytest.mark.parametrize("weights", [(5, 1, 1), (1, 2, 3, 4, 5), (7, 7, 2)])
def test_round_robin_gives_every_cycle_by_weight(name: str, weights: tuple[int, ...]) -> None:
    balancer = ALL[name].make(backends(weights), SeededDraws(0))
    chosen = serve(balancer, len(weights), 1e-3, 10 * sum(weights), seed=0).targets
    counts = np.array([np.bincount(cycle, minlength=len(weights)) for cycle in chosen.reshape(10, sum(weights))])
    assert abs(counts - weights).max() <= (0 if name.startswith("nginx") else 1)  # HAProxy's cycles begin elsewhere
    assert abs(counts.sum(axis=0) - 10 * np.array(weights)).max() <= 1


@pytest.mark.parametrize("name", ["nginx random", "haproxy random(1)", "nginx hash consistent", "haproxy hash"])
def test_chance_and_hashes_are_by_weight(name: str) -> None:
    """Consistent hashing to within what its points leave to chance."""
    weights = (5, 3, 2)
    chosen = serve(ALL[name].make(backends(weights), SeededDraws(0)), 3, 0.1, 10_000, seed=0).targets
    assert np.bincount(chosen) / len(chosen) == pytest.approx(np.array(weights) / 10, abs=0.1)


def test_sglangs_power_of_two_sees_no_load() -> None:
    """Without the workers' own tokens it is random: the tail of M/M/1."""
    balancer = routers.PowerOfTwo(backends([1] * 20), SeededDraws(1), counts=False)
    lengths = serve(balancer, 20, 0.6, 20_000, seed=2).lengths[5_000:]
    assert [(lengths >= k).mean() for k in (1, 2, 3)] == pytest.approx([0.6, 0.36, 0.216], abs=0.03)
