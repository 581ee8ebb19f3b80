"""An engine in real time: the schedulers that the simulator drives, with the clock of this machine.

Every step takes what a step-time model says and ends on time: the loop sleeps until shortly before, then polls, so
that requests that arrive meanwhile are taken as they come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import msgspec

from sim.engines.engine import Engine, Outcome, Plan, Scheduled
from sim.model.files.json_lines import Lines
from sim.model.request import Request
from sim.steptime.linear import StepTime

POLL_SECONDS = 0.002  # before a step's end: an event loop's timers are only good to a millisecond
LATE_SECONDS = 0.05  # a step later than this means that the machine stood still; the schedule then continues from now


class Job(Protocol):
    """A request being answered: where its tokens go. Times are `perf_counter` seconds."""

    request: Request
    name: int | str  # in the log
    selected: float  # when it was first admitted

    def token(self, last: bool) -> float:
        """Send the next token; returns when that was done."""


class Metrics(Protocol):
    """The server's own metrics, by its own names."""

    def refresh(self, engine: Engine) -> None:
        """Set gauges and the counters that the engine keeps."""

    def scheduled(self, scheduled: Scheduled) -> None:
        """A step was scheduled."""

    def step(self, plan: Plan, outcome: Outcome, delivered: Sequence[tuple[Request, int]], seconds: float) -> None:
        """A step ended after `seconds` and gave so many tokens to each request."""


class Server:
    """One engine in real time. It accepts `permits` requests at once (None: any number); `log` is a folder for
    `steps.jsonl`."""

    def __init__(
        self, engine: Engine, step_time: StepTime, metrics: Metrics, permits: int | None, log: Path | None = None
    ):
        self.engine, self.metrics, self.permits = engine, metrics, permits
        self._step_time = step_time
        self._jobs: dict[Request, Job] = {}
        self._sent: dict[Request, int] = {}  # tokens of each job
        self._arrived = asyncio.Event()
        self._log = Lines(log / "steps.jsonl") if log is not None else None
        self._scheduled: deque[Scheduled] = deque()  # the step under way first
        self._time = 0.0
        engine.observer = self._observe

    def has_permits(self, n: int = 1) -> bool:
        """Whether so many more requests are accepted."""
        return self.permits is None or len(self._jobs) + n <= self.permits

    def submit(self, job: Job) -> None:
        """Hand a job to the engine; the caller has checked that there is a permit and that the request is valid."""
        self._jobs[job.request], self._sent[job.request] = job, 0
        self.engine.submit(job.request)
        self.metrics.refresh(self.engine)
        self._arrived.set()

    def leave(self, job: Job) -> None:
        """The job's client has left, or has been told of an error."""
        if self._jobs.pop(job.request, None) is not None:
            del self._sent[job.request]
            self.engine.cancel(job.request)
            self._arrived.set()

    async def run(self) -> None:
        """Serve for ever: plan, let one step pass, deliver its tokens."""
        engine = self.engine
        while True:
            plan = engine.plan()
            self.metrics.refresh(engine)
            if plan is None:
                self._arrived.clear()
                await self._arrived.wait()
                self._time = self._now()
                continue
            for request in plan.admitted:
                if (job := self._jobs.get(request)) is not None:
                    job.selected = self._time
            await self._step(plan)

    async def _step(self, plan: Plan) -> None:
        scheduled, start = self._scheduled.popleft(), self._time
        end = start + self._step_time.line(plan.work, plan.growth, 1).first
        if plan.once is not None:
            end += self._step_time.line(plan.once).first
        await self._until(end)
        outcome = self.engine.commit(plan, 1)
        sent, delivered = self._deliver(set(outcome.finished))
        if outcome.after is not None:
            await self._until(self._time + self._step_time.line(outcome.after).first)
        self.metrics.step(plan, outcome, delivered, self._time - start)
        if self._log is not None:
            dropped = len(outcome.finished) if outcome.after is None else outcome.after.dropped
            self._log.write(msgspec.json.encode(_row(plan, (start, end, sent), scheduled, dropped)))

    def _deliver(self, finished: set[Request]) -> tuple[float, list[tuple[Request, int]]]:
        """Send every live request the tokens it has gained; when that was done, and how many each got."""
        sent, delivered = perf_counter(), []
        for request in list(self._jobs):
            job = self._jobs.get(request)  # one may leave while another is sent a token (faults, broken pipes)
            if job is None:
                continue
            last = request in finished
            tokens = (request.output_tokens if last else self.engine.received(request, 0)) - self._sent[request]
            self._sent[request] += tokens
            if last:
                del self._jobs[request], self._sent[request]
            if tokens:
                delivered.append((request, tokens))
            for i in range(tokens):
                sent = job.token(last and i == tokens - 1)
        return sent, delivered

    def _now(self) -> float:
        return perf_counter()

    async def _until(self, end: float) -> None:
        await asyncio.sleep(0)  # a step without work takes no time, and must not keep requests from arriving
        while (left := end - perf_counter()) > POLL_SECONDS:
            await asyncio.sleep(left - POLL_SECONDS)
        while (now := perf_counter()) < end:
            await asyncio.sleep(0)
        self._time = end if now - end < LATE_SECONDS else now

    def _observe(self, scheduled: Scheduled) -> None:
        if scheduled.op != "filter":
            self._scheduled.append(scheduled)
            self.metrics.scheduled(scheduled)


def _row(plan: Plan, times: tuple[float, float, float], scheduled: Scheduled, dropped: int) -> dict[str, Any]:
    """A line of `steps.jsonl`: what a step computed, when it began, ended and was sent, and for whom."""
    joined = plan.once.joined if plan.once is not None else 0
    line = msgspec.structs.asdict(plan.work) | {"joined": joined, "dropped": dropped}
    start, end, sent = times
    return line | {"start": start, "end": end, "sent": sent, "members": [r.request.id for r in scheduled.rows]}
