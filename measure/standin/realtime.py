"""An engine in real time: the same schedulers that the simulator drives, with a clock that really passes.

Every step takes what a step-time model says and ends on time: the loop sleeps until shortly before, then polls, so
that requests that arrive meanwhile are let in as they come.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import msgspec

from measure.server.exposition import Exposition
from sim.engines.engine import Engine, Plan, Scheduled
from sim.model.files.json_lines import Lines
from sim.model.request import Request
from sim.steptime.linear import StepTime

POLL_SECONDS = 0.002  # before a step's end: an event loop's timers are only good to a millisecond
LATE_SECONDS = 0.05  # a step this late means the machine stood still; the schedule goes on from now


class Job(Protocol):
    """A request's other half: where its tokens go. Times are `perf_counter` seconds."""

    request: Request
    name: int | str  # in the log
    selected: float  # when it was taken into a batch

    def token(self, last: bool) -> float:
        """Send the next token; returns when that was done."""


class Server:
    """One server. It lets in `permits` requests at once; `log` is a folder for `steps.jsonl`."""

    def __init__(
        self, engine: Engine, step_time: StepTime, exposition: Exposition, permits: int, log: Path | None = None
    ):
        self.engine, self.exposition, self.permits = engine, exposition, permits
        self._step_time = step_time
        self._jobs: dict[Request, Job] = {}
        self._sent: dict[Request, int] = {}  # tokens of each job
        self._counted: dict[str, float] = {}
        self._arrived = asyncio.Event()
        self._log = Lines(log / "steps.jsonl") if log is not None else None
        self._scheduled: Scheduled | None = None
        if log is not None:
            engine.observer = self._observe
        self._time = 0.0

    @property
    def has_permit(self) -> bool:
        """Whether another request is let in."""
        return len(self._jobs) < self.permits

    def submit(self, job: Job) -> None:
        """Hand a job to the engine; the caller has checked that there is a permit and that the request is valid."""
        self._jobs[job.request], self._sent[job.request] = job, 0
        self.engine.submit(job.request)
        self.exposition.gauge("tgi_queue_size", self.engine.state().waiting)
        self._arrived.set()

    def leave(self, job: Job) -> None:
        """The job's client is gone, or has been told of an error."""
        if self._jobs.pop(job.request, None) is not None:
            del self._sent[job.request]
            self.engine.cancel(job.request)

    async def run(self) -> None:
        """Serve, for ever: plan, let one step pass, deliver its tokens."""
        engine = self.engine
        while True:
            plan = engine.plan()
            self._expose()
            if plan is None:
                self._arrived.clear()
                await self._arrived.wait()
                self._time = self._now()
                continue
            for request in plan.admitted:
                self._jobs[request].selected = self._time
            await self._step(plan)

    async def _step(self, plan: Plan) -> None:
        scheduled, start = self._scheduled, self._time
        end = start + self._step_time.line(plan.work, plan.growth, 1).first
        if plan.once is not None:
            end += self._step_time.line(plan.once).first
        await self._until(end)
        outcome = self.engine.commit(plan, 1)
        sent = perf_counter()
        ended = set(outcome.finished)
        for request in list(self._jobs):
            job = self._jobs.get(request)  # one may leave while another is sent a token (faults, broken pipes)
            if job is None:
                continue
            last = request in ended
            tokens = (request.output_tokens if last else self.engine.received(request, 0)) - self._sent[request]
            self._sent[request] += tokens
            if last:
                del self._jobs[request], self._sent[request]
            for i in range(tokens):
                sent = job.token(last and i == tokens - 1)
        if outcome.after is not None:
            await self._until(self._time + self._step_time.line(outcome.after).first)
        dropped = len(ended) if outcome.after is None else outcome.after.dropped
        self._account(plan, (start, end, sent), scheduled, dropped)

    def _now(self) -> float:
        return perf_counter()

    async def _until(self, end: float) -> None:
        while (left := end - perf_counter()) > POLL_SECONDS:
            await asyncio.sleep(left - POLL_SECONDS)
        while (now := perf_counter()) < end:
            await asyncio.sleep(0)
        self._time = end if now - end < LATE_SECONDS else now

    def _observe(self, scheduled: Scheduled) -> None:
        if scheduled.op != "filter":
            self._scheduled = scheduled

    def _expose(self) -> None:
        """What the engine says of itself, as the gauges and counters of its `/metrics`."""
        state = self.engine.state()
        self.exposition.gauge("tgi_queue_size", state.waiting)
        self.exposition.gauge("tgi_batch_current_size", state.running)
        self.exposition.gauge("tgi_batch_current_max_tokens", state.kv_used)
        for name, value in self.engine.counters().items():
            series, _, label = name.partition("{")
            key, _, of = label.rstrip("}").partition("=")
            for _ in range(int(value - self._counted.get(name, 0))):
                self.exposition.count(series, key, of.strip('"'))
            self._counted[name] = value

    def _account(
        self, plan: Plan, times: tuple[float, float, float], scheduled: Scheduled | None, dropped: int
    ) -> None:
        start, end, sent = times
        work, decode = plan.work, plan.work.decode_sequences > 0
        kind = "decode" if decode else "prefill"
        if not decode:
            self.exposition.observe("tgi_batch_next_size", work.prefill_sequences)
        self.exposition.count("tgi_batch_inference_count", "method", kind)
        self.exposition.count("tgi_batch_inference_success", "method", kind)
        self.exposition.observe("tgi_batch_inference_duration", self._time - start, "method", kind)
        if self._log is None:
            return
        assert scheduled is not None
        row: dict[str, Any] = {
            "start": start,
            "end": end,
            "sent": sent,
            "kind": kind,
            "count": 1,
            "sequences": work.decode_sequences + work.prefill_sequences,
            "tokens": work.decode_context if decode else work.prefill_tokens,
            "prompt_sq": 2 * work.prefill_attention - work.prefill_tokens,
            "max_prompt": work.decode_longest if decode else work.prefill_longest,
            "concat": plan.once.joined if plan.once is not None else 0,
            "filtered": dropped,
            "members": [r.request.id for r in scheduled.rows],
        }
        self._log.write(msgspec.json.encode(row))
