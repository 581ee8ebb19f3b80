"""Recorded schedules of the real vLLM engine core, and how the engine departs from one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from reference_vllm import Job, Reference
from schedule import BadSchedules, lines_of

from sim.cluster.clock import Clock
from sim.cluster.replica import Replica
from sim.engines.engine import Scheduled
from sim.engines.vllm_v1 import Engine, Flags
from sim.model.request import Request
from sim.steptime.linear import Line
from sim.steptime.work import NOTHING, StepWork


class CostModel(msgspec.Struct, frozen=True):
    """A step takes base + floor(tokens / den) + floor(requests / den2) ticks; an empty one takes none."""

    base: int
    den: int
    den2: int

    def ticks(self, rows: list[list[int]]) -> int:
        if not rows:
            return 0
        return self.base + sum(row[1] for row in rows) // self.den + len(rows) // self.den2


class Arrival(msgspec.Struct, frozen=True):
    """One request as it was sent, and when its client left."""

    uid: int
    t: int
    prompt_tokens: int
    max_new_tokens: int
    actual_new_tokens: int
    priority: int = 0
    client_drop_t: int | None = None
    prefix_group: int | str | None = None
    prefix_len: int | None = None
    segments: tuple[tuple[int, str], ...] = ()  # not in recorded files: the whole text, as `Request.text` has it


class RecordedStep(msgspec.Struct, frozen=True):
    """A step in the order of `schedule()`; rows are uid, tokens, is_prefill, tokens computed before."""

    ts: int
    batch: list[list[int]]
    preempted: list[int]
    free: int
    running: int
    waiting: int
    t0: int | None = None
    t1: int | None = None
    free_after: int | None = None


class Fate(msgspec.Struct, frozen=True):
    """What became of a request; times in ticks."""

    token_times: list[int]
    finish: str
    preemptions: int


class Recording(msgspec.Struct, frozen=True):
    """One recorded run of the engine core."""

    name: str
    config: dict[str, Any]
    cost_model: CostModel
    arrivals: list[Arrival]
    steps: list[RecordedStep]
    requests: dict[int, Fate]

    @property
    def flags(self) -> Flags:
        own = {k: v for k, v in self.config.items() if k not in ("engine", "policy")}
        return Flags(**own, scheduling_policy=self.config["policy"])


def is_of_vllm(path: Path) -> bool:
    """Whether the first line of a file is a recording of vLLM's engine core."""
    _, line = next(lines_of(path), (0, b""))
    return b'"engine":"vllm"' in line.replace(b'": "', b'":"')


def read_recordings(path: Path) -> list[Recording]:
    """The recordings of a file, plain or `.gz`; `BadSchedules` says in one line what is wrong with it."""
    recordings = []
    for number, line in lines_of(path):
        try:
            recordings.append(msgspec.json.decode(line, type=Recording))
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise BadSchedules(f"{path}:{number}: not a recorded schedule ({e})") from e
    return recordings


class TickTime:
    """The recording's cost model, a `StepTime` in whole ticks."""

    def __init__(self, costs: CostModel):
        self.costs = costs

    def line(self, work: StepWork, growth: StepWork = NOTHING, steps: int = 1) -> Line:
        requests = work.prefill_sequences + work.decode_sequences
        tokens = work.prefill_tokens + work.decode_sequences
        costs = self.costs
        ticks = costs.base + tokens // costs.den + requests // costs.den2 if requests else 0
        return Line(float(ticks), 0.0, steps)


def request_of(a: Arrival) -> Request:
    request = Request(a.uid, a.prompt_tokens, a.actual_new_tokens, a.max_new_tokens)
    request.priority, request.arrived = a.priority, a.t
    if a.prefix_group is not None and a.prefix_len:
        request.text = ((a.prefix_len, ("group", a.prefix_group)), (0, a.uid))
    if a.segments:
        request.text = a.segments
    return request


