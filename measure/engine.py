"""TGI's router and shard in real time: `sim`'s batcher, with a clock that really passes.

Every step takes what a calibration says and ends on time: the loop sleeps until shortly before, then polls, so that
requests that arrive meanwhile are let in as they come.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import msgspec

from measure.exposition import Exposition
from measure.lines import Lines
from sim.batcher import Batcher
from sim.request import Request
from sim.server import ServerConfig
from sim.steptime import StepTime

POLL_SECONDS = 0.002  # before a step's end: an event loop's timers are only good to a millisecond
LATE_SECONDS = 0.05  # a step this late means the machine stood still; the schedule goes on from now


class Job(Protocol):
    """A request's other half: where its tokens go. Times are `perf_counter` seconds."""

    request: Request
    name: int | str  # in the log
    selected: float  # when it was taken into a batch

    def token(self, last: bool) -> float:
        """Send the next token; returns when that was done."""


class Engine:
    """One server. `jobs` are those queued or running; `log` is a folder for `steps.jsonl`."""

    def __init__(self, config: ServerConfig, step_time: StepTime, exposition: Exposition, log: Path | None = None):
        self.batcher = Batcher(config)
        self.exposition = exposition
        self._step_time = step_time
        self._jobs: dict[Request, Job] = {}
        self._arrived = asyncio.Event()
        self._log = Lines(log / "steps.jsonl") if log is not None else None
        self._time = 0.0

    def submit(self, job: Job) -> None:
        """Append a job to the router's queue; the caller has checked that there is a permit."""
        self._jobs[job.request] = job
        self.batcher.accept(job.request)
        self.exposition.gauge("tgi_queue_size", len(self.batcher.queue))
        self._arrived.set()

    def leave(self, job: Job) -> None:
        """The job's client is gone, or has been told of an error."""
        if self._jobs.pop(job.request, None) is not None:
            self.batcher.leave(job.request)

    async def run(self) -> None:
        """The router's loop (`tgi-0.9.4.md` §3.2), for ever."""
        batcher, batch = self.batcher, self.batcher.batch
        while True:
            self.exposition.gauge("tgi_batch_current_size", 0)
            self.exposition.gauge("tgi_batch_current_max_tokens", 0)
            await self._arrived.wait()
            self._arrived.clear()
            self._time = self._now()
            while first := self._look():
                await self._prefill(first)
                while len(batch):
                    self.exposition.gauge("tgi_batch_current_size", len(batch))
                    self.exposition.gauge("tgi_batch_current_max_tokens", batch.used)
                    running = len(batch)
                    forced = batcher.wait_exceeded
                    if new := self._look():
                        reason = "wait_exceeded" if batcher.wait_exceeded > forced else "backpressure"
                        self.exposition.count("tgi_batch_concat", "reason", reason)
                        await self._prefill(new)
                    await self._decode(running)

    def _look(self) -> list[Request]:
        gone = self.batcher.gone
        new = self.batcher.look()
        for _ in range(gone - self.batcher.gone):
            self.exposition.count("tgi_request_failure", "err", "dropped")
        self.exposition.gauge("tgi_queue_size", len(self.batcher.queue))
        if new:
            self.exposition.observe("tgi_batch_next_size", len(new))
            for request in new:
                self._jobs[request].selected = self._time
        return new

    async def _prefill(self, new: list[Request]) -> None:
        lengths = [r.prompt_tokens for r in new]
        tokens, squares, longest = sum(lengths), sum(n * n for n in lengths), max(lengths)
        start = self._time
        end = start + self._step_time.prefill(len(new), tokens, squares, longest)
        await self._until(end)
        sent = self._deliver(new, {r for r in new if r.output_tokens <= 1})
        ended = self.batcher.prefilled(new)
        rest = [r for r in new if r.running]
        await self._filter(rest, len(ended), max((r.prompt_tokens for r in rest), default=0) + 1)
        self._account("prefill", start, end, sent, new, tokens, squares, longest, 0, len(ended))

    async def _decode(self, running: int) -> None:
        batch = self.batcher.batch
        members = list(batch.members)
        joined = len(members) - running if 0 < running < len(members) else 0
        context, longest = batch.context, batch.longest
        duration = self._step_time.decode(len(members), context, longest)[0]
        if joined:
            duration += self._step_time.concat(running, joined, longest)
        start = self._time
        end = start + duration
        await self._until(end)
        last = {r for r in members if r.last_step == batch.steps + 1}
        sent = self._deliver(members, last)
        ended = self.batcher.decoded(1)
        await self._filter(list(batch.members), len(ended), batch.longest)
        self._account("decode", start, end, sent, members, context, 0, longest, joined, len(ended))

    def _deliver(self, members: list[Request], last: set[Request]) -> float:
        """Send a token to everybody who is still there; a job may leave on being sent one (faults, broken pipes)."""
        sent = perf_counter()
        for request in members:
            job = self._jobs.get(request)
            if job is None:
                continue
            if request in last:
                del self._jobs[request]
            sent = job.token(request in last)
        return sent

    async def _filter(self, kept: list[Request], ended: int, longest: int) -> None:
        if kept and ended:
            await self._until(self._time + self._step_time.filter(len(kept), ended, longest))

    def _now(self) -> float:
        return perf_counter()

    async def _until(self, end: float) -> None:
        while (left := end - perf_counter()) > POLL_SECONDS:
            await asyncio.sleep(left - POLL_SECONDS)
        while (now := perf_counter()) < end:
            await asyncio.sleep(0)
        self._time = end if now - end < LATE_SECONDS else now

    def _account(
        self,
        kind: str,
        start: float,
        end: float,
        sent: float,
        members: list[Request],
        tokens: int,
        squares: int,
        longest: int,
        joined: int,
        ended: int,
    ) -> None:
        self.exposition.count("tgi_batch_inference_count", "method", kind)
        self.exposition.count("tgi_batch_inference_success", "method", kind)
        self.exposition.observe("tgi_batch_inference_duration", self._time - start, "method", kind)
        if self._log is None:
            return
        row: dict[str, Any] = {
            "start": start,
            "end": end,
            "sent": sent,
            "kind": kind,
            "count": 1,
            "sequences": len(members),
            "tokens": tokens,
            "prompt_sq": squares,
            "max_prompt": longest,
            "concat": joined,
            "filtered": ended,
            "members": [r.id for r in members],
        }
        self._log.write(msgspec.json.encode(row))
