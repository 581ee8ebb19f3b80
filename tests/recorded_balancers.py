"""Recordings of real load balancers, and how ours depart from one."""

from __future__ import annotations

import copy
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

import msgspec
from schedule import BadSchedules, lines_of

from sim.cluster.balancers import haproxy, nginx, routers
from sim.cluster.balancers.balancer import Backend, Balancer, Change, ChangeKind, Ending, Target
from sim.model.request import Request
from sim.model.status import Status

US = 1e-6
LATE = 60_000  # µs that a start or an end may be late in real time
RANDOM = ("random", "manual")  # policies of routers whose choices can only be one of a set


class RecordedBackend(msgspec.Struct, frozen=True):
    address: str
    name: str = ""
    weight: int = 1
    id: int = 0
    maxconn: int = 0
    max_conns: int = 0
    max_fails: int = 1
    fail_timeout_s: float = 10
    down: bool = False
    backup: bool = False


class RecordedChange(msgspec.Struct, frozen=True):
    t: int
    what: str
    backend: int
    weight: int = 0
    maxconn: int = 0


class Candidate(msgspec.Struct, frozen=True):
    backend: int
    load: int | None = None


class Event(msgspec.Struct, frozen=True):
    """A request; times in µs. `attempts`: all that were tried, where the first did not answer."""

    uid: int
    t: int
    duration: int
    backend: int | None
    t_end: int
    status: int | str
    t_start: int | None = None
    key: str | None = None
    src: str | None = None
    text: str = ""
    priority_class: int = 0
    drop: int | None = None
    queued: int = 0
    attempts: tuple[int, ...] | None = None
    candidates: tuple[Candidate, ...] | None = None
    draws: tuple[int, ...] | None = None


class BalancerRecording(msgspec.Struct, frozen=True):
    """One run of a real balancer. `differences` has what ours does otherwise."""

    name: str
    software: str
    version: str
    policy: str
    clock: str
    config: dict[str, Any]
    backends: tuple[RecordedBackend, ...]
    changes: tuple[RecordedChange, ...]
    events: tuple[Event, ...]


def read_balancer_recordings(path: Path) -> list[BalancerRecording]:
    """The recordings of a file, plain or `.gz`; `BadSchedules` says in one line what is wrong with it."""
    recordings = []
    for number, line in lines_of(path):
        try:
            recordings.append(msgspec.json.decode(line, type=BalancerRecording))
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise BadSchedules(f"{path}:{number}: not a recording of a balancer ({e})") from e
        recording = recordings[-1]
        try:
            balancer_of(recording, lambda request: 0)
        except (KeyError, ValueError) as e:
            raise BadSchedules(f"{path}:{number}: a balancer that is not known here ({e})") from e
        numbers = range(len(recording.backends))
        named = [e.backend for e in recording.events if e.backend is not None] + [c.backend for c in recording.changes]
        if not set(named) <= set(numbers):
            raise BadSchedules(f"{path}:{number}: backend: expected one of {len(numbers)} that are listed")
    if not recordings:
        raise BadSchedules(f"{path}: no recordings of balancers in it; expected JSON lines")
    return recordings


def balancer_of(recording: BalancerRecording, draws: Callable[[Request], int]) -> Balancer:
    """Ours, with the settings of the recorded one."""
    config, policy = recording.config, recording.policy
    backends = [
        Backend(b.weight, b.maxconn or b.max_conns, b.max_fails, b.fail_timeout_s, b.backup, b.down, b.address)
        for b in recording.backends
    ]
    if recording.software == "nginx":
        if policy in ("random", "random two least_conn"):
            return (nginx.RandomTwo if "two" in policy else nginx.Random)(backends, draws)
        return {
            "round_robin": nginx.Nginx,
            "least_conn": nginx.LeastConnections,
            "hash": nginx.Hash,
            "hash consistent": nginx.ConsistentHash,
            "ip_hash": nginx.IpHash,
        }[policy](backends)
    if recording.software == "haproxy":
        options = {
            "queue_timeout": config.get("timeout_queue_ms", inf) * 1e-3,
            "abort_on_close": config.get("abortonclose") is True,
            "slow_start": config.get("slowstart_s", 0),
        }
        if policy == "random":
            return haproxy.Random(backends, draws, config.get("draws", 2), **options)
        if policy in ("hdr", "source"):
            if config.get("hash_type") != "consistent":
                return haproxy.MapHash(backends, **options)
            return haproxy.Hash(backends, **options, balance_factor=config.get("hash_balance_factor", 0))
        return {
            "roundrobin": haproxy.RoundRobin,
            "leastconn": haproxy.LeastConnections,
            "first": haproxy.First,
        }[policy](backends, **options)
    sglang = {"vllm-router": False, "sglang-router": True}[recording.software]
    order = config["worker_order_listed"]
    if policy == "cache_aware":
        return (routers.CacheAware if sglang else routers.CacheAwareByLoad)(
            backends, order, config["cache_threshold"], config["balance_abs_threshold"], config["balance_rel_threshold"]
        )
    if policy == "power_of_two":
        return routers.PowerOfTwo(backends, draws, order, counts=not sglang)
    if policy == "random":
        return routers.Random(backends, draws, order)
    if policy == "manual":
        return routers.Manual(backends, draws, order, {"min_load": False, "min_group": True}[config["assignment_mode"]])
    return {
        "round_robin": routers.RoundRobin,
        "consistent_hash": routers.ConsistentHash,
        "sticky_least_loaded": routers.Sticky,
    }[policy](backends, order)


