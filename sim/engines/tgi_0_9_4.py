"""text-generation-inference 0.9.4: the router's queue, its admission rules, and the batch its shard keeps.

The rules are those of router/src/queue.rs and infer.rs, and for the tokens that a shard reports those of
server/text_generation_server/models (flash_causal_lm.py, causal_lm.py), at the tag v0.9.4. Before every decode step the
router examines its queue, and prefills what fits from its front if that is enough to be worth a prefill, or if it has
waited long enough. A prefill is a step of its own; those it admits are then joined to the running batch.

All members of a batch gain one token a step, so nothing is touched per step: contexts, remaining tokens and the next to
finish are kept relative to a counter of steps. The cost of a request is the same whatever its length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from heapq import heappop, heappush
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from sim.engines.engine import Decision, Outcome, Plan, Row, Scheduled, ServerState
from sim.model.errors import BadInput, CannotFit
from sim.model.files.shape import Fail
from sim.model.quantity import Countable, Size
from sim.model.request import Request
from sim.model.scenario import Hardware
from sim.model.server import Bounds, Declaration, EngineFlags, Limit, Uniform
from sim.model.status import Status
from sim.steptime.work import NOTHING, StepWork

PREFILL, DECODE, FILTER = "prefill", "decode", "filter"
BLOCK = 16  # tokens; the constant 0.9.4 passes to its queue and the size of a KV block (router/src/infer.rs:56)
_CONCATENATED = 'tgi_batch_concat{{reason="{}"}}'
_COUNTERS = (*map(_CONCATENATED.format, ("backpressure", "wait_exceeded")), 'tgi_request_failure{err="dropped"}')


def ceil_block(tokens: int) -> int:
    """Round `tokens` up to a whole number of KV blocks."""
    return -(-tokens // BLOCK) * BLOCK


class Flags(
    EngineFlags,
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="engine",
    tag="tgi-0.9.4",
):
    """How the router is configured, under the launcher's own names and with its defaults.

    `max_batch_total_tokens` is what the server would answer at `/info`: flash models ignore the flag and take what
    their warm-up finds free. Absent, it is the calibration's; as `Bounds`, it is drawn.
    """

    declared: ClassVar[Declaration] = Declaration(
        name="tgi-0.9.4",
        title="TGI 0.9.4",
        family="tgi",
        versions=r"0\.9\.4",
        aliases=("text-generation-inference",),
        flags_from="text-generation-launcher --help (launcher/src/main.rs:64-282 at the tag v0.9.4)",
        # not max_batch_prefill_tokens, not requires_padding (router/src/lib.rs)
        told=(
            "max_batch_total_tokens",
            "max_input_length",
            "max_total_tokens",
            "waiting_served_ratio",
            "max_waiting_tokens",
            "max_concurrent_requests",
        ),
        told_at="/info",
        # who waits, and for how long, follows from these; a wrong prefill budget moved p95 by half
        decisive=("max_batch_prefill_tokens", "waiting_served_ratio", "max_waiting_tokens"),
        capacity="max_batch_total_tokens",
        forms=("affine", "affine_levels", "padded", "levels"),
        limits=(
            Limit("token budget", "budget_full", "requests wait for room in max_batch_total_tokens"),
            Limit("prefill budget", "prefill_full", "requests wait while max_batch_prefill_tokens is full"),
        ),
        turn="waiting_served_ratio, max_waiting_tokens",
        counters=_COUNTERS,
        refused_status=422,
        overloaded_status=429,
        image="ghcr.io/huggingface/text-generation-inference:0.9.4",
        tokenizer_workers=2,  # threads that count tokens, each of one prompt at a time (router/src/validation.rs:34-48)
    )

    max_batch_prefill_tokens: Size = 4096
    max_batch_total_tokens: Size | Bounds | None = None
    max_input_length: Size = 1024
    max_total_tokens: Size = 2048
    waiting_served_ratio: Countable = 1.2
    max_waiting_tokens: Size = 20
    max_concurrent_requests: Size = 128
    requires_padding: bool = False

    @property
    def permits(self) -> int | None:
        """See `EngineFlags.permits`."""
        return self.max_concurrent_requests

    @property
    def pads(self) -> bool:
        """See `EngineFlags.pads`."""
        return self.requires_padding

    @property
    def kv_tokens(self) -> int | None:
        """See `EngineFlags.kv_tokens`."""
        return self.max_batch_total_tokens if isinstance(self.max_batch_total_tokens, int) else None

    @property
    def token_budget(self) -> int:
        """`max_batch_total_tokens` as one number; a CPU server without the flag takes the router's own default."""
        if isinstance(self.max_batch_total_tokens, int):
            return self.max_batch_total_tokens
        if self.max_batch_total_tokens is None and self.requires_padding:  # router/src/main.rs:209-239
            return max(16000, self.max_total_tokens, self.max_batch_prefill_tokens)
        raise ValueError("max_batch_total_tokens is not settled yet")

    @property
    def longest(self) -> str:
        """See `EngineFlags.longest`."""
        return (
            f"prompts of {self.max_input_length} tokens (server.max_input_length), and {self.max_total_tokens} with "
            "the answer (server.max_total_tokens)"
        )

    def refuses(self, prompt_tokens: int, max_new_tokens: int) -> bool:
        """Whether the server answers 422 to such a request (router/src/validation.rs:63-123)."""
        return prompt_tokens + max_new_tokens > self.max_total_tokens or prompt_tokens > self.max_input_length

    def check_fits(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """See `EngineFlags.check_fits`."""
        if self.refuses(prompt_tokens, max_new_tokens):
            return
        prompt, new = prompt_tokens, max_new_tokens
        if not self.requires_padding:
            prompt, new = ceil_block(prompt), ceil_block(new)
        what = f"a request of {prompt_tokens} + {max_new_tokens} tokens"
        if prompt > self.max_batch_prefill_tokens:
            raise CannotFit(
                f"{what} counts {prompt} prompt tokens, more than server.max_batch_prefill_tokens "
                f"{self.max_batch_prefill_tokens}: TGI 0.9.4 would wait for ever"
            )
        budget = self.max_batch_total_tokens
        if isinstance(budget, Bounds):
            budget = budget.high
        elif self.requires_padding:
            budget = self.token_budget
        if budget is not None and prompt + new > budget:
            raise CannotFit(
                f"{what} counts {prompt + new} tokens, more than server.max_batch_total_tokens "
                f"{budget}: TGI 0.9.4 would wait for ever"
            )

    def check(self, fail: Fail) -> None:
        """See `EngineFlags.check`: the launcher's own cross checks, too (launcher/src/main.rs:1016-1059)."""
        longest, total = self.max_input_length, self.max_total_tokens
        if longest >= total:
            raise fail(("max_input_length",), f"expected less than max_total_tokens ({total}), found {longest}")
        if longest > self.max_batch_prefill_tokens:
            raise fail(
                ("max_batch_prefill_tokens",),
                f"expected at least max_input_length ({longest}), found {self.max_batch_prefill_tokens}",
            )
        budget = self.max_batch_total_tokens
        low = budget.low if isinstance(budget, Bounds) else budget
        for name in ("max_batch_prefill_tokens", "max_total_tokens"):
            if low is not None and low < getattr(self, name):
                raise fail(
                    ("max_batch_total_tokens",), f"expected at least {name} ({getattr(self, name)}), found {low}"
                )

    def settled(self, capacity: float | None, uniform: Uniform, machine: Hardware) -> Flags:
        """The token budget is the scenario's if it names one, else the calibration's. Of bounds, what the calibration
        inferred within them; else it is drawn."""
        budget = self.max_batch_total_tokens
        if isinstance(budget, Bounds) and capacity is not None and budget.low <= capacity <= budget.high:
            budget = round(capacity)
        elif isinstance(budget, Bounds):
            budget = uniform(budget.low, budget.high)
        elif budget is None and capacity is not None:
            budget = round(capacity)
        elif budget is None and not self.requires_padding:
            raise BadInput(
                "expected a number of tokens here or in the calibration, which has none",
                key="server.max_batch_total_tokens",
            )
        return msgspec.structs.replace(self, max_batch_total_tokens=budget)

    def widened(self, prompt_tokens: int, total_tokens: int, users: int, given: set[str]) -> Flags:
        """See `EngineFlags.widened`."""
        least = {
            "max_input_length": prompt_tokens,
            "max_total_tokens": total_tokens,
            "max_batch_prefill_tokens": ceil_block(prompt_tokens),
            "max_concurrent_requests": users,
        }
        wider = {name: max(getattr(self, name), value) for name, value in least.items() if name not in given}
        return msgspec.structs.replace(self, **wider)

    def full(self, steps: Mapping[str, NDArray[Any]], prompt_tokens: int, max_new_tokens: int) -> dict[str, float]:
        """The share of the requests admitted that came in an admission after which another of the usual size would not
        have fitted into the token budget, and likewise into the prefill budget."""
        prompt, new = ceil_block(prompt_tokens), ceil_block(max_new_tokens)
        admitted = np.where(steps["inside"], steps["prefill_sequences"], 0)
        total = max(1, admitted.sum())
        budget = steps["held"] + (admitted + 1) * (prompt + new) > self.token_budget
        prefill = (admitted + 1) * prompt > self.max_batch_prefill_tokens
        return {
            "budget_full": float(admitted[budget].sum() / total),
            "prefill_full": float(admitted[prefill].sum() / total),
        }


class Entry:
    """A request as the engine knows it; lengths in tokens."""

    __slots__ = (
        "gone",
        "last_step",
        "live_tokens",
        "max_new_tokens",
        "new_blocks",
        "output_tokens",
        "prompt_blocks",
        "prompt_tokens",
        "queued",
        "request",
        "running",
    )

    def __init__(self, request: Request):
        self.request = request
        self.prompt_tokens, self.output_tokens = request.prompt_tokens, request.output_tokens
        self.max_new_tokens = request.max_new_tokens
        prompt, new = request.prompt_tokens, request.max_new_tokens
        self.prompt_blocks = -(-prompt // BLOCK) * BLOCK  # each rounded separately at admission (queue.rs:197-212)
        self.new_blocks = -(-new // BLOCK) * BLOCK
        # what a flash shard holds from prefill to end (flash_causal_lm.py:263-268)
        self.live_tokens = -(-(prompt + new - 1) // BLOCK) * BLOCK
        self.last_step = 0  # of its batch: the step at which its last token comes
        self.gone = False  # its client has left
        self.queued = True
        self.running = False


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
        return dict(zip(_COUNTERS, (self.backpressure, self.wait_exceeded, self.dropped), strict=True))

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


class Batch:
    """The running requests. `used` is the number of tokens that the shard reports for them."""

    def __init__(self, padded: bool = False):
        self.padded = padded
        self.members: dict[Entry, None] = {}
        self.leaving: list[Entry] = []  # members whose client has gone: they compute until the next step ends
        self.steps = 0  # decode steps so far; everything below is relative to it
        self.used = 0
        self._context = 0  # Σ (prompt + tokens received - steps)
        self._remaining = 0  # Σ (max_new_tokens - tokens received + steps)
        self._finishing: dict[int, list[Entry]] = {}  # by the step at which their last token comes
        self._finish_order: list[int] = []
        self._lengths: dict[int, int] = {}  # how many have (prompt + tokens received - steps)
        self._length_order: list[int] = []

    @property
    def context(self) -> int:
        """Summed contexts, prompts plus tokens received."""
        return self._context + len(self.members) * self.steps

    @property
    def longest(self) -> int:
        """The longest context; 0 for an empty batch."""
        order = self._length_order
        while order and not self._lengths.get(-order[0]):
            self._lengths.pop(-heappop(order), None)
        return self.steps - order[0] if order else 0

    @property
    def steps_to_finish(self) -> int:
        """How many decode steps until the next member has its last token; the batch is not empty."""
        order = self._finish_order
        while not self._finishing.get(order[0]):
            self._finishing.pop(heappop(order), None)
        return order[0] - self.steps

    def join(self, prefilled: list[Entry]) -> list[Entry]:
        """Take prefilled requests in, each with its first token; returns those that ended with it (or left meanwhile).

        `used` follows the shard: the new batch is filtered on its own before it is concatenated to the running one.
        """
        ended = [e for e in prefilled if e.output_tokens <= 1 or e.gone]
        kept = [e for e in prefilled if e.output_tokens > 1 and not e.gone] if ended else prefilled
        if not kept:
            return ended
        if self.padded:
            self._join_padded(kept, prefilled if not ended else None)
        else:
            for e in kept:
                self.used += e.live_tokens
        now, finishing, lengths = self.steps, self._finishing, self._lengths
        for e in kept:
            self.members[e] = None
            e.running = True
            length = e.prompt_tokens + 1 - now
            self._context += length
            self._remaining += e.max_new_tokens - 1 + now
            if length in lengths:
                lengths[length] += 1
            else:
                lengths[length] = 1
                heappush(self._length_order, -length)
            e.last_step = last = now + e.output_tokens - 1
            if last in finishing:
                finishing[last].append(e)
            else:
                finishing[last] = [e]
                heappush(self._finish_order, last)
        return ended

    def advance(self, steps: int) -> list[Entry]:
        """Let `steps` decode steps pass, at most to the next finish; returns those that ended at the last of them."""
        self.steps += steps
        if self._finish_order[0] > self.steps and not self.leaving:
            return []
        ended = self._finishing.pop(self.steps, [])
        for e in self.leaving:
            if e.last_step > self.steps:
                self._finishing[e.last_step].remove(e)
                ended.append(e)
        self.leaving.clear()
        if ended:
            self._drop(ended)
        return ended

    def leave(self, entry: Entry) -> None:
        """A member's client has gone: the member goes at the end of the next step."""
        self.leaving.append(entry)

    def _drop(self, ended: list[Entry]) -> None:
        now = self.steps
        for e in ended:
            del self.members[e]
            e.running = False
            received = e.output_tokens - (e.last_step - now)
            length = e.prompt_tokens + received - now
            self._context -= length
            self._remaining -= e.max_new_tokens - received + now
            self._lengths[length] -= 1
            if not self.padded:
                self.used -= e.live_tokens
        if not self.members:
            self.used = 0
        elif self.padded:
            self.used = self._filtered_tokens(
                len(self.members), self.longest, self._remaining - len(self.members) * now
            )

    def _join_padded(self, kept: list[Entry], whole: list[Entry] | None) -> None:
        longest = max(e.prompt_tokens for e in kept) + 1
        if whole is not None:  # n × (max_in + Σ max_new), causal_lm.py:125
            new = len(kept) * (longest - 1 + sum(e.max_new_tokens for e in kept))
        else:
            new = self._filtered_tokens(len(kept), longest, sum(e.max_new_tokens - 1 for e in kept))
        if self.members:  # each part padded up to the longest of both, causal_lm.py:350
            mine = self.longest
            both = max(mine, longest)
            self.used += (both - mine) * len(self.members) + new + (both - longest) * len(kept)
        else:
            self.used = new

    @staticmethod
    def _filtered_tokens(kept: int, longest: int, remaining: int) -> int:
        return kept * longest + remaining  # causal_lm.py:226
