"""The routers of vLLM (vllm-router 0.1.17) and SGLang (sglang-router 0.3.2), made for LLM servers.

They count the requests that each worker has in flight, keep no queue and look only at workers that are up; they have no
weights. Sources: vllm-project/router and sgl-project/sglang (sgl-model-gateway), src/policies. `LeastTokens` and
`LeastKV` are what a gateway does that reads the servers' own gauges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cache
from math import inf
from operator import itemgetter

from sim.cluster.balancers.balancer import Backend, Change, Draws, Ending, Starts, Target, key_of
from sim.engines.engine import ServerState
from sim.model.request import Request
from sim.model.status import Status


class Router(ABC):
    """What all policies share. `order`: the workers as they registered, which is by chance; ties go by it."""

    cancels: bool = True
    queue_timeout: float = inf

    def __init__(self, backends: Sequence[Backend], order: Sequence[int] | None = None):
        self._backends = backends
        self._order = order or range(len(backends))
        self._load = [0] * len(backends)  # requests in flight

    def choose(
        self, request: Request, targets: Sequence[Target], now: float, tried: Sequence[int] = ()
    ) -> int | Status | None:
        """One of the workers that are up; a refusal (503) where there is none."""
        workers = [w for w in self._order if targets[w].up and w not in tried and not self._backends[w].down]
        if not workers:
            return Status.OVERLOADED
        worker = self._pick(request, workers, targets)
        self._load[worker] += 1
        return worker

    @abstractmethod
    def _pick(self, request: Request, workers: list[int], targets: Sequence[Target]) -> int:
        """One of these workers, which are up."""

    def _least_loaded(self, workers: Sequence[int]) -> int:
        return min(workers, key=self._load.__getitem__)

    def ended(self, request: Request, target: int | None, how: Ending, targets: Sequence[Target], now: float) -> Starts:
        """One less in flight; no request waits here."""
        assert target is not None
        self._load[target] -= 1
        return ()

    def changed(self, target: int, change: Change, targets: Sequence[Target], now: float) -> Starts:
        """Nothing: `targets` say who is up."""
        return ()


class RoundRobin(Router):
    """The count of requests modulo the number of workers that are up."""

    _count = -1

    def _pick(self, request: Request, workers: list[int], targets: Sequence[Target]) -> int:
        self._count += 1
        return workers[self._count % len(workers)]


class Random(Router):
    """Any worker."""

    def __init__(self, backends: Sequence[Backend], draws: Draws, order: Sequence[int] | None = None):
        super().__init__(backends, order)
        self._draws = draws

    def _pick(self, request: Request, workers: list[int], targets: Sequence[Target]) -> int:
        return workers[self._draws(request) % len(workers)]


class PowerOfTwo(Random):
    """Two different workers by chance: the first, unless it has more load.

    SGLang's router counts no requests under this policy (`counts` false): without the workers' own tokens, as polled
    (`polls`), it takes the first.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        draws: Draws,
        order: Sequence[int] | None = None,
        counts: bool = True,
        polls: bool = False,
    ):
        super().__init__(backends, draws, order)
        self._counts, self._polls = counts, polls

    def _pick(self, request: Request, workers: list[int], targets: Sequence[Target]) -> int:
        first = super()._pick(request, workers, targets)
        if len(workers) == 1:
            return first
        others = [w for w in workers if w != first]
        second = others[self._draws(request) % len(others)]
        return first if self.load(first, targets) <= self.load(second, targets) else second

    def load(self, worker: int, targets: Sequence[Target]) -> int:
        """The load of a worker as the router sees it."""
        polled = targets[worker].seen.kv_used + targets[worker].seen.queued_tokens if self._polls else 0
        return self._load[worker] * self._counts + polled


class CacheAware(Router):
    """The worker that has answered the longest beginning of the prompt, if that is long enough; else the least loaded.

    Also the least loaded where loads differ by more than `absolute`, and the largest is more than `relative` times the
    smallest. Beginnings are those that `request.Text` names; lengths in tokens.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        order: Sequence[int] | None = None,
        threshold: float = 0.3,
        absolute: int = 64,
        relative: float = 1.5,
    ):
        super().__init__(backends, order)
        self._threshold, self._absolute, self._relative = threshold, absolute, relative
        # beginnings, and how many tokens up to their end each worker has seen; first the worker that was the first
        self._seen: dict[tuple[int, Hashable], dict[int, int]] = {}

    def _pick(self, request: Request, workers: list[int], targets: Sequence[Target]) -> int:
        least, most = (extreme(self._load[w] for w in workers) for extreme in (min, max))
        matched, owners = self._match(request, workers)
        if most - least > self._absolute and most > self._relative * least:
            worker = self._least_loaded(workers)
        elif matched > self._threshold * request.prompt_tokens:
            worker = self._owner(owners, workers)
        else:
            worker = self._least_loaded(workers)
        for beginning in request.text:
            known = self._seen.setdefault(beginning, {})
            known[worker] = max(known.get(worker, 0), request.prompt_tokens)
        return worker

    def _match(self, request: Request, workers: list[int]) -> tuple[int, list[int]]:
        """How many tokens of a prompt have been seen, and by whom."""
        matched, owners = 0, list[int]()
        for beginning in request.text:
            end = min(beginning[0] or request.prompt_tokens, request.prompt_tokens)
            seen = {w: min(n, end) for w, n in self._seen.get(beginning, {}).items() if w in workers}
            if not seen:
                break
            matched = max(seen.values())
            owners = [w for w, tokens in seen.items() if tokens == matched]
        return matched, owners

    def _owner(self, owners: list[int], workers: list[int]) -> int:
        """SGLang's: who was the first."""
        return owners[0]


