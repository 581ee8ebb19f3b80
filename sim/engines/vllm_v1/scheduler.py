"""The scheduler: who waits, who runs, and what the next step computes of whom.

After v1/core/sched/scheduler.py and async_scheduler.py. Requests that only decode are `Decoders`: nothing is touched
per step and request. What has no closed form (several prompts in chunks, a preemption) looks at every running request.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from copy import deepcopy
from operator import attrgetter

from sim.engines.decoders import Decoders
from sim.engines.engine import Decision, Outcome, Plan, Row
from sim.engines.kv_cache import Blocks, Run
from sim.engines.vllm_v1.flags import Flags
from sim.engines.vllm_v1.held import DECODING, NEVER, OVER, PREFILLING, STOPPED, WAITING, Held
from sim.engines.vllm_v1.prefix_cache import PrefixCache
from sim.engines.vllm_v1.step import Step
from sim.engines.vllm_v1.versions import Rules
from sim.model.request import Request


class Scheduler:
    """Requests by what they do, and the blocks of their KV cache."""

    def __init__(self, flags: Flags):
        self.flags, self.rules = flags, Rules(flags.version)
        self.size, self.usable = flags.block_size, flags.blocks - 1  # one block is never used
        self.blocks = Blocks(self.usable, self.rules.blank_first)
        self.cache = PrefixCache(self.blocks, self.size, flags.enable_prefix_caching)
        self.fcfs = flags.scheduling_policy == "fcfs"
        self.waiting: deque[Held] | list[Held] = deque() if self.fcfs else []
        self.running: dict[Held, None] = {}  # in the order of admission
        self.prefilling: dict[Held, None] = {}  # likewise
        self.decoders: Decoders[Held] = Decoders(self.size)
        self.held: dict[Request, Held] = {}
        self.preemptions = self.queried_tokens = self.hit_tokens = self.queued_tokens = 0
        self.scheduled = self.delivered = 0  # the last step that was scheduled, and the last whose output was taken
        self.seen = 0  # the last step whose output had been taken when the last one was scheduled
        self.reserves = flags.scheduler_reserve_full_isl and self.rules.reserves_whole_prompt
        self.seats = flags.max_num_seqs if flags.max_num_active_seqs is None else flags.max_num_active_seqs
        self.budget, self._threshold = flags.max_num_batched_tokens, flags.long_prefill_token_threshold
        self.capped = self._threshold > 0 or flags.long_prefill_token_threshold_adaptive
        self._ahead = flags.async_scheduling
        self._watermark = int(flags.watermark * flags.blocks) if self.rules.has_watermark else 0
        self._admissions = 0
        self._late: dict[int, list[Held]] = {}  # whose token of that step is still to be delivered; it decodes no more
        self._in_order = False  # what running requests compute is entered into the cache after all have their tokens

    def add(self, request: Request) -> None:
        """A request has come."""
        held = self.held[request] = Held(request)
        self._queue(held)
        if held.text:
            self.cache.count_text(held, 1)

    def could_go(self, request: Request, plan: Plan) -> bool:
        """Whether a newcomer might change the schedule while the steps of the plan under way go on."""
        if self.capped and (plan.work.prefill_tokens or self.waiting):
            return True  # the cap depends on how many there are
        if self.waiting and self.fcfs and not self.rules.skips_long_prompts:
            return False  # it stands behind a head that cannot go
        if len(self.running) >= self.seats:
            return False
        work = plan.work
        if work.decode_sequences + work.prefill_tokens >= self.budget:
            return False
        if self.reserves and not request.text:
            return -(-request.prompt_tokens // self.size) <= self.blocks.free
        return True

    def release(self, held: Held, *, finished: bool = False) -> None:
        """A request has ended, or its client has left."""
        del self.held[held.request]
        if held.state == WAITING:
            self.waiting.remove(held)
            self.queued_tokens -= held.prompt
            if held.parked is not None:
                held.parked.dead = True
        else:
            del self.running[held]
            entered = held.prompt + held.received(self.delivered) - 1 if finished else self._findable(held)
            computed = self._computed(held)
            self._stop(held)
            self.cache.give_back(held, computed, entered)
        held.state = OVER
        if held.text:
            self.cache.count_text(held, -1)

    def blocks_of(self, last: Step, steps: int) -> int:
        """How many blocks so many further steps of the shape of the last one take."""
        taken = self.decoders.blocks(self.scheduled + 1, steps)
        if len(self.prefilling) == 1 and last.chunks:
            _, tokens, before = last.chunks[-1]
            computed = before + tokens
            taken += -(-(computed + steps * tokens) // self.size) - -(-computed // self.size)
        return taken

    def fitting(self, last: Step, steps: int) -> int:
        """How many further steps of the last one's shape, `steps` at most, the free blocks are enough for."""
        free = self.blocks.free
        if not self.prefilling:
            return self.decoders.fitting(self.scheduled + 1, steps, free)
        while steps and self.blocks_of(last, steps) > free:
            steps -= 1  # few: a prompt has few chunks
        return steps

    def pass_by(self, last: Step, steps: int) -> None:
        """Let steps pass that change nothing but numbers: as many are scheduled as are delivered."""
        self.blocks.take(self.blocks_of(last, steps))
        for held, tokens, _ in last.chunks:
            held.computed += steps * tokens
            if held.text and self.cache.enabled:
                self.cache.enter(held, held.computed)
        self.scheduled += steps
        self.delivered += steps
        self.seen = self.delivered

    def cap(self) -> int:
        """The most tokens of a request in the next step."""
        if not self.capped:
            return self.budget
        present = len(self.running) + len(self.waiting)
        if present == 1 and self.rules.spares_lone_prompt:
            return self.budget
        cap = self._threshold
        if self.flags.long_prefill_token_threshold_adaptive:
            cap = max(cap, self.budget // present)
        return cap or self.budget

    def schedule(self, decision: Decision | None = None, with_rows: bool = False) -> Step:
        """The next step (Scheduler.schedule), by a decision or by the rules."""
        number = self.scheduled + 1
        step, decoders, cap = Step(number), self.decoders, self.cap()
        if self._ahead:
            for held in decoders.ends.get(self.scheduled, ()):
                if held.allowed == held.limit:  # the scheduler knows that it is to end
                    decoders.stop(held)
                    held.state = STOPPED
        self._in_order = self.cache.shared > 0 and self.cache.enabled
        starved: list[Held] = []
        if decision is not None:
            for request in decision.preempted:
                self._preempt(self.held[request], step)
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
                budget -= self._admit(self.held[request], step, cap, max(budget, 1), forced=True)
        elif self.waiting and not step.preempted:
            self._admit_waiting(step, budget, cap)
        if with_rows:
            step.rows = self._rows(step, starved)
        self.scheduled, self.seen = number, self.delivered
        for held in starved:
            self._defer(held)
        for held in step.sampling:
            self._join(held, number)
        return step

    def foreseen(self) -> Decision:
        """What the rules decide for the next step, found without changing anything."""
        most = self.decoders.count + self.budget // self.size + len(self.prefilling)  # blocks that a step takes
        if (not self.waiting or len(self.running) >= self.seats) and most <= self.blocks.free:
            return Decision()
        copy = deepcopy(self, {id(same): same for same in (self.flags, self.rules, *self.held)})
        step = copy.schedule()
        return Decision(step.admitted, step.preempted)

    def process(self, step: Step) -> Outcome:
        """Deliver the tokens that a step sampled, and end what is over."""
        self.delivered = number = step.number
        first, resumed = [], []
        ended = self.decoders.ends.pop(number, None) or []
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
            self.release(held, finished=True)
        if len(resumed) > 1:
            resumed.sort(key=_number)
        return Outcome(1, first, [held.request for held in resumed], [held.request for held in ended])

    def _queue(self, held: Held) -> None:
        self.queued_tokens += held.prompt
        if isinstance(self.waiting, list):
            insort(self.waiting, held, key=_urgency)
        else:
            self.waiting.append(held)

    def _stop(self, held: Held) -> None:
        """A running request is not computed any more."""
        if held.state == PREFILLING:
            del self.prefilling[held]
            return
        if held.state == DECODING:
            self.decoders.stop(held)
        if held.text:
            self.cache.count_open(held, -1)
        if held.last > self.delivered:
            self.decoders.forget_end(held)

    def _computed(self, held: Held) -> int:
        """The tokens of a running request that are computed, or scheduled to be."""
        if held.state == PREFILLING:
            return held.computed
        return held.line + (self.scheduled if held.state == DECODING else held.last)

    def _findable(self, held: Held) -> int:
        """How many tokens of a running request can be found in the cache, as far as they fill blocks."""
        if held.state == PREFILLING:
            return held.computed
        if held.state == DECODING:
            return min(held.line + self.scheduled, held.prompt + held.received(self.seen))
        return held.prompt + held.received(min(self.seen, held.last - 2))

    def _continue(self, step: Step, cap: int, starved: list[Held], *, forced: bool) -> int:
        """Give running requests their next tokens; what is left of the budget."""
        decoders, size = self.decoders, self.size
        budget = self.budget - decoders.count
        taken = decoders.blocks(step.number)
        if not self.prefilling:
            if budget >= 0 and (forced or taken <= self.blocks.free):
                self.blocks.take(taken)
                return budget
        elif len(self.prefilling) == 1:
            held = next(iter(self.prefilling))
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
        budget, size, blocks = self.budget, self.size, self.blocks
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
                victim = next(reversed(self.running)) if self.fcfs else max(self.running, key=_urgency_of_victim)
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
        if held.text and self.cache.enabled and not (self._in_order and held in self.prefilling):
            self.cache.enter(held, held.computed)
        if held.computed == held.prompt + held.base:
            self.prefilling.pop(held, None)
            step.sampling.append(held)
        else:
            self.prefilling[held] = None

    def _join(self, held: Held, start: int) -> None:
        """It gets a token with step number `start` and every one after it."""
        held.state, held.start = DECODING, start
        held.line = held.prompt + held.base - start
        left = held.limit - held.base
        held.last = start + left - 1 if left else start - 2  # none left: it is deferred, and its last is under way
        self.decoders.join(held)
        if held.text:
            self.cache.count_open(held, 1)

    def _defer(self, held: Held) -> None:
        """It decodes, and got nothing from the step that has just been scheduled."""
        if held.text:
            self.cache.count_open(held, -1)
        self._move_base(held, self.scheduled - 1)
        self._join(held, self.scheduled + 1)

    def _move_base(self, held: Held, last: int) -> None:
        """It gets no token after step number `last`; what was sampled and not delivered is still to come."""
        if last < held.start:
            return
        held.base += last - held.start + 1
        late = last - max(self.delivered, held.start - 1)
        if late:
            held.pending += late
            self._late.setdefault(last, []).append(held)

    def _preempt(self, held: Held, step: Step, given: int = 0) -> None:
        """Take a running request's blocks, also those for the tokens `given` in this very step."""
        findable, computed, state = self._findable(held), self._computed(held) + given, held.state
        if given:
            findable = min(computed, held.prompt + held.received(self.delivered))
        received = held.received(self.delivered)
        del self.running[held]
        self._stop(held)
        if state != PREFILLING:
            self._move_base(held, min(self.scheduled, held.last))
            if held.pending and not self.rules.delivers_to_preempted:
                held.base -= held.pending
                held.pending = 0
                self._late[min(self.scheduled, held.last)].remove(held)
        held.state, held.start, held.computed = WAITING, NEVER, 0
        self.cache.give_back(held, computed, findable)
        held.preemptions += 1
        held.resumed = received > 0
        self.preemptions += 1
        step.preempted.append(held.request)
        if isinstance(self.waiting, deque):
            self.waiting.appendleft(held)
            self.queued_tokens += held.prompt
        else:
            self._queue(held)

    def _admit_waiting(self, step: Step, budget: int, cap: int) -> None:
        """Admit waiting requests, until the first that cannot go."""
        at = 0
        while at < len(self.waiting) and budget > 0 and len(self.running) < self.seats:
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
        size, known, blocks = self.size, held.prompt + held.base, self.blocks
        hits: list[Run] = []
        number = idle = 0
        if held.parked is not None:
            number = idle = held.parked.blocks
        elif held.text and self.cache.enabled:
            hits = self.cache.hits(held, (known - 1) // size)
            number, idle = len(hits), blocks.idle(hits)
        cached = number * size
        tokens = min(known - cached, cap)
        if tokens > budget:
            if not forced and not self.flags.enable_chunked_prefill:
                return -1
            tokens = budget
        need = -(-(cached + tokens) // size) - number
        whole = -(-known // size) - number if self.reserves else need
        room = blocks.free - idle - (self._watermark if self.running else 0)
        if (whole if whole > need else need) > room and not forced:
            return 0
        if self.cache.enabled and not held.preemptions:  # as vllm/v1/metrics/stats.py:PrefixCacheStats counts
            self.queried_tokens += known
            self.hit_tokens += cached
        if self.waiting[0] is held and isinstance(self.waiting, deque):
            self.waiting.popleft()
        else:
            self.waiting.remove(held)
        self.queued_tokens -= held.prompt
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

    def _enter_in_order(self, number: int, starved: list[Held]) -> None:
        """Enter what running requests have computed in their order, where one decodes a text that another has, too."""
        for held in self.running:
            if held.text:
                if held.state == DECODING and held not in starved:
                    known = held.prompt + held.received(self.delivered)
                    self.cache.enter(held, min(held.line + number, known))
                else:
                    self.cache.enter(held, self._findable(held))

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


_number = attrgetter("number")


def _urgency(held: Held) -> tuple[int, float, str]:
    return held.request.priority, held.request.arrived, str(held.request.id)


def _urgency_of_victim(held: Held) -> tuple[int, float]:
    return held.request.priority, held.request.arrived
