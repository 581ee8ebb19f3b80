"""vLLM V1: the scheduler of the engine core, as of version 0.32.0.

The rules are those of vllm/v1/core/sched/scheduler.py, async_scheduler.py and v1/engine/core.py. There is no prefill
phase and no decode phase: every step gives running requests their next tokens first, in the order of admission, and
then admits waiting ones, as far as the token budget and the KV cache go. A request that gets no block preempts the one
admitted last, which loses its cache and starts again from the head of the queue.

Requests that only decode are `Decoders`: nothing is touched per step and request. Steps of one shape (decodes only, or
one prompt in chunks beside decodes) are one plan. What has no closed form (several prompts in chunks, a preemption)
looks at every running request.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from copy import deepcopy
from operator import attrgetter

from sim.engines.decoders import Decoders
from sim.engines.engine import Decision, Outcome, Plan, Row, Scheduled, ServerState
from sim.engines.kv_cache import Blocks, Run
from sim.engines.vllm_v1_flags import COUNTERS, KNOWN_VERSIONS, Flags, known_version
from sim.model.request import Request
from sim.model.status import Status
from sim.steptime.work import NOTHING, StepWork

NEVER = 1 << 60  # a step that does not come


class Rules:
    """What differs between versions (their scheduler.py and block_pool.py)."""

    def __init__(self, version: str):
        index = KNOWN_VERSIONS.index(known_version(version))
        self.skips_long_prompts = index < KNOWN_VERSIONS.index("0.14.1")  # chunking off: those behind one may go
        self.reserves_whole_prompt = self.blank_first = index >= KNOWN_VERSIONS.index("0.20.2")
        self.has_watermark = index >= KNOWN_VERSIONS.index("0.25.1")
        self.spares_lone_prompt = self.delivers_to_preempted = index >= KNOWN_VERSIONS.index("0.32.0")


WAITING, PREFILLING, DECODING, STOPPED, OVER = range(5)
"""What a request does: it waits, its prompt is computed in chunks, every step gives it a token, its last token is under
way (asynchronous scheduling), it has ended."""


class Held:
    """A request as the engine knows it; lengths in tokens, steps by their numbers.

    Its tokens are those sampled before `start` and one of every step from there on.
    """

    __slots__ = (
        "allowed",
        "base",
        "blocks",
        "computed",
        "last",
        "limit",
        "line",
        "number",
        "parked",
        "pending",
        "preemptions",
        "prompt",
        "request",
        "resumed",
        "start",
        "started",
        "state",
        "text",
    )

    def __init__(self, request: Request):
        self.request, self.prompt, self.text = request, request.prompt_tokens, request.text
        self.limit = request.output_tokens  # tokens after which it ends
        self.allowed = request.max_new_tokens  # tokens after which the scheduler knows that it ends
        self.state = WAITING
        self.number = 0  # of its last admission
        self.base = 0  # tokens sampled before `start`
        self.pending = 0  # of these, how many have not been delivered
        self.computed = 0  # while it waits or prefills
        self.start, self.line, self.last = NEVER, 0, NEVER  # see `Decoders`
        self.blocks: list[Run] = []  # those with a cache entry, of a text that others may share
        self.parked: Run | None = None  # what the cache may have kept of it when it was preempted
        self.preemptions = 0
        self.started = False  # had its first token
        self.resumed = False  # preempted since its last token

    def received(self, delivered: int) -> int:
        """Its tokens after the output of step number `delivered`."""
        start = self.start
        return self.base - self.pending + (delivered - start + 1 if delivered >= start else 0)

    def names(self, first: int, end: int, size: int) -> Iterator[tuple[Hashable, int, int]]:
        """The names of its text's segments, each with the blocks from `first` to `end` that end in it."""
        for until, name in self.text:
            reach = end if until == 0 else min(until // size, end)
            if reach > first:
                yield name, first, reach
                first = reach

    def open_names(self) -> list[Hashable]:
        """The names under which what it decodes can be found."""
        return [name for until, name in self.text if until == 0 or until > self.prompt]


class Step:
    """A step as it was scheduled: all who decode get a token, and `chunks` of prompts are computed.

    `lines` and `longest` are those of the `decoders` (how many they are); a chunk is a request, its tokens, and the
    tokens computed before.
    """

    __slots__ = ("admitted", "chunks", "decoders", "lines", "longest", "number", "preempted", "sampling")

    def __init__(self, number: int):
        self.number = number
        self.decoders = self.lines = self.longest = 0
        self.chunks: list[tuple[Held, int, int]] = []
        self.sampling: list[Held] = []  # those whose prompt it ends
        self.admitted: list[Request] = []
        self.preempted: list[Request] = []

    def work(self) -> StepWork:
        """What it computes."""
        count, number = self.decoders, self.number
        context = longest_context = 0
        if count:
            context, longest_context = self.lines + count * number, self.longest + number
        elif not self.chunks:
            return NOTHING
        total = attention = longest = 0
        for _, tokens, before in self.chunks:
            total += tokens
            attention += tokens * before + tokens * (tokens + 1) // 2
            if tokens > longest:
                longest = tokens
        return StepWork(1, total, len(self.chunks), attention, longest, count, context, longest_context)

    def growth(self) -> StepWork:
        """What the next step computes more, if it has the same shape."""
        count = self.decoders
        if not self.chunks:
            return StepWork(0, 0, 0, 0, 0, 0, count, 1) if count else NOTHING
        if self.sampling or len(self.chunks) > 1:
            return NOTHING
        return StepWork(0, 0, 0, self.chunks[0][1] ** 2, 0, 0, count, 1 if count else 0)

    def pass_by(self, steps: int) -> None:
        """Become the step that comes so many later."""
        self.number += steps
        self.chunks = [(held, tokens, before + steps * tokens) for held, tokens, before in self.chunks]


class Engine:
    """One server's scheduler (see `engines.engine.Engine`). With an observer it goes one step at a time."""

    def __init__(self, flags: Flags):
        self.flags, self.rules = flags, Rules(flags.version)
        self.decide: Callable[[Decision], Decision] | None = None
        self.observer: Callable[[Scheduled], None] | None = None
        self._usable = flags.blocks - 1  # one block is never used
        self.blocks = Blocks(self._usable, self.rules.blank_first)
        self.waiting: deque[Held] | list[Held] = deque() if flags.scheduling_policy == "fcfs" else []
        self.running: dict[Held, None] = {}  # in the order of admission
        self.preemptions = self.queried_tokens = self.hit_tokens = 0
        self.free_after = 0  # blocks free when the last step's output had been processed
        self._decoders: Decoders[Held] = Decoders(flags.block_size)
        self._prefilling: dict[Held, None] = {}  # in the order of admission
        self._held: dict[Request, Held] = {}
        self._inbox: list[tuple[Request, bool, int]] = []  # whether it comes or is cancelled, and at which boundary
        self._steps: deque[Step] = deque()  # scheduled, the one under way first
        self._late: dict[int, list[Held]] = {}  # whose token of that step is still to be delivered; it decodes no more
        self._scheduled = self._delivered = 0  # the last step that was scheduled, and the last whose output was taken
        self._seen = 0  # the last step whose output had been taken when the last one was scheduled
        self._admissions = self._queued_tokens = 0
        self._texts: dict[Hashable, int] = {}  # how many requests have a text of that name
        self._open: dict[Hashable, int] = {}  # how many decode a text of that name
        self._shared = 0  # requests that decode a text which another request has, too
        self._in_order = False  # what running requests compute is entered into the cache after all have their tokens
        self._depth = 2 if flags.async_scheduling else 1
        self._size, self._caching = flags.block_size, flags.enable_prefix_caching
        self._fcfs = flags.scheduling_policy == "fcfs"
        self._reserves = flags.scheduler_reserve_full_isl and self.rules.reserves_whole_prompt
        self._watermark = int(flags.watermark * flags.blocks) if self.rules.has_watermark else 0
        self._seats = flags.max_num_seqs if flags.max_num_active_seqs is None else flags.max_num_active_seqs
        self._budget, self._threshold = flags.max_num_batched_tokens, flags.long_prefill_token_threshold
        self._capped = self._threshold > 0 or flags.long_prefill_token_threshold_adaptive

    # what the caller asks

    def submit(self, request: Request, done: int = 0) -> Status | None:
        """See `engines.engine.Engine.submit`; a prompt that the model has no room for is refused, an answer cut."""
        room = self.flags.max_model_len - request.prompt_tokens
        if room <= 0:
            return Status.VALIDATION
        request.max_new_tokens = min(request.max_new_tokens, room)
        request.output_tokens = min(request.output_tokens, room)
        self._inbox.append((request, True, done + 1))
        return None

    def cancel(self, request: Request, done: int = 0) -> None:
        """See `engines.engine.Engine.cancel`; it is heeded before the output of the step under way is."""
        self._inbox.append((request, False, done + 1))

    def plan(self) -> Plan | None:
        """See `engines.engine.Engine.plan`."""
        if not self._steps:
            if self._inbox:
                self._take(NEVER)
            if not self._held:
                return None
            self._schedule_ahead()
        step = self._steps[0]
        return Plan(step.work(), step.growth(), self._steps_alike(), None, step.admitted, step.preempted)

    def valid_steps(self, plan: Plan, done: int) -> int:
        """See `engines.engine.Engine.valid_steps`; may say too early where only the cache keeps a newcomer out."""
        heeded = done + self._depth  # the boundary at which what comes now is scheduled
        if heeded >= plan.steps and self._depth == 1:
            return plan.steps
        valid = plan.steps
        for request, comes, boundary in self._inbox:
            if not comes:
                held = self._held.get(request)
                if held is None or held.state != WAITING:
                    valid = min(valid, boundary)
                elif self._capped or held is self.waiting[0]:
                    valid = min(valid, boundary + self._depth - 1)
            elif self._could_go(request, plan):
                valid = min(valid, boundary + self._depth - 1)
        return max(valid, done + 1)

    def _could_go(self, request: Request, plan: Plan) -> bool:
        """Whether a newcomer might change the schedule while the steps of the plan under way go on."""
        if self._capped and (plan.work.prefill_tokens or self.waiting):
            return True  # the cap depends on how many there are
        if self.waiting and self._fcfs and not self.rules.skips_long_prompts:
            return False  # it stands behind a head that cannot go
        if len(self.running) >= self._seats:
            return False
        work = plan.work
        if work.decode_sequences + work.prefill_tokens >= self._budget:
            return False
        if self._reserves and not request.text:
            return -(-request.prompt_tokens // self._size) <= self.blocks.free
        return True

    def commit(self, plan: Plan, steps: int) -> Outcome:
        """See `engines.engine.Engine.commit`."""
        if steps > self._depth:
            self._pass(steps - self._depth)
        if steps > 1 and self._depth > 1:
            self._boundary(steps - 1)  # brings nothing but the schedule of a step beyond the plan
        return self._boundary(steps)

    def _boundary(self, number: int) -> Outcome:
        """What happens where a step ends, `number` steps after the plan began."""
        inbox = self._inbox
        step = self._steps.popleft()
        if inbox:
            for request, comes, boundary in inbox:
                if not comes and boundary <= number and request in self._held:
                    self._release(self._held[request])
        outcome = self._process(step)
        self.free_after = self.blocks.free
        if self._depth > 1:
            if inbox:
                self._take(number)
            self._schedule_ahead()
        return outcome

    def received(self, request: Request, done: int) -> int:
        """See `engines.engine.Engine.received`."""
        held = self._held.get(request)
        if held is None:
            return 0
        return held.received(self._delivered + done) + (held.pending if done else 0)

    def state(self, done: int = 0) -> ServerState:
        """See `engines.engine.Engine.state`; tokens are those of whole blocks."""
        size, free = self._size, self.blocks.free
        if done:
            free -= self._decoders.blocks(self._scheduled + 1, done) + self._blocks_of_chunks(done)
        used = self._usable - free
        return ServerState(len(self.waiting), self._queued_tokens, len(self.running), used * size, free * size)

    def counters(self, done: int = 0) -> Mapping[str, float]:
        """See `engines.engine.Engine.counters`."""
        return dict(zip(COUNTERS, (self.preemptions, self.queried_tokens, self.hit_tokens), strict=True))

    # many steps at once

    def _steps_alike(self) -> int:
        """How many steps, the one under way included, have its shape, and are known to be scheduled so."""
        first, last = self._steps[0], self._steps[-1]
        count, ahead = last.decoders, last.number - first.number
        if ahead < self._depth - 1 or self._shared or self.observer is not None or self.decide is not None:
            return 1
        if (
            last.preempted
            or first.sampling
            or last.sampling
            or first.decoders != count
            or self._decoders.count != count
        ):
            return 1
        steps = NEVER
        if chunks := last.chunks:
            if len(chunks) > 1 or len(first.chunks) != 1:
                return 1
            held, tokens, before = chunks[0]
            if first.chunks[0][:2] != (held, tokens) or held not in self._prefilling:
                return 1
            if self.waiting and (self._capped or count + tokens < self._budget):
                return 1
            if ahead == 0 and last.admitted and count + tokens < self._budget and tokens < self._cap():
                return 1  # what others took of the budget is left to it from now on
            steps = 1 + ahead + (held.prompt + held.base - before - tokens - 1) // tokens
        elif first.chunks or last.admitted:
            return 1
        if self._decoders.ends:
            steps = min(steps, self._decoders.next_end - first.number + 1)
        further = steps - 1 - ahead
        if further <= 0:
            return max(steps, 1)
        return 1 + ahead + self._fitting(further)

    def _fitting(self, steps: int) -> int:
        """How many further steps of the last one's shape, `steps` at most, the free blocks are enough for."""
        free, decoders, first = self.blocks.free, self._decoders, self._scheduled + 1
        if not self._prefilling:
            return decoders.fitting(first, steps, free)
        while steps and decoders.blocks(first, steps) + self._blocks_of_chunks(steps) > free:
            steps -= 1  # few: a prompt has few chunks
        return steps

    def _blocks_of_chunks(self, steps: int) -> int:
        """How many blocks the prompt under way takes in so many further steps."""
        if len(self._prefilling) != 1 or not self._steps[-1].chunks:
            return 0
        _, tokens, before = self._steps[-1].chunks[-1]
        computed = before + tokens
        return -(-(computed + steps * tokens) // self._size) - -(-computed // self._size)

    def _pass(self, steps: int) -> None:
        """Let steps pass that change nothing but numbers: as many are scheduled as are delivered."""
        taken = self._decoders.blocks(self._scheduled + 1, steps)
        for held, tokens, _ in self._steps[-1].chunks:
            taken += self._blocks_of_chunks(steps)
            held.computed += steps * tokens
            if held.text and self._caching:
                self._enter(held, held.computed)
        self.blocks.take(taken)
        self._scheduled += steps
        self._delivered += steps
        self._seen = self._delivered
        for step in self._steps:
            step.pass_by(steps)

    # who comes and goes

    def _take(self, boundary: int) -> None:
        """Take what came before that boundary, in its order."""
        inbox = self._inbox
        self._inbox = [later for later in inbox if later[2] > boundary]
        for request, comes, at in inbox:
            if at > boundary:
                break
            if comes:
                held = Held(request)
                self._held[request] = held
                self._queue(held)
                if held.text:
                    self._count_text(held, 1)
            elif request in self._held:
                self._release(self._held[request])

    def _queue(self, held: Held) -> None:
        self._queued_tokens += held.prompt
        if isinstance(self.waiting, list):
            insort(self.waiting, held, key=_urgency)
        else:
            self.waiting.append(held)

    def _release(self, held: Held, *, finished: bool = False) -> None:
        """A request has ended, or its client has left."""
        del self._held[held.request]
        if held.state == WAITING:
            self.waiting.remove(held)
            self._queued_tokens -= held.prompt
            if held.parked is not None:
                held.parked.dead = True
        else:
            del self.running[held]
            entered = held.prompt + held.received(self._delivered) - 1 if finished else self._findable(held)
            computed = self._computed(held)
            self._stop(held)
            self._give_back(held, computed, entered)
        held.state = OVER
        if held.text:
            self._count_text(held, -1)

    def _stop(self, held: Held) -> None:
        """A running request is not computed any more."""
        if held.state == PREFILLING:
            del self._prefilling[held]
            return
        if held.state == DECODING:
            self._decoders.stop(held)
        if held.text:
            self._count_open(held, -1)
        if held.last > self._delivered:
            self._decoders.forget_end(held)

    def _computed(self, held: Held) -> int:
        """The tokens of a running request that are computed, or scheduled to be."""
        if held.state == PREFILLING:
            return held.computed
        return held.line + (self._scheduled if held.state == DECODING else held.last)

    def _findable(self, held: Held) -> int:
        """How many tokens of a running request can be found in the cache, as far as they fill blocks."""
        if held.state == PREFILLING:
            return held.computed
        if held.state == DECODING:
            return min(held.line + self._scheduled, held.prompt + held.received(self._seen))
        return held.prompt + held.received(min(self._seen, held.last - 2))

    def _give_back(self, held: Held, computed: int, findable: int) -> None:
        """Give back the blocks of so many computed tokens, when a request is over or has been preempted."""
        size, total = self._size, -(-computed // self._size)
        if not self._caching:
            self.blocks.give_back(total, 0)
            return
        full, waits = findable // size, held.state == WAITING
        if waits and not held.text and full > (held.prompt + held.base - 1) // size:
            # it will not hit the last of these blocks, and computing it again it enters the same text twice
            held.text = ((0, held.request),)
            self._count_text(held, 1)
        if held.text:
            self._enter(held, findable)
            self.blocks.leave(held.blocks, total - len(held.blocks))
            held.blocks = []
        elif waits:
            held.parked = self.blocks.park(total - full, full)
        else:
            self.blocks.give_back(total - full, full)

    def _enter(self, held: Held, tokens: int) -> None:
        """So many tokens of a text that others may share can be found from now on, as far as they fill blocks."""
        entered, full = len(held.blocks), tokens // self._size
        if full > entered:
            for name, first, end in held.names(entered, full, self._size):
                held.blocks += self.blocks.enter(name, first, end)

    def _count_text(self, held: Held, change: int) -> None:
        for _, name in held.text:
            before = self._texts.get(name, 0)
            now = self._texts[name] = before + change
            self._shared += self._open.get(name, 0) * ((now > 1) - (before > 1))
            if not now:
                del self._texts[name]

    def _count_open(self, held: Held, change: int) -> None:
        for name in held.open_names():
            self._open[name] = self._open.get(name, 0) + change
            self._shared += change * (self._texts.get(name, 0) > 1)
            if not self._open[name]:
                del self._open[name]

    # the schedule of a step

    def _schedule_ahead(self) -> None:
        while self._held and len(self._steps) < self._depth:
            step = self._schedule()
            self._steps.append(step)
            if not step.chunks and not step.decoders:  # no step after one with nothing to run before it has passed
                break

    def _cap(self) -> int:
        """The most tokens of a request in the next step."""
        if not self._capped:
            return self._budget
        present = len(self.running) + len(self.waiting)
        if present == 1 and self.rules.spares_lone_prompt:
            return self._budget
        cap = self._threshold
        if self.flags.long_prefill_token_threshold_adaptive:
            cap = max(cap, self._budget // present)
        return cap or self._budget

    def _schedule(self) -> Step:
        """The next step (Scheduler.schedule)."""
        decision = None if self.decide is None else self.decide(self._foreseen())
        number = self._scheduled + 1
        step, decoders, cap = Step(number), self._decoders, self._cap()
        if self._depth > 1:
            for held in decoders.ends.get(self._scheduled, ()):
                if held.allowed == held.limit:  # the scheduler knows that it is to end
                    decoders.stop(held)
                    held.state = STOPPED
        self._in_order = self._shared > 0 and self._caching
        starved: list[Held] = []
        if decision is not None:
            for request in decision.preempted:
                self._preempt(self._held[request], step)
        budget = self._continue(step, cap, starved, forced=decision is not None)
        step.decoders = decoders.count - len(starved)
        if step.decoders:
            step.lines, step.longest = decoders.lines, decoders.longest
        for held in starved:
            decoders.stop(held)
            decoders.forget_end(held)
            step.lines -= held.line
        if starved and step.decoders:
            step.longest = decoders.longest
        if self._in_order:
            self._in_order = False
            self._enter_in_order(number, starved)
        if decision is not None:
            for request in decision.admitted:
                budget -= self._admit(self._held[request], step, cap, max(budget, 1), forced=True)
        elif self.waiting and not step.preempted:
            self._admit_waiting(step, budget, cap)
        if self.observer is not None:
            rows = self._rows(step, starved)
        self._scheduled, self._seen = number, self._delivered
        for held in starved:
            self._defer(held)
        for held in step.sampling:
            self._join(held, number)
        if self.observer is not None:
            self.observer(Scheduled("step", rows, step.preempted, self.state()))
        return step

    def _continue(self, step: Step, cap: int, starved: list[Held], *, forced: bool) -> int:
        """Give running requests their next tokens; what is left of the budget."""
        decoders, size = self._decoders, self._size
        budget = self._budget - decoders.count
        taken = decoders.blocks(step.number)
        if not self._prefilling:
            if budget >= 0 and (forced or taken <= self.blocks.free):
                self.blocks.take(taken)
                return budget
        elif len(self._prefilling) == 1:
            held = next(iter(self._prefilling))
            before = held.computed
            tokens = min(held.prompt + held.base - before, cap, budget)
            taken += -(-(before + tokens) // size) - -(-before // size)
            if tokens > 0 and held is next(reversed(self.running)) and (forced or taken <= self.blocks.free):
                self.blocks.take(taken)
                self._compute(held, tokens, step)
                return budget - tokens
        return self._continue_each(step, cap, starved, forced=forced)

    def _continue_each(self, step: Step, cap: int, starved: list[Held], *, forced: bool) -> int:
        """The same where it depends on their order: with several prompts under way, or too few free blocks."""
        budget, size, blocks = self._budget, self._size, self.blocks
        given: dict[Held, int] = {}
        for held in list(self.running):
            if budget <= 0:
                break
            state = held.state
            if state == DECODING:
                tokens, before = 1, held.line + step.number - 1
            elif state == PREFILLING:
                before = held.computed
                tokens = min(held.prompt + held.base - before, cap, budget)
            else:  # its last token is under way, or it was preempted for one before it
                continue
            new = -(-(before + tokens) // size) - -(-before // size)
            while new and new > blocks.free and not forced:
                victim = next(reversed(self.running)) if self._fcfs else max(self.running, key=_urgency_of_victim)
                tokens_back = given.pop(victim, 0)
                budget += tokens_back
                self._preempt(victim, step, tokens_back)
                if victim is held:
                    break
            if held.state == WAITING:  # it preempted itself
                break
            blocks.take(new)
            given[held] = tokens
            budget -= tokens
        for held in self.running:
            if held.state == PREFILLING and held in given:
                self._compute(held, given[held], step)
            elif held.state == DECODING and held not in given:
                starved.append(held)
        return budget

    def _compute(self, held: Held, tokens: int, step: Step) -> None:
        """A step computes the next tokens of a prompt, for which blocks have been taken."""
        step.chunks.append((held, tokens, held.computed))
        held.computed += tokens
        if held.text and self._caching and not (self._in_order and held in self._prefilling):
            self._enter(held, held.computed)
        if held.computed == held.prompt + held.base:
            self._prefilling.pop(held, None)
            step.sampling.append(held)
        else:
            self._prefilling[held] = None

    def _join(self, held: Held, start: int) -> None:
        """It gets a token with step number `start` and every one after it."""
        held.state, held.start = DECODING, start
        held.line = held.prompt + held.base - start
        left = held.limit - held.base
        held.last = start + left - 1 if left else start - 2  # none left: it is deferred, and its last is under way
        self._decoders.join(held)
        if held.text:
            self._count_open(held, 1)

    def _defer(self, held: Held) -> None:
        """It decodes, and got nothing from the step that has just been scheduled."""
        if held.text:
            self._count_open(held, -1)
        self._move_base(held, self._scheduled - 1)
        self._join(held, self._scheduled + 1)

    def _move_base(self, held: Held, last: int) -> None:
        """It gets no token after step number `last`; what was sampled and not delivered is still to come."""
        if last < held.start:
            return
        held.base += last - held.start + 1
        late = last - max(self._delivered, held.start - 1)
        if late:
            held.pending += late
            self._late.setdefault(last, []).append(held)

    def _preempt(self, held: Held, step: Step, given: int = 0) -> None:
        """Take a running request's blocks, also those for the tokens `given` in this very step."""
        findable, computed, state = self._findable(held), self._computed(held) + given, held.state
        if given:
            findable = min(computed, held.prompt + held.received(self._delivered))
        received = held.received(self._delivered)
        del self.running[held]
        self._stop(held)
        if state != PREFILLING:
            self._move_base(held, min(self._scheduled, held.last))
            if held.pending and not self.rules.delivers_to_preempted:
                held.base -= held.pending
                held.pending = 0
                self._late[min(self._scheduled, held.last)].remove(held)
        held.state, held.start, held.computed = WAITING, NEVER, 0
        self._give_back(held, computed, findable)
        held.preemptions += 1
        held.resumed = received > 0
        self.preemptions += 1
        step.preempted.append(held.request)
        if isinstance(self.waiting, deque):
            self.waiting.appendleft(held)
            self._queued_tokens += held.prompt
        else:
            self._queue(held)

    def _admit_waiting(self, step: Step, budget: int, cap: int) -> None:
        """Admit waiting requests, until the first that cannot go."""
        at = 0
        while at < len(self.waiting) and budget > 0 and len(self.running) < self._seats:
            held = self.waiting[at]
            if held.pending:  # preempted, and the token of the step under way has not come
                break
            tokens = self._admit(held, step, cap, budget)
            if tokens < 0 and self.rules.skips_long_prompts:
                at += 1
            elif tokens <= 0:
                break
            budget -= tokens

    def _admit(self, held: Held, step: Step, cap: int, budget: int, *, forced: bool = False) -> int:
        """Admit a waiting request if it may go; the tokens computed of it, 0 if not, -1 if its prompt is too long."""
        size, known, blocks = self._size, held.prompt + held.base, self.blocks
        hits: list[Run] = []
        number = idle = 0
        if held.parked is not None:
            number = idle = held.parked.blocks
        elif held.text and self._caching:
            hits = self._hits(held, (known - 1) // size)
            number, idle = len(hits), blocks.idle(hits)
        cached = number * size
        tokens = min(known - cached, cap)
        if tokens > budget:
            if not forced and not self.flags.enable_chunked_prefill:
                return -1
            tokens = budget
        need = -(-(cached + tokens) // size) - number
        whole = -(-known // size) - number if self._reserves else need
        room = blocks.free - idle - (self._watermark if self.running else 0)
        if (whole if whole > need else need) > room and not forced:
            return 0
        if self._caching and not held.preemptions:  # as vllm/v1/metrics/stats.py:PrefixCacheStats counts
            self.queried_tokens += known
            self.hit_tokens += cached
        if self.waiting[0] is held and isinstance(self.waiting, deque):
            self.waiting.popleft()
        else:
            self.waiting.remove(held)
        self._queued_tokens -= held.prompt
        self._admissions += 1
        self.running[held] = None
        held.state, held.number, held.computed = PREFILLING, self._admissions, cached
        if held.parked is not None:
            blocks.claim(held.parked)
            held.parked = None
        elif hits:
            blocks.use(hits)
            held.blocks = hits
        blocks.take(need)
        self._compute(held, tokens, step)
        step.admitted.append(held.request)
        return tokens

    def _hits(self, held: Held, most: int) -> list[Run]:
        """The blocks that hold the beginning of a text."""
        hits: list[Run] = []
        for name, first, end in held.names(0, most, self._size):
            hits += self.blocks.find(name, first, end)
            if len(hits) < end:
                break
        return hits

    def _enter_in_order(self, number: int, starved: list[Held]) -> None:
        """Enter what running requests have computed in their order, where one decodes a text that another has, too."""
        for held in self.running:
            if held.text:
                if held.state == DECODING and held not in starved:
                    known = held.prompt + held.received(self._delivered)
                    self._enter(held, min(held.line + number, known))
                else:
                    self._enter(held, self._findable(held))

    def _foreseen(self) -> Decision:
        """What the rules decide for the next step, found without changing anything."""
        most = self._decoders.count + self._budget // self._size + len(self._prefilling)  # blocks that a step takes
        if not self.waiting and most <= self.blocks.free:
            return Decision()
        same = (self.flags, self.rules, *self._held, *(request for request, _, _ in self._inbox))
        copy = deepcopy(self, {id(self.decide): None, id(self.observer): None, **{id(one): one for one in same}})
        step = copy._schedule()
        return Decision(step.admitted, step.preempted)

    def _rows(self, step: Step, starved: list[Held]) -> list[Row]:
        """Who takes part in a step that is being scheduled, in order."""
        chunks = {held: (tokens, before) for held, tokens, before in step.chunks}
        rows = []
        for held in self.running:
            if held in chunks:
                tokens, before = chunks[held]
                rows.append(Row(held.request, tokens, True, before))
            elif held.state == DECODING and held not in starved:
                rows.append(Row(held.request, 1, False, held.line + step.number - 1))
        return rows

    # the output of a step

    def _process(self, step: Step) -> Outcome:
        """Deliver the tokens that a step sampled, and end what is over."""
        self._delivered = number = step.number
        first, resumed = [], []
        ended = self._decoders.ends.pop(number, None) or []
        for held in self._late.pop(number, ()):
            if held.state == OVER:
                continue
            held.pending -= 1
            if held.started and held.resumed:
                held.resumed = False
                resumed.append(held)
            if held.state == WAITING and held.base >= held.limit:
                ended.append(held)
        for held in step.sampling:
            if held.state == OVER or (held.state == WAITING and not self.rules.delivers_to_preempted):
                continue
            if not held.started:
                held.started = True
                first.append(held.request)
            elif held.resumed:
                held.resumed = False
                resumed.append(held)
        if not ended:
            return Outcome(1, first, [held.request for held in resumed])
        if len(ended) > 1:
            ended.sort(key=_number)
        for held in ended:
            self._release(held, finished=True)
        if len(resumed) > 1:
            resumed.sort(key=_number)
        return Outcome(1, first, [held.request for held in resumed], [held.request for held in ended])


_number = attrgetter("number")


def _urgency(held: Held) -> tuple[int, float, str]:
    return held.request.priority, held.request.arrived, str(held.request.id)


def _urgency_of_victim(held: Held) -> tuple[int, float]:
    return held.request.priority, held.request.arrived