def by_reference(recording: Recording) -> Recording:
    """The same arrivals, scheduled by `reference_vllm`, which shares no code with the engine."""
    jobs = []
    for a in recording.arrivals:
        segments = a.segments or (((a.prefix_len, ("group", a.prefix_group)),) if a.prefix_len else ())
        lengths = (a.prompt_tokens, a.max_new_tokens, a.actual_new_tokens)
        jobs.append(Job(a.uid, a.t, *lengths, priority=a.priority, leaves=a.client_drop_t, segments=segments))
    costs = recording.cost_model
    reference = Reference(recording.config, jobs, lambda n, rows: costs.base + n // costs.den + rows // costs.den2)
    reference.run()
    steps = [
        RecordedStep(
            ts=step.scheduled,
            batch=[[row.job.uid, row.tokens, int(row.is_prefill), row.before] for row in step.rows],
            preempted=[job.uid for job in step.preempted],
            free=step.free,
            running=step.running,
            waiting=step.waiting,
            t0=step.begin,
            t1=step.end,
            free_after=step.free_after,
        )
        for step in reference.steps
        if step.rows or step.preempted
    ]
    fates = {job.uid: Fate(job.token_times, job.finish, job.preemptions) for job in jobs}
    return msgspec.structs.replace(recording, steps=steps, requests=fates)


def simulated(recording: Recording) -> tuple[dict[int, Request], Replica]:
    """What the simulator makes of a recording's arrivals, many steps at a time: requests by uid, and the server."""
    clock = Clock()
    replica = Replica(clock, Engine(recording.flags), TickTime(recording.cost_model), lambda request: None)
    requests = {a.uid: request_of(a) for a in recording.arrivals}

    def leave(request: Request) -> None:
        if request.status is None:
            replica.cancel(request)

    def due(time: int, act: Callable[[Request], None], uid: int) -> None:
        callbacks = clock.at(time).callbacks
        assert callbacks is not None
        callbacks.append(lambda _: act(requests[uid]))

    leaving = [(a.client_drop_t, a) for a in recording.arrivals if a.client_drop_t is not None]
    for time, a in leaving:
        if time > a.t:
            due(time, leave, a.uid)
    for a in recording.arrivals:
        due(a.t, replica.submit, a.uid)
    for time, a in leaving:
        if time == a.t:
            due(time, leave, a.uid)
    clock.run()
    return requests, replica


class Replayed:
    """The engine over a recording's arrivals, in ticks, one step at a time."""

    def __init__(self, recording: Recording):
        self.recording, self.engine = recording, Engine(recording.flags)
        self.engine.observer = self._observe
        self.steps: list[dict[str, Any]] = []
        self.requests = {a.uid: request_of(a) for a in recording.arrivals}
        self.times: dict[int, list[int]] = {uid: [] for uid in self.requests}
        self.finish: dict[int, str] = {}
        self.now = 0
        due = [(a.t, 1, a.uid) for a in recording.arrivals]
        # who leaves at the very tick at which it comes has come first
        due += [
            (a.client_drop_t, 0 if a.t < a.client_drop_t else 2, a.uid)
            for a in recording.arrivals
            if a.client_drop_t is not None
        ]
        self._due = sorted(due)
        self._queue: list[dict[str, Any]] = []  # steps that have not begun
        self._run()

    def _observe(self, scheduled: Scheduled) -> None:
        rows = [[row.request.id, row.tokens, int(row.is_prefill), row.computed] for row in scheduled.rows]
        free = self.engine.scheduler.blocks.free
        step = {
            "ts": self.now,
            "batch": rows,
            "preempted": [r.id for r in scheduled.preempted],
            "free": free,
            "running": scheduled.state.running,
            "waiting": scheduled.state.waiting,
        }
        self._queue.append(step)
        if rows or step["preempted"]:
            self.steps.append(step)

    def _until(self, time: int) -> None:
        while self._due and self._due[0][0] <= time:
            _, comes, uid = self._due.pop(0)
            if comes == 1:
                self.engine.submit(self.requests[uid])
            elif uid not in self.finish:
                self.engine.cancel(self.requests[uid])
                self.finish[uid] = "abort"

    def _run(self) -> None:
        engine = self.engine
        while True:
            plan = engine.plan()
            if plan is None:
                if not self._due:
                    return
                self.now = self._due[0][0]
                self._until(self.now)
                continue
            step = self._queue.pop(0)
            step["work"] = plan.work
            before = {uid: engine.received(r, 0) for uid, r in self.requests.items()}
            end = self.now + self.recording.cost_model.ticks(step["batch"])
            if step["batch"]:
                step |= {"t0": self.now, "t1": end}
            self._until(end)
            self.now = end
            outcome = engine.commit(plan, 1)
            ended = {r.id for r in outcome.finished}
            for uid in dict.fromkeys(row[0] for row in step["batch"]):
                if engine.received(self.requests[uid], 0) > before[uid] or uid in ended:
                    self.times[uid].append(end)
            for uid in ended:
                a = next(a for a in self.recording.arrivals if a.uid == uid)
                stopped = len(self.times[uid]) == a.actual_new_tokens < a.max_new_tokens
                self.finish[uid] = "stop" if stopped else "length"
            if step["batch"]:
                step["free_after"] = engine.free_after


def differences(recording: Recording) -> list[str]:
    """Where the engine departs from the recording, first things first; empty when it is the same."""
    mine = Replayed(recording)
    found = []
    for i, (ours, real) in enumerate(zip(mine.steps, recording.steps, strict=False)):
        for key in ("ts", "batch", "preempted", "free", "running", "waiting", "t0", "t1", "free_after"):
            if ours.get(key) != getattr(real, key):
                found.append(f"step {i}: {key} {ours.get(key)}, recorded {getattr(real, key)}")
    if len(mine.steps) != len(recording.steps):
        found.append(f"{len(mine.steps)} steps, recorded {len(recording.steps)}")
    for uid, fate in recording.requests.items():
        if mine.times[uid] != fate.token_times:
            found.append(f"request {uid}: tokens at {mine.times[uid][-3:]}, recorded {fate.token_times[-3:]}")
        if mine.finish.get(uid) != fate.finish:
            found.append(f"request {uid}: ends by {mine.finish.get(uid)}, recorded {fate.finish}")
    return found
