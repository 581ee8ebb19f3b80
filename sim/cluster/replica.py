"""One server on the simulator's clock: it drives an engine, and has no policy of its own.

Between two decisions of the engine only the clock changes, so the steps of a plan are one event. It ends with the plan,
or at the boundary from which the engine could decide otherwise because a request arrived or was cancelled. Boundaries
are computed from the first step of a segment, never accumulated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import isnan
from struct import Struct

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.cluster.clock import ROUTER, Clock
from sim.engines.engine import Engine, Outcome, Plan, Scheduled, ServerState
from sim.model.request import Request
from sim.model.status import Status
from sim.model.steps import STEP_COLUMNS, Call
from sim.steptime.linear import Line, StepTime
from sim.steptime.noise import Noise
from sim.steptime.segment import NoisySegment, Segment
from sim.steptime.work import StepWork

_ROW = Struct(f"{len(STEP_COLUMNS)}d").pack
NOTHING_YET = Outcome()  # of steps that the end of a simulation cuts short


class Replica:
    """One server. `on_end(request)` is called when a request ends, at the server's instant, with its status set.

    `steps` rows have `STEP_COLUMNS`; with noise `step_ends` holds the ends of each decode row's steps. `on_call` gets
    every call (the steps of a plan are one), at the end of its last step and before `on_end`. Until `busy_until` the
    server is busy with earlier requests or a warm-up, and only queues. `index` is
    its own among the replicas of a fleet.
    """

    def __init__(
        self,
        clock: Clock,
        engine: Engine,
        step_time: StepTime,
        on_end: Callable[[Request], None],
        noise: Noise | None = None,
        on_call: Callable[[Call], None] | None = None,
        busy_until: float = 0.0,
        index: int = 0,
    ):
        self.clock, self.engine, self.step_time, self.noise = clock, engine, step_time, noise
        self.on_end, self.index = on_end, index
        self.steps = bytearray()  # rows of doubles: to pack them takes half the time of an array
        self.step_ends: list[NDArray[np.float64]] = []
        self.number = 0  # forward passes so far: what the noise is indexed by
        self._scheduled: deque[Scheduled] = deque()  # with `on_call`: what it has yet to get, the next first
        self.on_call = on_call
        self._state = engine.state()  # after the last commit
        self._idle = False  # waits for a request
        self._plan: Plan | None = None  # under way
        self._last: tuple[Plan, int] | None = None  # the plan before it, if it has just ended, and its steps
        self._segment: Segment | NoisySegment | None = None
        self._line, self._once = Line(0.0, 0.0, 1), 0.0
        self._before = self._target = 0  # steps of the segment before the plan; the step with which the plan is to end
        self._start, self._due = 0.0, 0.0  # when the plan under way began, and when it is to end, s
        clock.call(busy_until, self._serve, priority=ROUTER)

    @property
    def on_call(self) -> Callable[[Call], None] | None:
        """Who hears of every call."""
        return self._on_call

    @on_call.setter
    def on_call(self, hears: Callable[[Call], None] | None) -> None:
        self._on_call = hears
        self.engine.observer = self._scheduled.append if hears is not None else None

    def submit(self, request: Request) -> None:
        """A request reaches the engine now. It may end at once, else `on_end` says when.

        Raises `CannotFit` for one that the real server would keep for ever.
        """
        done = self._done()
        if isnan(request.arrived):  # no front end saw it
            request.arrived = self.clock.now
        refused = self.engine.submit(request, done)
        if refused is not None:
            self._end(request, refused)
            return
        request.queued = self.clock.now
        self._changed(done)

    def cancel(self, request: Request) -> None:
        """The request's client goes away now."""
        request.gone = True
        done = self._done()
        self.engine.cancel(request, done)
        self._changed(done)

    def received(self, request: Request) -> int:
        """The tokens that the server has made by now for a request that has not ended."""
        return self.engine.received(request, self._made())

    @property
    def running(self) -> int:
        """How many requests are in its batch."""
        return self._state.running

    def state(self) -> ServerState:
        """Its gauges now."""
        return self.engine.state(self._done())

    def stop(self) -> None:
        """The simulation ends here: write down what has been made by now of the steps under way."""
        if self._plan is not None and self._plan.work.decode_sequences and (made := self._made()) > 0:
            if self._on_call is not None:
                self._tell(self._plan, made)
            assert self._segment is not None
            start, end = (self._segment.end(self._before + steps) for steps in (0, made))
            self._note(self._plan, made, start, end)

    def restart(self, engine: Engine) -> None:
        """The server dies now, with all that it holds; it starts again with an `engine` that holds nothing."""
        self.stop()
        self._scheduled.clear()
        self.engine, self.on_call = engine, self._on_call
        self._state, self._plan, self._last, self._idle = engine.state(), None, None, True

    def step_table(self) -> pd.DataFrame:
        """The steps so far, one row per run of equal steps, with `STEP_COLUMNS`."""
        rows = np.frombuffer(self.steps, dtype=np.float64).reshape(-1, len(STEP_COLUMNS))
        columns = dict(zip(STEP_COLUMNS, rows.T, strict=True))  # `DataFrame.astype` takes five times as long
        seconds = ("start", "end", "first", "growth", "extra", "chunk_share")
        return pd.DataFrame({name: c if name in seconds else c.astype(np.int64) for name, c in columns.items()})

    def _end(self, request: Request, status: Status) -> None:
        request.status = status
        request.last_token = self.clock.now
        self.on_end(request)

    def _done(self) -> int:
        """How many steps of the plan under way ended strictly before now."""
        if self._plan is None or self._plan.steps <= 1:
            return 0
        assert self._segment is not None
        return max(self._segment.steps_by(self.clock.now) - 1 - self._before, 0)

    def _made(self) -> int:
        """How many steps of the plan under way have ended by now."""
        if self._plan is None:
            return 0
        assert self._segment is not None
        by = self._segment.steps_by(self.clock.now)
        return (by if self._segment.end(by) <= self.clock.now else by - 1) - self._before

    def _changed(self, done: int) -> None:
        # the engine holds other requests than when its plan was made
        if self._idle:
            self._idle = False
            self.clock.call(self.clock.now, self._serve, priority=ROUTER)
        elif self._plan is not None and done + 1 < self._target:
            valid = self.engine.valid_steps(self._plan, done)
            if valid < self._target:  # something came that the engine sees earlier
                assert self._segment is not None
                self._target = valid
                self._due = self._segment.end(self._before + valid)
                self.clock.call(self._due, self._ended, priority=ROUTER)

    def _serve(self, _: object = None) -> None:
        """Between two steps: have the engine make plans, until one ends after something else is due."""
        engine, clock = self.engine, self.clock
        while (plan := engine.plan()) is not None:
            for request, status in plan.refused:
                self._end(request, status)
            segment = self._begin(plan)
            self._plan, self._start = plan, clock.now
            self._due = end = segment.end(self._before + self._target)
            if not clock.skip(end):
                clock.call(end, self._ended, priority=ROUTER)
                return
            if not self._commit(plan):
                return
        self._last = None
        self._idle = True

    def _ended(self, _: object) -> None:
        """The steps under way have ended, unless somebody has come since and they are to end at another time."""
        if self._plan is not None and self.clock.now == self._due and self._commit(self._plan):
            self._serve()

    def _commit(self, plan: Plan) -> bool:
        """Tell the engine that the steps under way have ended, and the clients; whether the next plan is due now."""
        clock, steps = self.clock, self._target
        now, self._plan = clock.now, None
        if self._on_call is not None:
            self._tell(plan, steps)
        outcome = self.engine.commit(plan, steps)
        self._note(plan, steps, self._start, now, outcome)
        self._before += steps
        for r in outcome.first:
            r.first_token = now
        for r in outcome.finished:
            r.received = r.output_tokens
            self._end(r, Status.OK)
        if (after := outcome.after) is None:
            self._last = plan, steps
            return True
        self._last = None
        took = self._time_between(after)
        if took > 0.0 and not clock.skip(now + took):
            clock.call(now + took, self._worked, (now, self.engine), ROUTER)
            return False
        if self._on_call is not None:
            self._tell_of(now, [clock.now])
        return True

    def _worked(self, what: tuple[float, Engine]) -> None:
        """The work between two steps has ended: when it began, and whose it was."""
        start, engine = what
        if engine is not self.engine:  # which has died
            return
        if self._on_call is not None:
            self._tell_of(start, [self.clock.now])
        self._serve()

    def _begin(self, plan: Plan) -> Segment | NoisySegment:
        """Go on with the segment of the plan before, where the plan does, or begin a new one."""
        work, growth, steps, once = plan.work, plan.growth, plan.steps, plan.once
        self._target = steps
        if self._last is not None and once is None and not plan.admitted:
            last, done = self._last
            if growth == last.growth and work == last.work.after(done, last.growth):
                assert self._segment is not None
                self._segment.extend(self._before + steps)
                return self._segment
        self._line = line = self.step_time.line(work, growth, steps)
        self._once = extra = 0.0 if once is None else self.step_time.line(once).first
        self._before, now = 0, self.clock.now
        if self.noise is None:
            self._segment = Segment(now, line.first, line.growth, extra)
        else:
            kind = "decode" if work.decode_sequences else "prefill"
            self._segment = NoisySegment(now, line.first, line.growth, extra, steps, self.number, self.noise, kind)
        return self._segment

    def _time_between(self, work: StepWork) -> float:
        """How long the work between two steps takes, s."""
        took = self.step_time.line(work).first
        if self.noise is not None:
            # what grows with the batch moves memory, as decoding does, and shares the noise of the next decode step
            fixed = self.step_time.line(StepWork(joined=work.joined, dropped=work.dropped)).first
            took = fixed + (took - fixed) * self.noise.factor("decode", self.number)
            took *= self.noise.drift(self.clock.now)[0]
        return took

    def _tell(self, plan: Plan, steps: int) -> None:
        """Let `on_call` hear of the first steps of a plan, with those that end by them."""
        assert self._segment is not None
        start, ends = self._segment.end(self._before), self._segment.ends(self._before + steps, self._before)
        self._tell_of(start, ends.tolist())

    def _tell_of(self, start: float, ends: list[float]) -> None:
        assert self._on_call is not None
        scheduled = self._scheduled.popleft()
        self._on_call(Call(scheduled.op, start, ends, [row.request for row in scheduled.rows], self._state.kv_used))

    def _note(self, plan: Plan, steps: int, start: float, end: float, outcome: Outcome = NOTHING_YET) -> None:
        """Write what the first steps of a plan were, of which the engine has been told: one row, or without decodes one
        a step."""
        work, once = plan.work, plan.once
        self._state = state = self.engine.state()
        self.number += steps * work.passes
        if not work.passes:  # nothing to run
            return
        begun = len(outcome.first) + len(outcome.resumed)
        kept = begun - len(outcome.finished)
        if size := work.decode_sequences:
            kept = min(size + kept, state.running)
            before, line = self._before, self._line
            joined, extra = (0, 0.0) if once is None else (once.joined, self._once)
            ended, first = size + begun - kept, line.first + line.growth * before
            tokens, share = work.prefill_tokens, 0.0
            if tokens:
                alone = StepWork(1, 0, 0, 0, 0, size, work.decode_context, work.decode_longest)
                share = 1 - self.step_time.line(alone).first / first if first else 0.0
            # fmt: off
            self.steps += _ROW(
                start, end, steps, self.index,
                1, tokens, work.prefill_sequences, work.prefill_attention, work.prefill_longest,
                size, work.decode_context, work.decode_longest, joined, ended if kept else 0,
                ended, kept, state.kv_used, first, line.growth, extra, share, begun,
            )
            # fmt: on
            if self.noise is not None:
                assert self._segment is not None
                self.step_ends.append(self._segment.ends(before + steps, before))
        else:
            for r in outcome.first:
                if r.gone:
                    kept -= 1
            if steps > 1:
                start, work = self._note_chunks(work, plan.growth, steps, start)
            ended = begun - kept
            # fmt: off
            self.steps += _ROW(
                start, end, 1, self.index,
                1, work.prefill_tokens, work.prefill_sequences, work.prefill_attention, work.prefill_longest,
                0, 0, 0, 0, ended if kept else 0,
                ended, kept, state.kv_used, end - start, 0.0, 0.0, 0.0, begun,
            )
            # fmt: on

    def _note_chunks(self, work: StepWork, growth: StepWork, steps: int, start: float) -> tuple[float, StepWork]:
        """Write all but the last of these steps, each a row: chunks of equal size, of which each attends to more.
        Returns when the last begins, and what it computes."""
        assert self._segment is not None
        for end in self._segment.ends(self._before + steps - 1, self._before).tolist():
            # fmt: off
            self.steps += _ROW(
                start, end, 1, self.index,
                1, work.prefill_tokens, work.prefill_sequences, work.prefill_attention, work.prefill_longest,
                0, 0, 0, 0, 0,
                0, 0, self._state.kv_used, end - start, 0.0, 0.0, 0.0, 0,
            )
            # fmt: on
            start, work = end, work.after(1, growth)
        return start, work
