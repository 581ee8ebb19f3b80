"""One server as a SimPy process: the clock, without policy.

Between two changes of the batch nothing can change but the clock, so a run of decode steps is one event. It ends at the
first of: a member's last token; the boundary at which the router would admit somebody; the boundary after an arrival
(or a departure) that makes it do so. The boundaries of a run are `run.end(k)`, computed forward, never accumulated.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Generator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from simpy import Event, Interrupt
from simpy.events import EventPriority

from sim.batcher import Batcher
from sim.clock import ROUTER, Clock
from sim.noise import Noise, NoisyDecodeRun
from sim.request import OK, OVERLOADED, VALIDATION, Request
from sim.server import ServerConfig
from sim.steps import DECODE, PREFILL, STEP_COLUMNS, Call
from sim.steptime import DecodeRun, StepTime


class Replica:
    """One server. `on_end(request)` is called when a request ends, at the server's instant, with its status set.

    `steps` rows have `STEP_COLUMNS`; with noise `step_ends` holds the ends of each decode row's steps. `on_call` hears
    of every call (a run of decode steps is one), at the end of its last step and before anybody is told of an end.
    Until `busy_until` the server does something else (what was asked of it before, a warm-up) and only queues.
    """

    def __init__(
        self,
        clock: Clock,
        config: ServerConfig,
        step_time: StepTime,
        on_end: Callable[[Request], None],
        noise: Noise | None = None,
        on_call: Callable[[Call], None] | None = None,
        busy_until: float = 0.0,
    ):
        self.clock, self.config, self.step_time, self.noise = clock, config, step_time, noise
        self.batcher = Batcher(config)
        self._tightest = min(config.max_batch_prefill_tokens, config.token_budget)
        self.on_end, self.on_call = on_end, on_call
        self.steps = array("d")
        self.step_ends: list[NDArray[np.float64]] = []
        self.number = 0  # steps so far, prefills included: what the noise is indexed by
        self._idle: Event | None = None
        self._run: DecodeRun | NoisyDecodeRun | None = None
        self._done = self._target = 0  # steps of the run that have been looked at; where the next look is due
        self._decoding = False
        self._process = clock.process(self._serve(busy_until))

    def submit(self, request: Request) -> None:
        """A request reaches the server now. It may end at once (429 before 422), else `on_end` says when.

        Raises `CannotFit` for one that the real server would keep for ever.
        """
        batcher = self.batcher
        if not batcher.has_permit():
            self._refuse(request, OVERLOADED)
        elif self.config.refuses(request.prompt_tokens, request.max_new_tokens):
            self._refuse(request, VALIDATION)
        else:
            if request.prompt_blocks + request.new_blocks > self._tightest:  # rare: look closely
                self.config.check_fits(request.prompt_tokens, request.max_new_tokens)
            request.queued = self.clock.now
            batcher.accept(request)
            self._changed()

    def leave(self, request: Request) -> None:
        """The request's client goes away now."""
        self.batcher.leave(request)
        if self._decoding and request.running:
            self._stop_at(self._next_boundary())
        else:
            self._changed()

    @property
    def running(self) -> int:
        """How many requests are in the batch."""
        return len(self.batcher.batch)

    def received(self, request: Request) -> int:
        """The tokens that the server has made by now for a request that has not ended."""
        if not request.running:
            return 0
        more = self._made() - self._done if self._decoding else 0
        return request.output_tokens - (request.last_step - self.batcher.batch.steps - more)

    def stop(self) -> None:
        """The simulation ends here: write down what has been made by now of the run of steps under way."""
        if self._decoding and (made := self._made()) > self._done:
            batch = self.batcher.batch
            self._tell(made)
            self._note(made, 0, len(batch), batch.context, batch.longest)

    def step_table(self) -> pd.DataFrame:
        """The steps so far, one row per run of equal steps, with `STEP_COLUMNS`."""
        rows = np.frombuffer(self.steps, dtype=np.float64).reshape(-1, len(STEP_COLUMNS))
        table = pd.DataFrame(rows.copy(), columns=list(STEP_COLUMNS))
        counts = ("kind", "count", "sequences", "tokens", "prompt_sq", "longest", "joined", "ended", "kept", "used")
        return table.astype(dict.fromkeys(counts, "int64"))

    def _refuse(self, request: Request, status: str) -> None:
        request.status = status
        request.last_token = self.clock.now
        self.on_end(request)

    def _changed(self) -> None:
        # the queue is not what it was when the next look was chosen
        if self._idle is not None:
            idle, self._idle = self._idle, None
            idle._ok, idle._value = True, None
            self.clock.schedule(idle, priority=EventPriority(ROUTER))
        elif self._decoding and not self.batcher.blocked:
            boundary = self._next_boundary()
            if boundary < self._target:
                more = self.batcher.steps_until_admission(boundary - self._done)
                if more is not None:
                    self._stop_at(self._done + more)

    def _next_boundary(self) -> int:
        assert self._run is not None
        return max(self._run.steps_by(self.clock.now), self._done + 1)  # the look at `_done` has been

    def _stop_at(self, step: int) -> None:
        if step < self._target:
            self._target = step
            self._process.interrupt()

    def _serve(self, busy_until: float) -> Generator[Event, Any, None]:
        batcher, batch = self.batcher, self.batcher.batch
        if busy_until > self.clock.now:
            yield self.clock.at(busy_until, ROUTER)
        while True:
            new = batcher.look()
            running = len(batch)
            if new:
                self._run = None
                yield from self._prefill(new)
                if not running:
                    continue  # the router looks once more before the first decode
                yield from self._decode(running)
            elif running:
                yield from self._decode(0)
            else:
                self._run = None
                self._idle = self.clock.event()
                yield self._idle

    def _prefill(self, new: list[Request]) -> Generator[Event, Any, None]:
        clock, batcher = self.clock, self.batcher
        tokens = sum(r.prompt_tokens for r in new)
        squares = sum(r.prompt_tokens * r.prompt_tokens for r in new)
        longest = max(r.prompt_tokens for r in new)
        start = clock.now
        took = self.step_time.prefill(len(new), tokens, squares, longest)
        if self.noise is not None:
            took *= self.noise.factor("prefill", self.number) * self.noise.prefill_drift(start)
        self.number += 1
        yield clock.at(start + took, ROUTER)
        now = clock.now
        ended = batcher.prefilled(new)
        kept = len(new) - len(ended)
        for r in new:
            if not r.gone:
                r.first_token = now
        self.steps.extend((PREFILL, start, now, 1, len(new), tokens, squares, longest))
        self.steps.extend((0, len(ended), kept, batcher.batch.used, took, 0.0, 0.0))
        if self.on_call is not None:
            self.on_call(Call("prefill", start, [now], new, batcher.batch.used))
        if ended:
            self._finish(ended)
            rest = [r for r in new if r.running]
            yield from self._filter(rest, len(ended), max((r.prompt_tokens for r in rest), default=0) + 1)

    def _decode(self, old: int) -> Generator[Event, Any, None]:
        """Decode until the router acts; `old` is the size of the running batch that a prefill just added to, or 0."""
        clock, batcher, batch = self.clock, self.batcher, self.batcher.batch
        if self._run is None:
            self._run = self._new_run(len(batch), old)
            self._done = 0
        state, before = (len(batch), batch.context, batch.longest), self._done
        end = before + (1 if batch.leaving else batch.steps_to_finish)
        look = batcher.steps_until_admission(1)  # the look before this step has been
        self._target = end if look is None else min(end, before + look)
        self._decoding = True
        while True:
            try:
                yield clock.at(self._run.end(self._target), ROUTER)
                break
            except Interrupt:  # something came that the router sees earlier; wait for that
                pass
        self._decoding = False
        self._tell(self._target)
        count = self._target - before
        ended = batcher.decoded(count)
        self._note(self._target, len(ended), *state)
        self._done = self._target
        self.number += count
        if ended:
            self._run = None
            self._finish(ended)
            yield from self._filter(batch.members, len(ended), batch.longest)

    def _tell(self, done: int) -> None:
        """Let `on_call` hear of the steps from the last look to `done`, as the shard answers: with those that end."""
        if self.on_call is not None:
            run, before, batch = self._run, self._done, self.batcher.batch
            assert run is not None
            ends = run.ends(done)[before:].tolist()
            self.on_call(Call("decode", run.end(before), ends, list(batch.members), batch.used))

    def _note(self, done: int, ended: int, size: int, context: int, longest: int) -> None:
        """Write a row of the steps from the last look to `done`, given the batch as it was before them."""
        run, before = self._run, self._done
        assert run is not None
        first, growth, extra = self._line
        joined = 0 if before else self._joined
        self.steps.extend((DECODE, run.end(before), run.end(done), done - before, size, context, 0, longest))
        self.steps.extend((joined, ended, size - ended, self.batcher.batch.used))
        self.steps.extend((first + growth * before, growth, extra if joined else 0.0))
        if self.noise is not None:
            self.step_ends.append(run.ends(done)[before:].copy())

    def _made(self) -> int:
        """How many steps of the run have been made by now."""
        assert self._run is not None
        by = self._run.steps_by(self.clock.now)
        return by if self._run.end(by) <= self.clock.now else by - 1

    def _new_run(self, size: int, old: int) -> DecodeRun | NoisyDecodeRun:
        batch = self.batcher.batch
        first, growth = self.step_time.decode(size, batch.context, batch.longest)
        self._joined = size - old if 0 < old < size else 0
        extra = self.step_time.concat(old, self._joined, batch.longest) if self._joined else 0.0
        self._line = first, growth, extra
        if self.noise is None:
            return DecodeRun(self.clock.now, first, growth, extra)
        steps = batch.steps_to_finish
        return NoisyDecodeRun(self.clock.now, first, growth, extra, steps, self.number, self.noise)

    def _finish(self, ended: list[Request]) -> None:
        now = self.clock.now
        for r in ended:
            if not r.gone:
                r.last_token = now
                r.status = OK
                self.on_end(r)

    def _filter(self, kept: Collection[Request], ended: int, longest: int) -> Generator[Event, Any, None]:
        if not kept:
            return
        start = self.clock.now
        took = self.step_time.filter(len(kept), ended, longest)
        if self.noise is not None:
            # what grows with the batch moves memory, as decoding does, and shares the next decode step's luck
            fixed = self.step_time.filter(0, ended, 0)
            took = fixed + (took - fixed) * self.noise.factor("decode", self.number)
            took *= self.noise.drift(start)[0]
        if took > 0.0:
            yield self.clock.at(start + took, ROUTER)
        if self.on_call is not None:
            self.on_call(Call("filter", start, [self.clock.now], list(kept), self.batcher.batch.used))