class CacheAwareByLoad(CacheAware):
    """vLLM's: of all that know as much of the prompt as any, the least loaded."""

    def _owner(self, owners: list[int], workers: list[int]) -> int:
        return self._least_loaded([w for w in workers if w in owners])


class LeastTokens(Router):
    """Fewest tokens at the last scrape, in the queue and in the KV cache; of equals the fewest requests in flight."""

    def _pick(self, request: Request, workers: list[int], targets: Sequence[Target]) -> int:
        return min(workers, key=lambda w: (self._gauge(targets[w].seen) / self._backends[w].weight, self._load[w]))

    def _gauge(self, seen: ServerState) -> float:
        return seen.queued_tokens + seen.kv_used


class LeastKV(LeastTokens):
    """The smallest share of the KV cache in use at the last scrape; of equals the fewest requests in flight."""

    def _gauge(self, seen: ServerState) -> float:
        return seen.kv_used / max(1, seen.kv_used + seen.kv_free)


class ConsistentHash(Router):
    """By key on a ring of 160 points a worker; the first worker where that one is not up (consistent_hash.rs)."""

    def __init__(self, backends: Sequence[Backend], order: Sequence[int] | None = None):
        super().__init__(backends, order)
        points = {fbi_hash(f"{self._backends[w].address}:{i}"): w for w in self._order for i in range(160)}
        self._points = sorted(points.items())

    def _pick(self, request: Request, workers: list[int], targets: Sequence[Target]) -> int:
        number = fbi_hash(f"header:x-session-id:{key_of(request)}")
        worker = self._points[bisect_left(self._points, number, key=itemgetter(0)) % len(self._points)][1]
        return worker if worker in workers else workers[0]


class Sticky(Router):
    """A key stays with its worker; a new one goes to the worker with the fewest keys so far (sticky_least_loaded)."""

    def __init__(self, backends: Sequence[Backend], order: Sequence[int] | None = None):
        super().__init__(backends, order)
        self._worker: dict[str, int] = {}
        self._keys = [0] * len(backends)

    def _pick(self, request: Request, workers: list[int], targets: Sequence[Target]) -> int:
        key = key_of(request)
        if (worker := self._worker.get(key)) not in workers:
            worker = self._assign(request, key, workers)
            self._worker[key] = worker
            self._keys[worker] += 1
        assert worker is not None
        return worker

    def _assign(self, request: Request, key: str, workers: list[int]) -> int:
        return min(workers, key=lambda w: (self._keys[w], -fbi_hash(f"{key}:{self._backends[w].address}")))


class Manual(Sticky):
    """A key stays with its worker; a new one goes to the least load, or to the fewest keys in flight (manual)."""

    def __init__(
        self,
        backends: Sequence[Backend],
        draws: Draws,
        order: Sequence[int] | None = None,
        by_keys: bool = False,
    ):
        super().__init__(backends, order)
        self._draws, self._by_keys = draws, by_keys
        self._in_flight = [Counter[str]() for _ in backends]  # requests by key

    def _pick(self, request: Request, workers: list[int], targets: Sequence[Target]) -> int:
        worker = super()._pick(request, workers, targets)
        self._in_flight[worker][key_of(request)] += 1
        return worker

    def _assign(self, request: Request, key: str, workers: list[int]) -> int:
        sizes = {w: len(self._in_flight[w]) if self._by_keys else self._load[w] for w in workers}
        tied = [w for w in workers if sizes[w] == min(sizes.values())]
        return tied[self._draws(request) % len(tied)]

    def ended(self, request: Request, target: int | None, how: Ending, targets: Sequence[Target], now: float) -> Starts:
        """One less in flight, of its worker and of its key."""
        assert target is not None
        keys, key = self._in_flight[target], key_of(request)
        keys[key] -= 1
        if not keys[key]:
            del keys[key]
        return super().ended(request, target, how, targets, now)


SEED, MULTIPLIER, DEPTH = 4193360111, 0xC6A4A7935BD1E995, 23


def murmur(key: bytes) -> int:
    """MurmurHash64A (Appleby) with the seed of mcrouter."""
    number = SEED ^ (len(key) * MULTIPLIER) % 2**64
    whole = len(key) // 8 * 8
    for i in range(0, whole, 8):
        part = int.from_bytes(key[i : i + 8], "little") * MULTIPLIER % 2**64
        number = (number ^ (part ^ part >> 47) * MULTIPLIER % 2**64) * MULTIPLIER % 2**64
    if rest := key[whole:]:
        number = (number ^ int.from_bytes(rest, "little")) * MULTIPLIER % 2**64
    number = (number ^ number >> 47) * MULTIPLIER % 2**64
    return number ^ number >> 47


@cache
def fbi_hash(key: str) -> int:
    """mcrouter's furc_hash with the largest modulus, 2²³ − 1, spread over 64 bits."""
    return murmur(furc_hash(key.encode()).to_bytes(4, "little"))


def furc_hash(key: bytes) -> int:
    """Facebook's consistent hash: a number below 2²³ − 1 from a sequence of bits (mcrouter, lib/fbi/hash.c)."""
    words: list[int] = []

    def bit(index: int) -> int:
        while len(words) <= index // 64:
            words.append(murmur(words[-1].to_bytes(8, "little") if words else key))
        return words[index // 64] >> index % 64 & 1

    depth = at = DEPTH
    for _ in range(32):
        while not bit(at):
            if not depth:
                return 0
            depth -= 1
            at = depth
        at += DEPTH
        number = 1
        for _ in range(depth - 1):
            number = number << 1 | bit(at)
            at += DEPTH
        if number < 2**DEPTH - 1:
            return number
    return 0
