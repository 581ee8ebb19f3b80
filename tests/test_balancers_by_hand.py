"""Cases worked by hand, of rules that no recording tells apart."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import pytest
from balancers import backends

from sim.cluster.balancers import haproxy, nginx, routers
from sim.cluster.balancers.balancer import Backend, Change, ChangeKind, Ending, SeededDraws, Target
from sim.engines.engine import ServerState
from sim.model.request import Request

UP = [Target()] * 3


def named(id: int, key: str | None = None, prompt: int = 10, text: Sequence[tuple[int, str]] = ()) -> Request:
    request = Request(id, prompt, 1, 1, user=id)
    request.key, request.text = key, tuple(text)
    return request


def drawn(*numbers: int):
    left = list(numbers)
    return left, lambda request: left.pop(0)


def test_draws_belong_to_a_user_and_a_seed() -> None:
    one, other = named(1), named(2)
    draws, alone, another = SeededDraws((5, 1)), SeededDraws((5, 1)), SeededDraws((5, 2))
    mixed = [(draws(one), draws(other), draws(other))[0] for _ in range(300)]
    assert mixed == [alone(one) for _ in range(300)]
    assert len(set(mixed)) == 300
    assert mixed[0] != another(one)
    assert max(mixed) > 2**31


# nginx


def test_random_draws_peers_that_are_out_too() -> None:
    left, draws = drawn(0, 4, 1, 3)
    peers = [b._replace(down=i == 0) for i, b in enumerate(backends([1, 1]))]
    balancer = nginx.Random(peers, draws)
    assert balancer.choose(named(1), UP, 0.0) == 1
    assert left == [3]


def test_a_success_forgets_failures_only_if_the_peer_was_tried_after_them() -> None:
    peers = [Backend(max_fails=2, fail_timeout=2.0)] * 2
    balancer = nginx.Nginx(peers)
    requests = [named(i) for i in range(12)]
    assert [balancer.choose(r, UP, 5.0) for r in requests[:4]] == [0, 1, 0, 1]
    balancer.ended(requests[0], 0, Ending.FAILED, UP, 5.0)
    balancer.ended(requests[2], 0, Ending.ANSWERED, UP, 5.5)  # begun before the failure
    assert balancer.choose(requests[4], UP, 5.6) == 0
    balancer.ended(requests[4], 0, Ending.FAILED, UP, 5.7)
    assert [balancer.choose(r, UP, 6.0) for r in requests[5:8]] == [1, 1, 1]  # two failures


@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 1, 2)])
def test_consistent_hash_is_the_first_of_160_points_for_each_unit_of_weight(weights: tuple[int, ...]) -> None:
    points = []
    for i, weight in enumerate(weights):
        last = bytes(4)
        for _ in range(160 * weight):
            last = crc32(f"10.0.0.{i}\0".encode() + b"8000" + last).to_bytes(4, "little")
            points.append((int.from_bytes(last, "little"), i))
    points.sort()
    balancer = nginx.ConsistentHash(backends(weights))
    keys = [f"session {i}" for i in range(3000)]
    assert max(crc32(key.encode()) for key in keys) > points[-1][0]
    for i, key in enumerate(keys):
        first = next((peer for point, peer in points if point >= crc32(key.encode())), points[0][1])
        assert balancer.choose(named(i, key), UP, 0.0) == first


# HAProxy


def turn(balancer: haproxy.HAProxy, target: int, what: ChangeKind) -> list[tuple[int, int]]:
    return [(r.id, t) for r, t in balancer.changed(target, Change(what), UP, 0.0)]


def end(balancer: haproxy.HAProxy, request: Request, target: int) -> list[tuple[int, int]]:
    return [(r.id, t) for r, t in balancer.ended(request, target, Ending.ANSWERED, UP, 0.0)]


def test_a_server_that_comes_up_holds_twice_its_limit_and_then_takes_less() -> None:
    balancer = haproxy.LeastConnections(backends([1, 1], 1))
    a, b, c, d, e = (named(i) for i in range(5))
    assert turn(balancer, 1, ChangeKind.DOWN) == []
    assert [balancer.choose(r, UP, 0.0) for r in (a, b, c)] == [0, None, None]
    assert turn(balancer, 1, ChangeKind.UP) == [(1, 1)]  # b, without a slot
    assert balancer.choose(d, UP, 0.0) == 1  # the only slot of 1, past c
    assert end(balancer, d, 1) == []  # b is there
    assert end(balancer, b, 1) == [(2, 1)]
    assert end(balancer, a, 0) == []
    assert balancer.choose(e, UP, 0.0) == 0


def test_a_server_where_a_request_failed_takes_nothing_from_the_queue_for_a_second() -> None:
    balancer = haproxy.LeastConnections(backends([1, 1], 1))
    a, b, c, d, e = (named(i) for i in range(5))
    assert [balancer.choose(r, UP, 0.0) for r in (a, b, c, d, e)] == [0, 1, None, None, None]
    assert balancer.ended(a, 0, Ending.FAILED, UP, 0.5) == []
    assert [r.id for r, _ in balancer.ended(b, 1, Ending.ANSWERED, UP, 1.4)] == [2]
    started = balancer.ended(c, 1, Ending.ANSWERED, UP, 1.5)
    assert [(r.id, target) for r, target in started] == [(3, 1), (4, 0)]


def test_a_queue_of_a_server_where_all_failed_goes_on_with_the_next_request() -> None:
    balancer = haproxy.Hash(backends([1], 1))
    a, b, c = (named(i) for i in range(3))
    assert [balancer.choose(r, UP, 0.0) for r in (a, b)] == [0, None]
    assert balancer.ended(a, 0, Ending.FAILED, UP, 0.5) == []
    assert balancer.choose(c, UP, 2.0) == 0
    assert [r.id for r, _ in balancer.ended(c, 0, Ending.ANSWERED, UP, 3.0)] == [1]


def test_a_server_moves_only_when_its_count_changes() -> None:
    balancer = haproxy.LeastConnections(backends([1, 1], 1))
    a, b, c = (named(i) for i in range(3))
    turn(balancer, 1, ChangeKind.DOWN)
    assert [balancer.choose(r, UP, 0.0) for r in (a, b)] == [0, None]
    assert turn(balancer, 1, ChangeKind.UP) == [(1, 1)]
    end(balancer, a, 0)  # 0 moves behind 1
    end(balancer, b, 1)  # held no slot: 1 stays before 0
    assert balancer.choose(c, UP, 0.0) == 1


def test_a_server_that_is_back_is_the_last_of_its_equals() -> None:
    balancer = haproxy.LeastConnections(backends([1, 1, 1]))
    turn(balancer, 0, ChangeKind.MAINTENANCE)
    turn(balancer, 0, ChangeKind.READY)
    assert [balancer.choose(named(i), UP, 0.0) for i in range(3)] == [1, 2, 0]


def test_the_older_of_own_and_common_queue_goes_first() -> None:
    for priority, order in ((0, [1, 2]), (-1, [2, 1])):
        balancer = haproxy.Hash(backends([1], 1))
        a, b, c = (named(i) for i in range(3))
        c.priority = priority
        assert [balancer.choose(r, UP, 0.0) for r in (a, b)] == [0, None]
        assert turn(balancer, 0, ChangeKind.DOWN) == []  # b goes to the queue for all
        assert turn(balancer, 0, ChangeKind.UP) == []  # a has the slot
        assert balancer.choose(c, UP, 0.0) is None  # its own queue
        started = end(balancer, a, 0)
        started += end(balancer, (b, c)[started[0][0] - 1], 0)
        assert [id for id, _ in started] == order


def test_who_waits_for_a_server_that_goes_down_goes_to_another() -> None:
    balancer = haproxy.Hash(backends([1, 1], 1))
    requests = [named(i, "same") for i in range(2)]
    first = balancer.choose(requests[0], UP, 0.0)
    assert isinstance(first, int)
    assert balancer.choose(requests[1], UP, 0.0) is None
    assert turn(balancer, first, ChangeKind.DOWN) == [(1, 1 - first)]


def test_a_weight_of_none_takes_nothing_and_ends_what_it_has() -> None:
    balancer = haproxy.LeastConnections(backends([1, 1]))
    a, b, c = (named(i) for i in range(3))
    assert balancer.choose(a, UP, 0.0) == 0
    balancer.changed(0, Change(ChangeKind.WEIGHT, 0), UP, 0.0)
    assert [balancer.choose(r, UP, 0.0) for r in (b, c)] == [1, 1]
    assert end(balancer, a, 0) == []


def test_a_lighter_server_keeps_its_place_in_the_cycle() -> None:
    """Weights 4 and 2: positions 96, 97, 99, 100, 102 and 98, 101, 104. Then 4 and 1: 104 stays, and is not 106."""
    balancer = haproxy.RoundRobin(backends([4, 2]))
    assert [balancer.choose(named(i), UP, 0.0) for i in range(6)] == [0, 0, 1, 0, 0, 1]
    balancer.changed(1, Change(ChangeKind.WEIGHT, 1), UP, 0.0)
    assert [balancer.choose(named(i), UP, 0.0) for i in range(4)] == [0, 0, 0, 1]


def test_the_limit_of_a_server_that_starts_slowly_grows() -> None:
    balancer = haproxy.LeastConnections(backends([1], 10), slow_start=5)
    turn(balancer, 0, ChangeKind.DOWN)
    turn(balancer, 0, ChangeKind.UP)
    for second, room in ((0.5, 1), (1.5, 2), (2.5, 4), (4.9, 8), (5.0, 10)):
        requests = [named(i) for i in range(12)]
        chosen = [balancer.choose(r, UP, second) for r in requests]
        assert chosen.count(0) == room
        for request, target in zip(requests, chosen, strict=True):
            if target is None:
                balancer.ended(request, None, Ending.TIMEOUT, UP, second)
        for request, target in zip(requests, chosen, strict=True):
            if target is not None:
                balancer.ended(request, target, Ending.ANSWERED, UP, second)


# the routers


def test_a_worker_that_is_down_by_configuration_is_not_chosen() -> None:
    balancer = routers.RoundRobin([Backend(), Backend(down=True), Backend()])
    assert [balancer.choose(named(i), UP, 0.0) for i in range(4)] == [0, 2, 0, 2]


def test_power_of_two_heeds_polled_tokens() -> None:
    busy, idle = (Target(seen=ServerState(0, queued, 1, used, 0)) for queued, used in ((50, 100), (0, 120)))
    for targets, best in (([busy, idle], 1), ([idle, busy], 0)):
        _, draws = drawn(0, 0, 1, 0)
        balancer = routers.PowerOfTwo([Backend()] * 2, draws, counts=False, polls=True)
        assert [balancer.choose(named(i), targets, 0.0) for i in range(2)] == [best, best]


def test_loads_are_balanced_by_difference_and_ratio() -> None:
    """abs 3, rel 1.5: 10 and 14 differ by more than 3, but not by half; 10 and 16 do."""
    balancer = routers.CacheAware([Backend()] * 2, threshold=0.5, absolute=3, relative=1.5)
    known = named(0, prompt=10, text=((10, "known"),))
    assert balancer.choose(known, UP, 0.0) == 0
    balancer._load = [14, 10]
    assert balancer.choose(known, UP, 0.0) == 0
    balancer._load = [16, 10]
    assert balancer.choose(known, UP, 0.0) == 1


@pytest.mark.parametrize("policy", [routers.CacheAware, routers.CacheAwareByLoad])
def test_a_conversation_is_where_most_of_it_was_seen(policy: type[routers.CacheAware]) -> None:
    balancer = policy([Backend()] * 2, threshold=0.5, absolute=3, relative=1.5)

    def turn(tokens: int) -> int | object:
        return balancer.choose(named(0, prompt=tokens, text=((10, "system"), (0, "talk"))), UP, 0.0)

    assert turn(100) == 0
    balancer._load = [9, 0]
    assert turn(200) == 1  # balanced
    balancer._load = [0, 2]
    assert turn(300) == 1  # has seen 200 of the 300 tokens, the other 100
    balancer._load = [1, 0]
    assert turn(620) == 1  # 300 of 620 are too few: the least loaded
    balancer._load = [0, 1]
    assert turn(1300) == 0  # likewise


def test_consistent_hash_of_the_router_has_160_points_a_worker() -> None:
    urls = [f"http://10.0.0.{i}:8000" for i in range(3)]
    points = sorted((routers.fbi_hash(f"{url}:{i}"), w) for w, url in enumerate(urls) for i in range(160))
    balancer = routers.ConsistentHash([Backend(address=url) for url in urls])
    for i in range(600):
        number = routers.fbi_hash(f"header:x-session-id:session {i}")
        first = next((w for point, w in points if point >= number), points[0][1])
        assert balancer.choose(named(i, f"session {i}"), UP, 0.0) == first
