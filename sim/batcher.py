"""Which requests join the next step: the router's queue and its admission rules, without a clock.

The rules are those of TGI 0.9.4 (router/src/queue.rs, infer.rs; `tgi-0.9.4.md` §3). Before every decode step the router
*looks* at its queue, and takes what fits from its front if that is enough to be worth a prefill, or if it has waited
long enough. `look` does that; `steps_until_admission` says, without doing it, when the next look would take something,
so that a clock can jump there.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from sim.batch import Batch
from sim.request import Request
from sim.server import ServerConfig


class Batcher:
    """The router of one server: its permits, its queue, and the batch its shard keeps.

    Whoever has the clock calls `accept`, then repeatedly `look`, `prefilled` for what it returned, and `decoded`.
    """

    def __init__(self, config: ServerConfig):
        self.config = config
        self.batch = Batch(padded=config.requires_padding)
        self.queue: deque[Request] = deque()
        self.in_use = 0  # permits: queued and running requests alike (infer.rs:97-105)
        self.waiting = 1  # as the router counts: 1 after a prefill, +1 a decode
        self.blocked = False  # the head of the queue does not fit beside the running batch: no arrival changes that
        self.gone = 0  # entries of the queue, or of the prefill under way, whose client has left
        self.backpressure = self.wait_exceeded = 0  # tgi_batch_concat by reason
        self._padded = config.requires_padding
        self._prefill_budget = config.max_batch_prefill_tokens
        self._token_budget = config.token_budget
        self._ratio = np.float32(config.waiting_served_ratio)
        self._min_sizes: list[int] = []

    def has_permit(self) -> bool:
        """Whether another request is let in; if not it is answered 429 at once."""
        return self.in_use < self.config.max_concurrent_requests

    def accept(self, request: Request) -> None:
        """Append a request to the queue; it holds a permit until it ends."""
        self.in_use += 1
        self.queue.append(request)

    def leave(self, request: Request) -> None:
        """The request's client goes away: its permit is free at once, its place only when the router notices."""
        request.gone = True
        self.in_use -= 1
        if request.running:
            self.batch.leave(request)
        else:
            self.gone += 1
            self.blocked = False  # it may have been the head

    def look(self) -> list[Request]:
        """What the router prefills now; empty when it goes on decoding (or has nothing to do)."""
        running = len(self.batch)
        min_size = self._min_size(running)
        if not self.queue or (min_size is not None and len(self.queue) < min_size):
            return []
        popped, taken = self._fitting(len(self.queue))
        front = [self.queue.popleft() for _ in range(popped)]
        if self.gone:
            kept = [r for r in front if not r.gone]
            self.gone -= len(front) - len(kept)
            front = kept
        if not taken:
            return []
        if min_size is not None and taken < min_size:
            self.queue.extendleft(reversed(front))
            return []
        if running:
            if min_size is None:
                self.wait_exceeded += 1
            else:
                self.backpressure += 1
        return front

    def prefilled(self, requests: list[Request]) -> list[Request]:
        """A prefill has returned: the first token of each. Returns those that ended with it."""
        self.waiting = 1
        ended = self.batch.join(requests)
        for r in ended:
            if r.gone:  # while it was being prefilled
                self.gone -= 1
            else:
                r.received = 1
                self.in_use -= 1
        return ended

    def decoded(self, steps: int) -> list[Request]:
        """`steps` decode steps have returned, none of which but the last ended a request. Returns those that ended."""
        self.waiting += steps
        ended = self.batch.advance(steps)
        for r in ended:
            if r.gone:
                r.received -= 1  # the token of this step found nobody
            else:
                self.in_use -= 1
        return ended

    def steps_until_admission(self, ahead: int) -> int | None:
        """How many more decode steps, at least `ahead`, until `look` would take something; None for never.

        It holds while neither queue nor batch changes. With clients gone from the queue it may say too early.
        """
        self.blocked = False
        if not self.queue:
            return None
        if self.gone:  # looking takes those that left out of the queue, which changes what later looks see
            return ahead
        if not self._fitting(1)[1]:
            self.blocked = True
            return None
        forced = self.config.max_waiting_tokens - self.waiting
        if forced <= ahead:
            return ahead
        min_size = self._floor(len(self.batch))
        if len(self.queue) >= min_size and self._fitting(min_size)[1] >= min_size:
            return ahead
        return forced

    def _min_size(self, running: int) -> int | None:
        if not running or self.waiting >= self.config.max_waiting_tokens:
            return None
        return self._floor(running)

    def _floor(self, running: int) -> int:
        # the product is taken in float32 (infer.rs:283-289); for a ratio of 0.7 float64 gives another floor at 90
        while running >= len(self._min_sizes):
            self._min_sizes.append(int(np.floor(np.float32(len(self._min_sizes)) * self._ratio)))
        return self._min_sizes[running]

    def _fitting(self, at_most: int) -> tuple[int, int]:
        """How many entries of the queue the router would pop, and how many of them are live and fit both budgets.

        FIFO with break, never skip; stops once `at_most` are taken.
        """
        prefill_budget = self._prefill_budget
        token_budget = max(0, self._token_budget - self.batch.used)
        popped = taken = prompt = new = longest = 0
        for r in self.queue:
            if r.gone:
                popped += 1
                continue
            if self._padded:
                longest = max(longest, r.prompt_tokens)
                prompt = (taken + 1) * longest
                new += r.max_new_tokens
            else:
                prompt += r.prompt_blocks
                new += r.new_blocks
            if prompt > prefill_budget or prompt + new > token_budget:
                break
            popped += 1
            taken += 1
            if taken >= at_most:
                break
        return popped, taken
