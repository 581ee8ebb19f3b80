"""The engine core: what came, the steps that are scheduled ahead, and many steps of one shape as one plan.

After v1/engine/core.py: synchronously a step is scheduled when the one before it has ended; asynchronously one step
more is scheduled while a step runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from sim.engines.engine import Decision, Outcome, Plan, Scheduled, ServerState
from sim.engines.vllm_v1.flags import COUNTERS, Flags
from sim.engines.vllm_v1.held import NEVER, WAITING
from sim.engines.vllm_v1.scheduler import Scheduler
from sim.engines.vllm_v1.step import Step
from sim.model.request import Request
from sim.model.status import Status


class Engine:
    """One server's scheduler (see `engines.engine.Engine`). With an observer it goes one step at a time."""

    def __init__(self, flags: Flags):
        self.flags, self.scheduler = flags, Scheduler(flags)
        self.decide: Callable[[Decision], Decision] | None = None
        self.observer: Callable[[Scheduled], None] | None = None
        self.free_after = 0  # blocks free when the last step's output had been processed
        self._inbox: list[tuple[Request, bool, int]] = []  # whether it comes or is cancelled, and at which boundary
        self._steps: deque[Step] = deque()  # scheduled, the one under way first
        self._depth = 2 if flags.async_scheduling else 1

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
            if not self.scheduler.held:
                return None
            self._schedule_ahead()
        step = self._steps[0]
        return Plan(step.work(), step.growth(), self._steps_alike(), None, step.admitted, step.preempted)

    def valid_steps(self, plan: Plan, done: int) -> int:
        """See `engines.engine.Engine.valid_steps`; may say too early where only the cache keeps a newcomer out."""
        its = self.scheduler
        heeded = done + self._depth  # the boundary at which what comes now is scheduled
        if heeded >= plan.steps and self._depth == 1:
            return plan.steps
        valid = plan.steps
        for request, comes, boundary in self._inbox:
            if not comes:
                held = its.held.get(request)
                if held is None or held.state != WAITING:
                    valid = min(valid, boundary)
                elif its.capped or held is its.waiting[0]:
                    valid = min(valid, boundary + self._depth - 1)
            elif its.could_go(request, plan):
                valid = min(valid, boundary + self._depth - 1)
        return max(valid, done + 1)

    def commit(self, plan: Plan, steps: int) -> Outcome:
        """See `engines.engine.Engine.commit`."""
        if steps > self._depth:
            self.scheduler.pass_by(self._steps[-1], steps - self._depth)
            for step in self._steps:
                step.pass_by(steps - self._depth)
        if steps > 1 and self._depth > 1:
            self._boundary(steps - 1)  # brings nothing but the schedule of a step beyond the plan
        return self._boundary(steps)

    def _boundary(self, number: int) -> Outcome:
        """What happens where a step ends, `number` steps after the plan began."""
        its = self.scheduler
        inbox = self._inbox
        step = self._steps.popleft()
        if inbox:
            for request, comes, boundary in inbox:
                if not comes and boundary <= number and request in its.held:
                    its.release(its.held[request])
        outcome = its.process(step)
        self.free_after = its.blocks.free
        if self._depth > 1:
            if inbox:
                self._take(number)
            self._schedule_ahead()
        return outcome

    def received(self, request: Request, done: int) -> int:
        """See `engines.engine.Engine.received`."""
        its = self.scheduler
        held = its.held.get(request)
        if held is None:
            return 0
        return held.received(its.delivered + done) + (held.pending if done else 0)

    def state(self, done: int = 0) -> ServerState:
        """See `engines.engine.Engine.state`; tokens are those of whole blocks."""
        its = self.scheduler
        size, free = its.size, its.blocks.free
        if done:
            free -= its.blocks_of(self._steps[-1], done)
        used = its.usable - free
        return ServerState(len(its.waiting), its.queued_tokens, len(its.running), used * size, free * size)

    def counters(self, done: int = 0) -> Mapping[str, float]:
        """See `engines.engine.Engine.counters`."""
        its = self.scheduler
        return dict(zip(COUNTERS, (its.preemptions, its.queried_tokens, its.hit_tokens), strict=True))

    def _steps_alike(self) -> int:
        """How many steps, the one under way included, have its shape, and are known to be scheduled so."""
        its = self.scheduler
        first, last = self._steps[0], self._steps[-1]
        count, ahead = last.decoders, last.number - first.number
        if ahead < self._depth - 1 or its.cache.shared or self.observer is not None or self.decide is not None:
            return 1
        if last.preempted or first.sampling or last.sampling or first.decoders != count or its.decoders.count != count:
            return 1
        steps = NEVER
        if chunks := last.chunks:
            if len(chunks) > 1 or len(first.chunks) != 1:
                return 1
            held, tokens, before = chunks[0]
            if first.chunks[0][:2] != (held, tokens) or held not in its.prefilling:
                return 1
            if its.waiting and (its.capped or count + tokens < its.budget):
                return 1
            if ahead == 0 and last.admitted and count + tokens < its.budget and tokens < its.cap():
                return 1  # what others took of the budget is left to it from now on
            steps = 1 + ahead + (held.prompt + held.base - before - tokens - 1) // tokens
        elif first.chunks or last.admitted:
            return 1
        if its.decoders.ends:
            steps = min(steps, its.decoders.next_end - first.number + 1)
        further = steps - 1 - ahead
        if further <= 0:
            return max(steps, 1)
        return 1 + ahead + its.fitting(last, further)

    def _take(self, boundary: int) -> None:
        """Take what came before that boundary, in its order."""
        its = self.scheduler
        inbox = self._inbox
        self._inbox = [later for later in inbox if later[2] > boundary]
        for request, comes, at in inbox:
            if at > boundary:
                break
            if comes:
                its.add(request)
            elif request in its.held:
                its.release(its.held[request])

    def _schedule_ahead(self) -> None:
        its = self.scheduler
        while its.held and len(self._steps) < self._depth:
            decision = None if self.decide is None else self.decide(its.foreseen())
            step = its.schedule(decision, with_rows=self.observer is not None)
            if self.observer is not None:
                self.observer(Scheduled("step", step.rows, step.preempted, self.state()))
            self._steps.append(step)
            if not step.chunks and not step.decoders:  # no step after one with nothing to run before it has passed
                break
