"""vLLM V1: the scheduler of the engine core, as of version 0.32.0.

The rules are those of vllm/v1/core/sched/scheduler.py, async_scheduler.py and v1/engine/core.py. There is no prefill
phase and no decode phase: every step gives running requests their next tokens first, in the order of admission, and
then admits waiting ones, as far as the token budget and the KV cache go. A request that gets no block preempts the one
admitted last, which loses its cache and starts again from the head of the queue.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from sim.engines.engine import Decision, Outcome, Plan, Row, Scheduled, ServerState
from sim.engines.kv_cache import Blocks, CachedBlocks, CountedBlocks
from sim.model.request import VALIDATION, Request, Text
from sim.steptime.work import NOTHING, StepWork


class Flags(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The engine's arguments that decide how it schedules, under its own names (engine/arg_utils.py)."""

    engine: str = "vllm-v1"
    version: str = "0.32.0"
    max_model_len: int = 4096
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    long_prefill_token_threshold_adaptive: bool = False
    scheduling_policy: str = "fcfs"
    max_num_active_seqs: int | None = None
    scheduler_reserve_full_isl: bool = True
    watermark: float = 0.0
    async_scheduling: bool = True
    block_size: int = 16
    enable_prefix_caching: bool = True
    num_gpu_blocks: int = 2000


@dataclass(eq=False)
class Held:
    """A request as the engine knows it; lengths in tokens."""

    request: Request
    order: int  # of arrival
    text: Text
    received: int = 0
    computed: int = 0
    placeholders: int = 0  # tokens that steps under way will sample (asynchronous scheduling)
    entered: int = 0  # blocks that can be found in the cache
    admitted_at: int = 0  # tokens it had when it was last admitted
    blocks: list[int] = field(default_factory=list)
    preemptions: int = 0
    running: bool = False
    over: bool = False
    started: bool = False  # had its first token
    resumed: bool = False  # preempted since its last token

    @property
    def known(self) -> int:
        """Its prompt and the tokens received."""
        return self.request.prompt_tokens + self.received


class Part:
    """What a step computes of one request."""

    __slots__ = ("before", "held", "is_prefill", "preemptions", "samples", "tokens")

    def __init__(self, held: Held, tokens: int):
        self.held, self.tokens, self.before = held, tokens, held.computed
        self.is_prefill = held.computed < held.admitted_at
        self.samples = False
        self.preemptions = held.preemptions


@dataclass
class Step:
    """A step as it was scheduled."""

    parts: list[Part]
    admitted: list[Request]
    preempted: list[Request]


