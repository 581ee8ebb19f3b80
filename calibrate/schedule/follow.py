"""An engine driven by the step ends that were observed: what every step computed, and where its rules were not obeyed.

The engine schedules as its rules say, from the requests as they were sent. Each of its steps that gives tokens is one
observed step end; steps that give none (chunks that end no prompt) lie in between, and the interval up to the next
observed end holds them too. Whether a request had arrived when a step was scheduled is known only within
`UNCERTAIN_ARRIVAL`; within it the first token decides. What remains, a request that the rules admit and that gets its
first token later, or the reverse, is a disagreement: the engine then goes on from what was observed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from calibrate.arrays import Floats
from calibrate.schedule.align import Alignment
from sim.engines.engine import Decision, Engine, Row, Scheduled
from sim.model.request import Request
from sim.steptime.work import StepWork

UNCERTAIN_ARRIVAL = 0.02  # s: a request sent less than this before a step's end may or may not have been queued
_NOTHING = 3  # steps in succession in which an engine computes nothing: an asynchronous one may have one
_AHEAD = 64  # steps that are tried out to learn when a prompt would be done


@dataclass
class Followed:
    """What was computed in each interval between two observed step ends.

    `works` are its passes and the work between them, in order; `idle`, whether the server had nothing to do before it;
    `doubtful`, whether tokens of its steps were seen at other ends. `decisions` counts requests admitted, held back and
    preempted, `disagreements` those of them against the rules, by what the rules said; `tokens` all tokens, and
    `misplaced` those that the engine gave at another step end. `waited` tells of the latency to the scheduler: how long
    before a step's begin a request that the rules would have admitted to it had been sent, s, and whether it was.
    """

    works: list[list[StepWork]] = field(default_factory=list)
    idle: list[bool] = field(default_factory=list)
    doubtful: list[bool] = field(default_factory=list)
    decisions: int = 0
    disagreements: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    misplaced: int = 0
    waited: list[tuple[float, bool]] = field(default_factory=list)

    @property
    def agreement(self) -> float:
        """The share of the decisions that are the rules'."""
        return 1.0 - sum(self.disagreements.values()) / max(1, self.decisions)


def follow(engine: Engine, requests: Sequence[Request], alignment: Alignment, left: Floats) -> Followed:
    """Drive `engine` through the observed steps.

    `requests` are those of the run, by row number as `id`, with the tokens that came back as `output_tokens`; `left`,
    (requests,), is when the client of one that did not end left, s, inf for the others.
    """
    return _Follower(engine, requests, alignment, left).followed()


