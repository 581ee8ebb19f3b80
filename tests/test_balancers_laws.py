"""What holds of every balancer: nobody is lost or sent twice, nobody is sent to a target that is down or full."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
from balancers import ALL, Made, backends
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sim.cluster.balancers.balancer import Change, ChangeKind, Ending, SeededDraws, Target
from sim.cluster.balancers.policies import GATEWAY, POLICIES, balancer_of
from sim.engines.engine import ServerState
from sim.model import fleet
from sim.model.errors import BadInput
from sim.model.request import Request
from sim.model.status import Status


class World:
    """Calls a balancer as a fleet would, and keeps account of what it must have done."""

    def __init__(self, made: Made, weights: Sequence[int], limit: int):
        self.made, self.limit = made, limit
        self.balancer = made.make(backends(weights, limit), SeededDraws(5))
        self.targets = [Target() for _ in weights]
        self.held: dict[Request, int] = {}
        self.queue: dict[Request, None] = {}
        self.log: list[object] = []  # of every decision
        self.started: list[Request] = []  # out of the queue, in order
        self.sent = 0
        self.now = 0.0
        self.raised = False  # whether a target has come up: it may hold twice its limit then

    def arrive(self, key: int, tried: Sequence[int] = ()) -> None:
        request = Request(self.sent, 10 * (1 + key), 1, 1, key)
        request.text, request.priority = ((10, "shared"), (0, key)), 0
        self.sent += 1
        chosen = self.balancer.choose(request, self.targets, self.now, tried)
        self.log.append(chosen)
        if isinstance(chosen, Status):
            usable = [t for i, t in enumerate(self.targets) if t.up and i not in tried]
            assert not usable or (self.limit and not self.made.queues)
        elif chosen is None:
            assert self.made.queues
            self.queue[request] = None
        else:
            assert chosen not in tried
            self.hold(request, chosen)

    def hold(self, request: Request, target: int) -> None:
        assert self.targets[target].up
        assert request not in self.held
        self.held[request] = target
        if self.limit and self.made.limits:
            most = 2 * self.limit if self.raised and self.made.queues else self.limit
            assert list(self.held.values()).count(target) <= most

    def start(self, starts: Sequence[tuple[Request, int]]) -> None:
        for request, target in starts:
            self.log.append((request.id, target))
            del self.queue[request]  # waited, once
            self.started.append(request)
            self.hold(request, target)

    def end(self, number: int, how: Ending) -> None:
        if self.held:
            request = sorted(self.held, key=lambda r: r.id)[number % len(self.held)]
            target = self.held.pop(request)
            self.start(self.balancer.ended(request, target, how, self.targets, self.now))

    def leave(self, number: int, how: Ending) -> None:
        if self.queue:
            request = list(self.queue)[number % len(self.queue)]
            del self.queue[request]
            self.start(self.balancer.ended(request, None, how, self.targets, self.now))

    def turn(self, target: int, up: bool) -> None:
        if self.targets[target].up == up:
            return
        self.targets[target] = Target(up)
        self.raised |= up
        what = Change(ChangeKind.UP if up else ChangeKind.DOWN)
        self.start(self.balancer.changed(target, what, self.targets, self.now))

    def finish(self) -> None:
        """Bring all targets up and let everything end: nobody may remain."""
        for target in range(len(self.targets)):
            self.turn(target, up=True)
        self.now += 2.0  # after what failed is tried again
        for _ in range(1 + len(self.queue)):
            while self.held:
                self.end(0, Ending.ANSWERED)
            self.arrive(0)  # where servers failed, nobody takes from the queue until another request ends
        while self.held:
            self.end(0, Ending.ANSWERED)
        assert not self.queue


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, 6)),
        st.tuples(st.just("arrive"), st.integers(0, 6)),
        st.tuples(st.just("retry"), st.integers(0, 6)),
        st.tuples(st.just("end"), st.integers(0, 9)),
        st.tuples(st.just("fail"), st.integers(0, 9)),
        st.tuples(st.just("leave"), st.integers(0, 9)),
        st.tuples(st.just("down"), st.integers(0, 3)),
        st.tuples(st.just("up"), st.integers(0, 3)),
    ),
    max_size=60,
)
WEIGHTS = st.lists(st.integers(1, 3), min_size=1, max_size=4)


def play(made: Made, weights: list[int], limit: int, steps: list[tuple[str, int]]) -> World:
    world = World(made, weights, limit)
    for what, number in steps:
        world.now += 0.25
        match what:
            case "arrive" | "retry":
                world.arrive(number, () if what == "arrive" else (number % len(weights),))
            case "end" | "fail":
                world.end(number, Ending.ANSWERED if what == "end" else Ending.FAILED)
            case "leave":
                world.leave(number, Ending.LEFT if number % 2 else Ending.TIMEOUT)
            case _:
                world.turn(number % len(weights), up=what == "up")
    return world


@pytest.mark.parametrize("name", ALL)
@given(weights=WEIGHTS, limit=st.integers(0, 2), steps=STEPS)
@settings(max_examples=80)
def test_nobody_is_lost_sent_twice_or_sent_where_it_cannot_be(name: str, weights, limit, steps) -> None:
    steps = [(what, number) for what, number in steps if what != "fail" or not name.startswith("nginx")]
    world = play(ALL[name], weights, limit, steps)
    world.finish()


@pytest.mark.parametrize("name", ALL)
def test_the_same_calls_have_the_same_choices(name: str) -> None:
    steps = [("arrive", k % 5) for k in range(40)] + [("end", 3), ("arrive", 2), ("down", 1), ("arrive", 1)] * 10
    first, second = (play(ALL[name], [1, 2, 3], 2, steps).log for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", ["haproxy roundrobin", "haproxy leastconn", "haproxy first"])
@given(weights=WEIGHTS, steps=STEPS)
@settings(max_examples=80)
def test_nobody_waits_while_a_server_has_room_and_the_oldest_starts_first(name: str, weights, steps) -> None:
    steps = [step for step in steps if step[0] in ("arrive", "end", "leave")]
    world = World(ALL[name], weights, 2)
    for what, number in steps:
        world.now += 1.0
        {"arrive": world.arrive, "end": lambda n: world.end(n, Ending.ANSWERED)}.get(
            what, lambda n: world.leave(n, Ending.LEFT)
        )(number)
        assert not world.queue or len(world.held) == 2 * len(weights)
    assert all(a.id < b.id for a, b in pairwise(world.started))


@pytest.mark.parametrize("name", ["nginx round_robin", "nginx least_conn", "nginx hash consistent"])
def test_nginx_leaves_a_peer_out_after_failures_and_tries_it_again(name: str) -> None:
    """max_fails 2, fail_timeout 2 s, in whole seconds: out at 10.9 s, back at 13 s for one request."""
    peers = [b._replace(max_fails=2, fail_timeout=2.0) for b in backends([1, 1])]
    balancer, targets = ALL[name].make(peers, SeededDraws(0)), [Target()] * 2
    number = iter(range(10**6))

    def choices(now: float, fail: bool) -> list[int]:
        found = []
        for _ in range(12):
            request = Request(next(number), 1, 1, 1, user=next(number))
            found.append(target := balancer.choose(request, targets, now))
            balancer.ended(request, target, Ending.FAILED if fail and target == 0 else Ending.ANSWERED, targets, now)
        return found

    assert choices(10.9, fail=True).count(0) == 2
    assert choices(12.9, fail=False).count(0) == 0
    assert choices(13.0, fail=True).count(0) == 1
    assert choices(15.9, fail=False).count(0) == 0
    assert choices(16.0, fail=False).count(0) >= 3


# by name

LIKES = [(policy, like) for policy, ways in POLICIES.items() for like in ways]


def asked(policy: str, like: str | None, **options: object) -> fleet.Fleet:
    most = 3 if policy == "bounded_queue" else 0
    spec = fleet.Balancer(policy=policy, like=None if like == GATEWAY else like, max_connections=most)
    return fleet.Fleet(replicas=3, balancer=replace(spec, **options))


def test_every_policy_that_a_scenario_can_name_is_there() -> None:
    hints = get_type_hints(fleet.Balancer)
    assert set(get_args(hints["policy"])) == set(POLICIES)
    known = {like for _, like in LIKES} - {GATEWAY}
    assert {name for part in get_args(hints["like"]) for name in get_args(part)} == known


@pytest.mark.parametrize(("policy", "like"), LIKES)
def test_a_policy_by_name_uses_all_replicas(policy: str, like: str) -> None:
    balancer, targets = balancer_of(asked(policy, like), 1), [Target()] * 3
    chosen = [balancer.choose(Request(i, 10, 1, 1, user=i), targets, 0.0) for i in range(60)]
    assert {0, 1, 2} == set(chosen) - {None}
    assert (None in chosen) == (policy == "bounded_queue")


@pytest.mark.parametrize(
    ("balancer", "key"),
    [
        ({"policy": "bounded_queue", "max_connections": 0}, "fleet.balancer.max_connections"),
        ({"policy": "prefix_affinity", "like": "nginx"}, "fleet.balancer.like"),
        ({"policy": "least_kv", "like": "haproxy"}, "fleet.balancer.like"),
        ({"policy": "random", "like": "vllm-router", "max_connections": 2}, "fleet.balancer.max_connections"),
        ({"policy": "least_outstanding", "max_connections": 2, "queue_timeout": 1.0}, "fleet.balancer.queue_timeout"),
        ({"policy": "bounded_queue", "like": "haproxy", "passive": True}, "fleet.detection.passive"),
    ],
)
def test_what_no_software_does_is_refused(balancer: dict[str, object], key: str) -> None:
    options = dict(balancer)
    passive = fleet.PassiveChecks() if options.pop("passive", False) else None
    spec = asked(str(options.pop("policy")), str(options.pop("like", "")) or None, **options)
    with pytest.raises(BadInput, match=key) as raised:
        balancer_of(replace(spec, detection=fleet.Detection(passive=passive)))
    assert raised.value.key == key


def test_affinity_keeps_a_session_where_it_was() -> None:
    for policy, like in LIKES:
        if policy not in ("session_affinity", "prefix_affinity"):
            continue
        balancer, targets = balancer_of(asked(policy, like), 1), [Target()] * 3
        place: dict[int, set[int]] = {}
        for turn in range(4):
            for session in range(30):
                request = Request(100 * turn + session, 500 * (turn + 1), 1, 1)
                request.text = ((100, "system"), (0, session))
                place.setdefault(session, set()).add(balancer.choose(request, targets, 0.0))
                balancer.ended(request, max(place[session]), Ending.ANSWERED, targets, 0.0)
        assert all(len(replicas) == 1 for replicas in place.values()), (policy, like)


def test_gauges_are_those_of_the_last_scrape() -> None:
    def seen(queued: int, used: int, free: int) -> Target:
        return Target(seen=ServerState(1, queued, 1, used, free))

    targets = [seen(900, 100, 900), seen(0, 500, 500), seen(0, 600, 1400)]
    for policy, best in (("least_tokens", 1), ("least_kv", 0)):
        balancer = balancer_of(asked(policy, None))
        requests = [Request(i, 10, 1, 1) for i in range(5)]
        assert [balancer.choose(r, targets, 0.0) for r in requests] == [best] * 5  # whatever it has sent since
    balancer = balancer_of(asked("least_tokens", None))
    even = [seen(0, 0, 1)] * 3
    assert [balancer.choose(r, even, 0.0) for r in requests[:3]] == [0, 1, 2]  # of equals the fewest in flight