class Engine:
    """One server's scheduler (see `engines.engine.Engine`).

    Decode steps that nothing can change are one plan, if the engine is synchronous and nobody observes its steps.
    """

    def __init__(self, flags: Flags):
        self.flags = flags
        self.decide: Callable[[Decision], Decision] | None = None
        self.observer: Callable[[Scheduled], None] | None = None
        usable = flags.num_gpu_blocks - 1  # one block is never used
        self.blocks: Blocks = CachedBlocks(usable) if flags.enable_prefix_caching else CountedBlocks(usable)
        self.waiting: deque[Held] | list[Held] = deque() if flags.scheduling_policy == "fcfs" else []
        self.running: list[Held] = []
        self.preemptions = self.queried_tokens = self.hit_tokens = 0
        self._held: dict[Request, Held] = {}
        self._inbox: list[tuple[Request, bool]] = []  # and whether it comes or is cancelled
        self._steps: deque[Step] = deque()  # scheduled, the one under way first
        self._order = self.free_after = 0  # blocks free when the last step's output had been processed
        self._depth = 2 if flags.async_scheduling else 1
        self._watermark = int(flags.watermark * flags.num_gpu_blocks)
        self._seats = flags.max_num_seqs if flags.max_num_active_seqs is None else flags.max_num_active_seqs

    def submit(self, request: Request, done: int = 0) -> str | None:
        """See `engines.engine.Engine.submit`; a prompt that the model has no room for is refused, an answer cut."""
        room = self.flags.max_model_len - request.prompt_tokens
        if room <= 0:
            return VALIDATION
        request.max_new_tokens = min(request.max_new_tokens, room)
        request.output_tokens = min(request.output_tokens, room)
        self._inbox.append((request, True))
        return None

    def cancel(self, request: Request, done: int = 0) -> None:
        """See `engines.engine.Engine.cancel`; it is heeded before the output of the step under way is."""
        self._inbox.append((request, False))

    def plan(self) -> Plan | None:
        """See `engines.engine.Engine.plan`."""
        if not self._steps:
            self._take()
            self._schedule_ahead()
            if not self._steps:
                return None
        step = self._steps[0]
        work, steps = _work(step.parts), self._steps_alike(step)
        growth = StepWork(decode_context=len(step.parts), decode_longest=1) if not work.prefill_tokens else NOTHING
        return Plan(work, growth, steps, None, step.admitted, step.preempted)

    def valid_steps(self, plan: Plan, done: int) -> int:
        """See `engines.engine.Engine.valid_steps`; may say too early where the cache is what keeps a newcomer out."""
        waiting = len(self.waiting)
        for request, comes in self._inbox:
            held = self._held.get(request)
            if not comes:
                if held is None or held.running or held is self.waiting[0]:
                    return done + 1
            elif waiting and isinstance(self.waiting, deque):
                waiting += 1  # behind the head, which cannot go
            elif len(self.running) < self._seats and plan.work.decode_sequences < self.flags.max_num_batched_tokens:
                return done + 1
            else:
                waiting += 1
        return plan.steps

    def commit(self, plan: Plan, steps: int) -> Outcome:
        """See `engines.engine.Engine.commit`."""
        step = self._steps.popleft()
        if steps > 1:
            self._advance(step, steps - 1)
        self._abort()
        outcome = self._process(step)
        self.free_after = self.blocks.free
        if self._depth > 1:
            self._take()
            self._schedule_ahead()
        return outcome

    def received(self, request: Request, done: int) -> int:
        """See `engines.engine.Engine.received`."""
        held = self._held.get(request)
        if held is None:
            return 0
        if done and any(part.held is held and part.samples for part in self._steps[0].parts):
            return held.received + done
        return held.received

    def state(self, done: int = 0) -> ServerState:
        """See `engines.engine.Engine.state`; tokens are those of whole blocks."""
        size, free = self.flags.block_size, self.blocks.free
        used = self.flags.num_gpu_blocks - 1 - free
        queued = sum(held.request.prompt_tokens for held in self.waiting)
        return ServerState(len(self.waiting), queued, len(self.running), used * size, free * size)

    def counters(self, done: int = 0) -> Mapping[str, float]:
        """See `engines.engine.Engine.counters`."""
        return {
            "vllm:num_preemptions_total": self.preemptions,
            "vllm:prefix_cache_queries_total": self.queried_tokens,
            "vllm:prefix_cache_hits_total": self.hit_tokens,
        }

    def _steps_alike(self, step: Step) -> int:
        """How many steps, this one included, have the shape of a step that has just been scheduled."""
        flags, size = self.flags, self.flags.block_size
        if self._depth > 1 or self.observer is not None or self.decide is not None or step.admitted or step.preempted:
            return 1
        if not step.parts or len(step.parts) < len(self.running) or any(part.is_prefill for part in step.parts):
            return 1
        if self.waiting and self.waiting[0].request.text:  # what others enter in the cache may let it go
            return 1
        steps = min(
            min(part.held.request.output_tokens - part.held.received, flags.max_model_len - part.held.known)
            for part in step.parts
        )
        if steps <= 1:
            return 1
        computed = np.array([part.held.computed for part in step.parts])
        blocks = np.array([len(part.held.blocks) for part in step.parts])

        def fits(further: int) -> bool:
            return int((-(-(computed + further) // size) - blocks).clip(0).sum()) <= self.blocks.free

        if fits(steps - 1):
            return steps
        return bisect_left(range(1, steps), True, key=lambda further: not fits(further)) + 1

    def _advance(self, step: Step, steps: int) -> None:
        """Let further decode steps of the same requests pass, none of which ends one or lacks a block."""
        size, ahead = self.flags.block_size, []
        for place, part in enumerate(step.parts):
            room = len(part.held.blocks) * size - part.held.computed
            ahead += [(after, place) for after in range(room + 1, steps + 1, size)]
        for _, place in sorted(ahead):  # in the order in which the steps would have taken them
            self.blocks.take(step.parts[place].held.blocks, (), 1)
        for part in step.parts:
            held = part.held
            held.received += steps
            held.computed += steps
            if not held.started:
                held.started = True
            if self.flags.enable_prefix_caching:
                self._enter(held, held.computed)

    def _take(self) -> None:
        """Take what came since, in its order."""
        inbox, self._inbox = self._inbox, []
        for request, comes in inbox:
            if comes:
                held = Held(request, self._order, request.text or ((0, request),))
                self._order += 1
                self._held[request] = held
                self._queue(held)
            elif request in self._held:
                self._release(self._held[request])

    def _abort(self) -> None:
        """Let those go whose clients left, before the output of the step that has ended is processed."""
        for request, comes in self._inbox:
            if not comes and request in self._held:
                self._release(self._held[request])

    def _release(self, held: Held) -> None:
        held.over = True
        del self._held[held.request]
        if held.running:
            self.running.remove(held)
            held.running = False
        else:
            self.waiting.remove(held)
        self.blocks.give_back(held.blocks)

    def _queue(self, held: Held) -> None:
        if isinstance(self.waiting, list):
            insort(self.waiting, held, key=_urgency)
        else:
            self.waiting.append(held)

    def _schedule_ahead(self) -> None:
        while self._held and len(self._steps) < self._depth:
            step = self._schedule()
            self._steps.append(step)
            if not step.parts:  # nothing to run: no step after it is scheduled before it has passed
                break

    def _schedule(self) -> Step:
        """The next step (Scheduler.schedule)."""
        flags = self.flags
        budget, present = flags.max_num_batched_tokens, len(self.running) + len(self.waiting)
        cap = flags.long_prefill_token_threshold if present > 1 else 0
        if cap and flags.long_prefill_token_threshold_adaptive:
            cap = max(cap, budget // present)
        cap = cap or budget
        parts: dict[Held, Part] = {}
        step = Step([], [], [])
        budget = self._continue(parts, step, budget, cap)
        if not step.preempted:
            self._admit(parts, step, budget, cap)
        step.parts = list(parts.values())
        for part in step.parts:
            held = part.held
            held.computed += part.tokens
            part.samples = held.computed == held.known + held.placeholders
            if self._depth > 1 and part.samples:
                held.placeholders += 1
        if self.observer is not None:
            rows = [Row(part.held.request, part.tokens, part.is_prefill, part.before) for part in step.parts]
            self.observer(Scheduled("step", rows, step.preempted, self.state()))
        return step

    def _continue(self, parts: dict[Held, Part], step: Step, budget: int, cap: int) -> int:
        """Give running requests their next tokens; what is left of the budget."""
        flags, running, at = self.flags, self.running, 0
        while at < len(running) and budget > 0:
            held = running[at]
            tokens = held.known + held.placeholders - held.computed
            tokens = min(tokens, cap, budget, flags.max_model_len - held.computed - 1)
            if held.placeholders and held.received + held.placeholders >= held.request.max_new_tokens:
                tokens = 0
            if tokens <= 0:
                at += 1
                continue
            new = -(-(held.computed + tokens) // flags.block_size) - len(held.blocks)
            while new > self.blocks.free:
                victim = running[-1] if isinstance(self.waiting, deque) else max(running, key=_urgency_of_victim)
                place = running.index(victim)
                at -= place < at
                if victim in parts:
                    budget += parts.pop(victim).tokens
                self._preempt(victim, step)
                if victim is held:
                    break
            if not held.running:  # it preempted itself
                break
            self._allocate(held, (), new, tokens)
            parts[held] = Part(held, tokens)
            budget -= tokens
            at += 1
        return budget

    def _preempt(self, held: Held, step: Step) -> None:
        self.running.remove(held)
        self.blocks.give_back(held.blocks)
        held.running, held.computed, held.entered = False, 0, 0
        held.preemptions += 1
        held.resumed = held.received > 0
        self.preemptions += 1
        step.preempted.append(held.request)
        if isinstance(self.waiting, deque):
            self.waiting.appendleft(held)
        else:
            self._queue(held)

    def _admit(self, parts: dict[Held, Part], step: Step, budget: int, cap: int) -> None:
        """Admit waiting requests, until the first that cannot go."""
        flags, size = self.flags, self.flags.block_size
        while self.waiting and budget > 0 and len(self.running) < self._seats:
            held = self.waiting[0]
            if held.placeholders:  # preempted, and the token of the step under way has not come
                break
            known = held.known
            hits = self.blocks.hits(self._keys(held, 0, (known - 1) // size)) if flags.enable_prefix_caching else []
            cached = len(hits) * size
            tokens = min(known - cached, cap)
            if not flags.enable_chunked_prefill and tokens > budget:
                break
            tokens = min(tokens, budget)
            left = self.blocks.free - self.blocks.idle(hits) - (self._watermark if self.running else 0)
            whole = known if flags.scheduler_reserve_full_isl else cached + tokens
            if max(-(-whole // size), -(-(cached + tokens) // size)) - len(hits) > left:
                break
            self.queried_tokens += known
            self.hit_tokens += cached
            self.waiting.remove(held)
            self.running.append(held)
            held.running, held.computed, held.admitted_at, held.entered = True, cached, known, len(hits)
            self._allocate(held, hits, -(-(cached + tokens) // size) - len(hits), tokens)
            parts[held] = Part(held, tokens)
            step.admitted.append(held.request)
            budget -= tokens

    def _allocate(self, held: Held, hits: Sequence[int], new: int, tokens: int) -> None:
        """Give a request blocks for its next tokens; those that the step fills can be found from now on."""
        self.blocks.take(held.blocks, hits, new)
        if self.flags.enable_prefix_caching:
            self._enter(held, min(held.computed + tokens, held.known))

    def _enter(self, held: Held, tokens: int) -> None:
        full = tokens // self.flags.block_size
        if full > held.entered:
            for block, key in zip(held.blocks[held.entered : full], self._keys(held, held.entered, full), strict=True):
                self.blocks.enter(block, key)
            held.entered = full

    def _keys(self, held: Held, first: int, end: int) -> list[Hashable]:
        """What identifies the text up to the end of each of its blocks from `first` to `end`."""
        size, at = self.flags.block_size, 0
        keys: list[Hashable] = []
        for number in range(first, end):
            while held.text[at][0] and held.text[at][0] < (number + 1) * size:
                at += 1
            keys.append((held.text[at][1], number))
        return keys

    def _process(self, step: Step) -> Outcome:
        """Deliver the tokens that a step sampled, and end what is over."""
        first, resumed, finished = [], [], []
        for part in step.parts:
            held, request = part.held, part.held.request
            if held.over or not part.samples:
                continue
            held.received += 1
            if self._depth > 1:
                held.placeholders -= 1
                if self.flags.enable_prefix_caching and held.running and part.preemptions == held.preemptions:
                    self._enter(held, min(held.computed - held.placeholders, held.known))
            if not held.started:
                held.started = True
                first.append(request)
            elif held.resumed:
                held.resumed = False
                resumed.append(request)
            if held.received >= request.output_tokens or held.known >= self.flags.max_model_len:
                finished.append(request)
                self._release(held)
        return Outcome(1, first, resumed, finished)


def _urgency(held: Held) -> tuple[int, float, str]:
    return held.request.priority, held.request.arrived, str(held.request.id)


def _urgency_of_victim(held: Held) -> tuple[int, float]:
    return held.request.priority, held.request.arrived


def _work(parts: Sequence[Part]) -> StepWork:
    if not parts:
        return StepWork()
    prefill = [part for part in parts if part.is_prefill]
    decode = [part.before + 1 for part in parts if not part.is_prefill]
    attention = sum(part.tokens * part.before + part.tokens * (part.tokens + 1) // 2 for part in prefill)
    longest = max((part.tokens for part in prefill), default=0)
    tokens = sum(part.tokens for part in prefill)
    return StepWork(1, tokens, len(prefill), attention, longest, len(decode), sum(decode), max(decode, default=0))