def request_of(event: Event) -> Request:
    request = Request(event.uid, max(1, len(event.text)), 1, 1)
    request.key = event.key if event.key is not None else event.src
    request.priority = event.priority_class
    request.text = tuple((end, event.text[:end]) for end in range(1, len(event.text) + 1))
    return request


def xorshift() -> Iterator[int]:
    """HAProxy's generator in its first thread (statistical_prng)."""
    state = 2463534242
    while True:
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        yield state


class Replay:
    """What our balancer does with the requests of a recording."""

    def __init__(self, recording: BalancerRecording):
        self.recording = recording
        self.events = {e.uid: e for e in recording.events}
        self.requests = {e.uid: request_of(e) for e in recording.events}
        self.targets = [Target() for _ in recording.backends]
        self._prng = xorshift()
        self._draws: dict[int, Iterator[int]] = {}
        self.balancer = balancer_of(recording, lambda request: self._draw(request))  # a function: not copied
        self.attempts: dict[int, list[int]] = {}
        self.started: dict[int, tuple[int, int]] = {}  # backend, when
        self.ended: dict[int, tuple[int, int | str]] = {}  # when, status
        self.odd: dict[int, str] = {}
        self._dead: set[int] = set()
        self._sick: set[int] = set()
        self._left: set[int] = set()
        self._queued: set[int] = set()
        self._agenda: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = count()

    def _draw(self, request: Request) -> int:
        if self.recording.software == "haproxy":
            return next(self._prng)
        if (number := next(self._draws[request.id], None)) is None:
            self.odd[request.id] = "more numbers are drawn than were"
            return 0
        return number

    def _numbers_of(self, event: Event) -> Iterator[int]:
        """What leads a router's draws to the recorded candidates, nginx's as they were."""
        order: list[int] = self.recording.config.get("worker_order_listed", [])
        if event.candidates and len(event.candidates) == 2 and self.recording.software != "haproxy":
            first, second = (c.backend for c in event.candidates)
            return iter([order.index(first), [w for w in order if w != first].index(second)])
        if self.recording.policy == "random" and event.backend in order:
            return iter([order.index(event.backend)])
        return iter(event.draws or ())

    def _at(self, t: int, happens: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (t, next(self._numbers), happens))

    def run(self) -> None:
        for change in self.recording.changes:
            self._at(change.t, lambda c=change: self._change(c))
        for event in self.recording.events:
            self._at(event.t, lambda e=event: self._arrive(e))
            if event.drop is not None:
                self._at(event.drop, lambda e=event: self._drop(e))
        while self._agenda:
            self.now, _, happens = heapq.heappop(self._agenda)
            happens()

    def _change(self, change: RecordedChange) -> None:
        match change.what:
            case "refuse" | "listen":
                (self._dead.add if change.what == "refuse" else self._dead.discard)(change.backend)
            case "sick" | "well":
                (self._sick.add if change.what == "sick" else self._sick.discard)(change.backend)
            case _:
                kind = ChangeKind(change.what.removeprefix("balancer sees ").lower())
                up = self.targets[change.backend].up
                if kind in (ChangeKind.UP, ChangeKind.DOWN):
                    up = kind is ChangeKind.UP
                self.targets[change.backend] = Target(up)
                said = Change(kind, change.weight or change.maxconn)
                self._start_all(self.balancer.changed(change.backend, said, self.targets, self.now * US))

    def _arrive(self, event: Event) -> None:
        request = self.requests[event.uid]
        self._draws[event.uid] = self._numbers_of(event)
        self._check_loads(event)
        tried: list[int] = self.attempts.setdefault(event.uid, [])
        while True:
            chosen = self._choose(event, request, tried)
            if chosen is None:
                self._queued.add(event.uid)
                if self.balancer.queue_timeout < inf:
                    self._at(event.t + round(self.balancer.queue_timeout / US), lambda: self._expire(event))
                return
            if isinstance(chosen, Status):
                self.ended[event.uid] = self.now, 502 if self.recording.software == "nginx" else 503
                return
            tried.append(chosen)
            sick = chosen in self._sick and self.recording.software == "nginx"
            retries = "http_503" in self.recording.config.get("next_upstream", "")
            if chosen not in self._dead and not (sick and retries):
                self._start(event, chosen)
                return
            self.balancer.ended(request, chosen, Ending.FAILED, self.targets, self.now * US)

    def _check_loads(self, event: Event) -> None:
        if isinstance(self.balancer, routers.PowerOfTwo):
            recorded = {c.backend: c.load for c in event.candidates or () if c.load is not None}
            ours = {backend: self.balancer.load(backend, self.targets) for backend in recorded}
            if recorded != ours:
                self.odd[event.uid] = f"loads {recorded}, here {ours}"

    def _choose(self, event: Event, request: Request, tried: Sequence[int]) -> int | Status | None:
        """Of ties that are broken by chance, let the recorded one win."""
        if self.recording.policy == "manual":
            for number in range(len(self.recording.backends)):
                attempt = copy.deepcopy(self.balancer)
                attempt._draws = lambda request, number=number: number  # type: ignore[attr-defined]
                if attempt.choose(request, self.targets, self.now * US, tried) == event.backend:
                    self._draws[event.uid] = iter([number])
                    break
            else:
                self._draws[event.uid] = iter([0])
        return self.balancer.choose(request, self.targets, self.now * US, tried)

    def _start(self, event: Event, backend: int) -> None:
        self._queued.discard(event.uid)
        self.started[event.uid] = backend, self.now
        self._at(self.now + event.duration, lambda: self._end(event, Ending.ANSWERED))

    def _start_all(self, starts: Sequence[tuple[Request, int]]) -> None:
        for request, backend in starts:
            self.attempts[request.id].append(backend)
            self._start(self.events[request.id], backend)

    def _end(self, event: Event, how: Ending) -> None:
        if event.uid in self.ended:
            return
        backend = self.started[event.uid][0]
        status: int | str = "cut" if how is Ending.LEFT else 200
        if event.uid in self._left:
            status = "answered, nobody there"
        self.ended[event.uid] = self.now, status
        request = self.requests[event.uid]
        self._start_all(self.balancer.ended(request, backend, how, self.targets, self.now * US))

    def _drop(self, event: Event) -> None:
        if event.uid in self.ended:
            return
        if not self.balancer.cancels:
            self._left.add(event.uid)
        elif event.uid in self._queued:
            self._leave(event, Ending.LEFT, "gone from the queue")
        else:
            self._end(event, Ending.LEFT)

    def _expire(self, event: Event) -> None:
        if event.uid in self._queued:
            self._leave(event, Ending.TIMEOUT, 503)

    def _leave(self, event: Event, how: Ending, status: int | str) -> None:
        self._queued.remove(event.uid)
        self.ended[event.uid] = self.now, status
        self.balancer.ended(self.requests[event.uid], None, how, self.targets, self.now * US)


