"""The router: its queue, whom it admits, and the steps that follow (router/src/queue.rs, infer.rs)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping

import numpy as np

from sim.engines.engine import Decision, Outcome, Plan, Row, Scheduled, ServerState
from sim.engines.tgi_0_9_4.batch import Batch
from sim.engines.tgi_0_9_4.entry import Entry
from sim.engines.tgi_0_9_4.flags import COUNTERS, Flags
from sim.model.request import Request
from sim.model.status import Status
from sim.steptime.work import NOTHING, StepWork

PREFILL, DECODE, FILTER = "prefill", "decode", "filter"


class Engine:
    """One server's scheduler (see `engines.engine.Engine`)."""

    def __init__(self, config: Flags):
        self.config = config
        self.decide: Callable[[Decision], Decision] | None = None
        self.observer: Callable[[Scheduled], None] | None = None
        self.batch = Batch(padded=config.requires_padding)
        self.queue: deque[Entry] = deque()
        self.backpressure = self.wait_exceeded = 0  # tgi_batch_concat by reason
        self.dropped = 0  # requests found in the queue without a client
        self._entries: dict[Request, Entry] = {}
        self._waiting_steps = 1  # as the router counts: 1 after a prefill, +1 a decode
        self._queued_tokens = self._gone = 0  # of the queue: prompt tokens, and entries whose client has left
        self._prefilling: list[Entry] = []  # those of the prefill under way
        self._running_before: int | None = None  # a prefill: how many were running when it was scheduled
        self._padded = config.requires_padding
        self._prefill_budget, self._token_budget = config.max_batch_prefill_tokens, config.token_budget
        self._tightest = min(self._prefill_budget, self._token_budget)
        self._ratio = np.float32(config.waiting_served_ratio)
        self._min_sizes: list[int] = []
        self._growths: dict[int, StepWork] = {}  # of a decode step, by the size of the batch

    def submit(self, request: Request, done: int = 0) -> Status | None:
        """Append a request to the queue. Raises `CannotFit` for one that the real server would keep for ever."""
        if self.config.refuses(request.prompt_tokens, request.max_new_tokens):
            return Status.VALIDATION
        entry = Entry(request)
        if entry.prompt_blocks + entry.new_blocks > self._tightest:  # rare: look closely
            self.config.check_fits(request.prompt_tokens, request.max_new_tokens)
        self._entries[request] = entry
        self._queued_tokens += entry.prompt_tokens
        self.queue.append(entry)
        return None

    def cancel(self, request: Request, done: int = 0) -> None:
        """The client has left: its place is free only when the router notices, at the end of the step under way."""
        entry = self._entries.pop(request)
        entry.gone = True
        if entry.running:
            self.batch.leave(entry)
        elif entry.queued:
            self._gone += 1
            self._queued_tokens -= entry.prompt_tokens

    def plan(self) -> Plan | None:
        """The next prefill, or the decode steps until the router could admit somebody or a request ends."""
        before, self._running_before = self._running_before, None
        if not before:  # a prefill beside a running batch is followed by a decode step, any other by another look
            new = self._admit()
            if new:
                return self._prefill(new)
        return self._decode(before or 0) if self.batch.members else None

    def _prefill(self, new: list[Entry]) -> Plan:
        self._prefilling = new
        self._running_before = len(self.batch.members)
        tokens = attention = longest = 0
        for e in new:
            e.queued = False
            n = e.prompt_tokens
            tokens += n
            attention += n * (n + 1) // 2
            if n > longest:
                longest = n
        self._queued_tokens -= tokens
        if self.observer is not None:
            self._observe(PREFILL, new)
        work = StepWork(1, tokens, len(new), attention, longest)
        return Plan(work, NOTHING, 1, None, [e.request for e in new])

    def _decode(self, before: int) -> Plan:
        batch = self.batch
        size, longest = len(batch.members), batch.longest
        once = None
        if 0 < before < size:
            once = StepWork(0, 0, 0, 0, 0, 0, 0, longest, size - before, 0, before)
        steps = 1 if batch.leaving else batch.steps_to_finish
        admission = self._steps_until_admission(1)
        if admission is not None and admission < steps:
            steps = admission
        if self.observer is not None:
            self._observe(DECODE, batch.members)
        if (growth := self._growths.get(size)) is None:
            growth = self._growths[size] = StepWork(decode_context=size, decode_longest=1)
        return Plan(StepWork(1, 0, 0, 0, 0, size, batch.context, longest), growth, steps, once)

    def valid_steps(self, plan: Plan, done: int) -> int:
        """See `engines.engine.Engine.valid_steps`."""
        if self._prefilling:
            return 1
        if self.batch.leaving:
            return done + 1
        admission = self._steps_until_admission(done + 1)
        return plan.steps if admission is None or admission > plan.steps else admission

    def commit(self, plan: Plan, steps: int) -> Outcome:
        """See `engines.engine.Engine.commit`."""
        batch = self.batch
        if self._prefilling:
            new, self._prefilling = self._prefilling, []
            self._waiting_steps = 1
            ended = batch.join(new)
            if not ended:
                return Outcome(1, plan.admitted)
            first = [e.request for e in new if not e.gone]
            kept = [e for e in new if e.running]
            after = self._filter(ended, kept, max((e.prompt_tokens for e in kept), default=0) + 1)
            return Outcome(1, first, (), self._finished(ended), after)
        self._waiting_steps += steps
        ended = batch.advance(steps)
        if not ended:
            return Outcome()
        return Outcome(1, (), (), self._finished(ended), self._filter(ended, batch.members, batch.longest))

    def _finished(self, ended: list[Entry]) -> list[Request]:
        finished = [e.request for e in ended if not e.gone]
        for request in finished:
            del self._entries[request]
        return finished

    def _filter(self, ended: list[Entry], kept: Collection[Entry], longest: int) -> StepWork | None:
        if not kept:
            return None
        if self.observer is not None:
            self._observe(FILTER, kept)
        return StepWork(0, 0, 0, 0, 0, 0, 0, longest, 0, len(ended), len(kept))

    def received(self, request: Request, done: int) -> int:
        """See `engines.engine.Engine.received`."""
        entry = self._entries.get(request)
        if entry is None or entry.queued:
            return 0
        if not entry.running:
            return done
        if self._prefilling:
            done = 0
        return entry.output_tokens - (entry.last_step - self.batch.steps - done)

    def state(self, done: int = 0) -> ServerState:
        """See `engines.engine.Engine.state`; `kv_used` is what the shard reports for its batch."""
        batch = self.batch
        used, waiting = batch.used, len(self.queue) - self._gone
        return ServerState(waiting, self._queued_tokens, len(batch.members), used, self._token_budget - used)

    def counters(self, done: int = 0) -> Mapping[str, float]:
        """See `engines.engine.Engine.counters`."""
        return dict(zip(COUNTERS, (self.backpressure, self.wait_exceeded, self.dropped), strict=True))

    def _admit(self) -> list[Entry]:
        """Whom the router prefills now; empty when it goes on decoding, or has nothing to do."""
        running = len(self.batch.members)
        min_size = self._min_size(running)
        if not self.queue or (min_size is not None and len(self.queue) < min_size and self.decide is None):
            return []
        popped, taken = self._fitting(len(self.queue))
        if self.decide is not None:
            return self._decided(taken if min_size is None or taken >= min_size else 0)
        front = [self.queue.popleft() for _ in range(popped)]
        if self._gone:
            kept = [e for e in front if not e.gone]
            self._gone -= len(front) - len(kept)
            self.dropped += len(front) - len(kept)
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

    def _decided(self, taken: int) -> list[Entry]:
        """Whom `decide` admits, told whom the rules would."""
        assert self.decide is not None
        live = [e for e in self.queue if not e.gone]
        self._gone -= len(self.queue) - len(live)
        done = self.decide(Decision(admitted=[e.request for e in live[:taken]]))
        chosen = [self._entries[request] for request in done.admitted]
        self.queue = deque(e for e in live if e not in chosen)
        return chosen

    def _steps_until_admission(self, ahead: int) -> int | None:
        """How many decode steps, at least `ahead`, until `_admit` would take somebody; None for never.

        It holds while neither queue nor batch changes. With clients gone from the queue it may say too early.
        """
        if not self.queue:
            return None
        if self._gone:  # examining the queue removes those that left, which changes what is found later
            return ahead
        if not self._fitting(1)[1]:
            return None
        forced = self.config.max_waiting_tokens - self._waiting_steps
        if forced <= ahead:
            return ahead
        min_size = self._floor(len(self.batch.members))
        if len(self.queue) >= min_size and self._fitting(min_size)[1] >= min_size:
            return ahead
        return forced

    def _min_size(self, running: int) -> int | None:
        if not running or self._waiting_steps >= self.config.max_waiting_tokens:
            return None
        return self._floor(running)

    def _floor(self, running: int) -> int:
        # the product is taken in float32 (infer.rs:283-289); for a ratio of 0.7 float64 gives another floor at 90
        while running >= len(self._min_sizes):
            self._min_sizes.append(int(np.floor(np.float32(len(self._min_sizes)) * self._ratio)))
        return self._min_sizes[running]

    def _fitting(self, at_most: int) -> tuple[int, int]:
        """How many entries of the queue the router would pop, and how many of them are live and fit both budgets.

        In FIFO order; stops at the first entry that does not fit, or after `at_most` entries.
        """
        prefill_budget = self._prefill_budget
        token_budget = max(0, self._token_budget - self.batch.used)
        popped = taken = prompt = new = longest = 0
        for e in self.queue:
            if e.gone:
                popped += 1
                continue
            if self._padded:
                longest = max(longest, e.prompt_tokens)
                prompt = (taken + 1) * longest
                new += e.max_new_tokens
            else:
                prompt += e.prompt_blocks
                new += e.new_blocks
            if prompt > prefill_budget or prompt + new > token_budget:
                break
            popped += 1
            taken += 1
            if taken >= at_most:
                break
        return popped, taken

    def _observe(self, op: str, entries: Collection[Entry]) -> None:
        assert self.observer is not None
        steps = self.batch.steps
        rows = [
            Row(e.request, e.prompt_tokens, True, 0)
            if op == PREFILL
            else Row(e.request, int(op == DECODE), False, e.prompt_tokens + e.output_tokens - e.last_step + steps - 1)
            for e in entries
        ]
        self.observer(Scheduled(op, rows, (), self.state()))