class _Follower:
    def __init__(self, engine: Engine, requests: Sequence[Request], alignment: Alignment, left: Floats):
        self._engine, self._ends = engine, alignment.earliest.tolist()
        engine.decide, engine.observer = self._decide, self._observe
        cuts = np.searchsorted(alignment.request, np.arange(len(requests) + 1))
        self._steps = [alignment.step[a:b].tolist() for a, b in pairwise(cuts.tolist())]
        self._asked = self._in_order([r for r in requests if self._steps[r.id]])
        self._next = 0  # of these, the first that has not been submitted
        self._early: set[Request] = set()  # submitted before their turn
        self._waiting: dict[Request, None] = {}  # submitted or preempted, and not admitted
        self._left = deque(
            sorted((float(t), r) for r, t in enumerate(left.tolist()) if np.isfinite(t) and self._steps[r])
        )
        self._by_id = {r.id: r for r in requests}
        self._live: set[Request] = set()
        self._received = [0] * len(requests)
        self._scheduled: deque[Sequence[Row]] = deque()
        self._at, self._now = 0, -np.inf  # the next observed end, and when the step before it ended
        self._ending: Sequence[Request] = ()  # whom the step that ends just now gives a token
        self._said, self._doubtful = Followed(), False

    def _in_order(self, asked: list[Request]) -> list[Request]:
        """Requests in the order of arrival: as they were sent, but where first tokens tell otherwise within what is
        not known of their arrival (a short prompt is read sooner than a long one that was sent with it)."""
        latest = -np.inf
        for request in sorted(asked, key=lambda r: (self._steps[r.id][0], r.sent)):
            within = request.sent <= latest <= request.sent + UNCERTAIN_ARRIVAL
            request.arrived = latest if within else request.sent
            latest = max(latest, request.arrived)
        return sorted(asked, key=lambda r: (r.arrived, self._steps[r.id][0]))

    def followed(self) -> Followed:
        """See `follow`."""
        said, engine = self._said, self._engine
        works: list[StepWork] = []
        idle, nothing = False, 0
        while self._at < len(self._ends):
            self._submit()
            idle |= self._was_idle()
            plan = engine.plan()
            if plan is None:
                if not self._wake():
                    break
                works = []
                continue
            rows = self._scheduled.popleft() if self._scheduled else ()
            works += [work for work in (plan.once, plan.work) if work is not None and work != StepWork()]
            nothing = 0 if rows else nothing + 1
            if nothing > _NOTHING:  # by its flags, those who wait would wait for ever
                self._now = self._ends[self._at]
                self._skip_to(self._at + 1)
            got = [row.request for row in rows if self._gets_token(row)]
            if got:  # the step after the next may be scheduled when this one ends, so who has come by then is told
                self._now, self._ending = self._ends[self._at], got
                self._submit()
            outcome = engine.commit(plan, 1)
            self._ending = ()
            if self._ended(got):
                said.works.append(works)
                said.idle.append(idle)
                said.doubtful.append(self._doubtful)
                works, idle, self._doubtful = [], False, False
            if (after := outcome.after) is not None:
                works.append(after)
            for request in outcome.finished:
                self._live.discard(request)
                self._waiting.pop(request, None)  # preempted after its last token was computed
        self._skip_to(len(self._ends))
        said.tokens = sum(map(len, self._steps))
        return said

    def _observe(self, scheduled: Scheduled) -> None:
        if any(row.tokens for row in scheduled.rows):
            self._scheduled.append(scheduled.rows)

    def _gets_token(self, row: Row) -> bool:
        known = row.request.prompt_tokens + self._received[row.request.id]
        return row.computed + row.tokens >= known and self._received[row.request.id] < len(self._steps[row.request.id])

    def _expected(self, request: Request, pending: int = 0) -> int:
        """The observed end of a request's next token after `pending` others; one beyond all where none comes."""
        steps, received = self._steps[request.id], self._received[request.id] + pending
        return steps[received] if received < len(steps) else len(self._ends)

    def _ended(self, got: Sequence[Request]) -> bool:
        """A step has ended that gave tokens to these; whether it is one that was observed."""
        if not got:
            return False
        expected = [self._expected(request) for request in got]
        for request in got:
            self._received[request.id] += 1
        here = max(set(expected), key=lambda e: (expected.count(e), -e))
        misplaced = sum(e != here for e in expected)
        self._said.misplaced += misplaced
        self._doubtful |= misplaced > 0 or here != self._at
        if here < self._at:  # the engine is behind what was observed
            return False
        self._skip_to(here)  # no request that the engine holds had a token then
        self._now = self._ends[self._at]
        self._at += 1
        return True

    def _skip_to(self, end: int) -> None:
        """Leave the observed ends up to this one without work."""
        skipped = end - self._at
        self._said.works += [[]] * skipped
        self._said.idle += [True] * skipped
        self._said.doubtful += [True] * skipped
        self._at = end

    def _was_idle(self) -> bool:
        """Whether nothing runs, and no request is known to have been waiting when the last step ended."""
        known = self._now - UNCERTAIN_ARRIVAL
        return not self._engine.state().running and all(r.sent >= known for r in self._waiting)

    # who has arrived

    def _submit(self) -> None:
        """Submit those who have arrived for certain, and those who may have if their first token comes now."""
        now, asked = self._now, self._asked
        while self._left and self._left[0][0] <= now:
            request = self._by_id[self._left.popleft()[1]]
            if request in self._live:
                self._live.discard(request)
                self._waiting.pop(request, None)
                self._engine.cancel(request)
        while self._next < len(asked) and asked[self._next].arrived <= now:
            request = asked[self._next]
            self._next += 1
            if request in self._early:
                self._early.discard(request)
            else:
                self._enter(request)
        target = self._target()
        for i in range(self._next, len(asked)):
            request = asked[i]
            if request.arrived > now + UNCERTAIN_ARRIVAL:
                break
            if request not in self._early and self._steps[request.id][0] <= target:
                self._early.add(request)
                self._enter(request)

    def _enter(self, request: Request) -> None:
        if self._engine.submit(request) is None:
            self._live.add(request)
            self._waiting[request] = None

    def _wake(self) -> bool:
        """The server has nothing to do: the next request comes, and those who share its prefill. Whether one does."""
        asked = self._asked
        while self._next < len(asked) and asked[self._next] in self._early:
            self._next += 1
        if self._next >= len(asked):
            return False
        request = asked[self._next]
        self._next += 1
        self._now = max(self._now, request.arrived)
        self._enter(request)
        return True

    # what was decided

    def _target(self) -> int:
        """The observed end of the step that is scheduled next, if it gives tokens."""
        ahead = sum(any(self._gets_token(row) for row in rows) for rows in self._scheduled)
        return self._at + bool(self._ending) + ahead

    def _decide(self, rules: Decision) -> Decision:
        said, target = self._said, self._target()
        pending = Counter(self._ending)  # tokens that steps scheduled before will give
        pending.update(row.request for rows in self._scheduled for row in rows if self._gets_token(row))
        due = [r for r in self._waiting if self._expected(r, pending[r]) <= target]
        resumed = [r for r in rules.preempted if self._expected(r, pending[r]) <= target]  # they were not preempted
        if not rules.admitted and not due and not rules.preempted:
            return rules
        said.decisions += len(rules.admitted) + len(rules.preempted)
        preempted = [r for r in rules.preempted if r not in resumed]
        if resumed:
            said.disagreements["preempted"] += len(resumed)
        late = [r for r in rules.admitted if self._received[r.id] == 0 and self._expected(r) > target]
        held = self._too_early(late, target) if late else set()
        if not self._was_idle():
            said.waited += [(self._now - r.sent, r not in held) for r in rules.admitted if self._received[r.id] == 0]
        for request in held:
            if self._now - request.sent > UNCERTAIN_ARRIVAL:
                said.disagreements["admitted"] += 1
        forced = [r for r in due if r not in rules.admitted]
        for request in forced:
            said.decisions += 1
            if abs(self._now - request.sent) > UNCERTAIN_ARRIVAL:
                said.disagreements["held back"] += 1
        admitted = [*(r for r in rules.admitted if r not in held), *forced]
        for request in admitted:
            self._waiting.pop(request, None)
        self._waiting |= dict.fromkeys(preempted)
        return Decision(admitted, preempted)

    def _too_early(self, late: Collection[Request], target: int) -> set[Request]:
        """Which of those whom the rules admit now would have their first token before it was seen."""
        seen: deque[Sequence[Row]] = deque()
        memo = {id(r): r for r in self._live}
        engine, received = self._engine, self._received
        engine.decide = engine.observer = None
        trial = deepcopy(engine, memo)
        engine.decide, engine.observer = self._decide, self._observe
        trial.observer = lambda scheduled: seen.append(scheduled.rows) if scheduled.rows else None
        waiting, early = set(late), set[Request]()
        end = target
        for _ in range(_AHEAD):
            plan = trial.plan()
            if plan is None or not waiting:
                break
            trial.commit(plan, 1)
            while seen:
                gave = False
                for row in seen.popleft():
                    request = row.request
                    if request in waiting and row.computed + row.tokens >= request.prompt_tokens:
                        waiting.discard(request)
                        if self._expected(request) > end:
                            early.add(request)
                    gave |= row.computed + row.tokens >= request.prompt_tokens + received[request.id]
                end += gave
        return early