def differences(recording: BalancerRecording) -> dict[int, str]:
    """By request, what our balancer does otherwise than the recorded one."""
    replay = Replay(recording)
    replay.run()
    found: dict[int, list[str]] = defaultdict(list)
    late = 0 if recording.clock == "stepped" else LATE
    for event in recording.events:
        backend, t_start = replay.started.get(event.uid, (None, None))
        t_end, status = replay.ended.get(event.uid, (0, "waits for ever"))
        attempts = tuple(replay.attempts.get(event.uid, ()))
        tried = event.attempts
        if tried is None:  # of a refusal: not recorded
            tried = attempts if event.backend is None else (event.backend,)
        pairs = {
            "backend": (event.backend, backend, 0),
            "attempts": (tried, attempts, 0),
            "status": (event.status, status, 0),
            "t_start": (event.t_start, t_start, late),
            "t_end": (event.t_end, t_end, late if event.status != 503 else LATE),
        }
        for what, (was, ours, tolerance) in pairs.items():
            if was == ours or (tolerance and was is not None and ours is not None and abs(was - ours) <= tolerance):
                continue
            found[event.uid].append(f"{what} {was}, here {ours}")
        if event.draws and next(replay._draws[event.uid], None) is not None:
            found[event.uid].append("fewer numbers are drawn than were")
    for uid, odd in replay.odd.items():
        found[uid].append(odd)
    return {uid: f"request {uid}: {'; '.join(texts)}" for uid, texts in found.items()}
