"""Recorded schedules of the real router (`docs/files.md`, Recorded schedules), and how the simulator departs from
one."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from sim.cluster.clock import Clock
from sim.cluster.frontend import FrontEnd
from sim.cluster.replica import Replica
from sim.engines import tgi_0_9_4
from sim.engines.tgi_0_9_4 import Engine
from sim.model.request import Request
from sim.model.steps import Call
from sim.steptime.linear import Line
from sim.steptime.work import NOTHING, StepWork


class BadSchedules(Exception):
    """A file that is not one of recorded schedules; the text is the one line that says why."""


class Flags(msgspec.Struct, frozen=True):
    """The router's flags as recorded."""

    max_concurrent_requests: int
    waiting_served_ratio: float
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int
    max_waiting_tokens: int
    requires_padding: bool
    block_size: int = tgi_0_9_4.BLOCK


class TickTime(msgspec.Struct, frozen=True):
    """The recorded run's cost model, a `StepTime` in whole ticks."""

    p0: int
    p_den: int
    d0: int
    d1: int
    filt: int
    concatenate: int = msgspec.field(name="concat")

    def line(self, work: StepWork, growth: StepWork = NOTHING, steps: int = 1) -> Line:
        ticks = 0
        if work.prefill_sequences:
            ticks += self.p0 + work.prefill_tokens // self.p_den
        if work.decode_sequences:
            ticks += self.d0 + work.decode_sequences // self.d1
        ticks += (self.concatenate if work.joined else 0) + (self.filt if work.dropped else 0)
        return Line(float(ticks), 0.0, steps)


class Arrival(msgspec.Struct, frozen=True):
    """One request as it was sent, and when its client left."""

    uid: int
    t: int
    input_length: int
    max_new_tokens: int
    actual_new_tokens: int
    client_drop_t: int | None = None


class RecordedCall(msgspec.Struct, frozen=True):
    """One call of the shard; `next_max_tokens` is the use it reports for the batch it keeps, null when none is left."""

    op: str
    t1: int
    uids: list[int] = []
    t0: int | None = None  # a filter has only its end
    next_max_tokens: int | None = None


class Fate(msgspec.Struct, frozen=True):
    """What became of a request; times in ticks."""

    outcome: str
    queued: int | None = None
    token_times: list[int] = []


class RouterRun(msgspec.Struct, frozen=True):
    """One recorded run of the router."""

    config: Flags
    cost_model: TickTime
    arrivals: list[Arrival]
    calls: list[RecordedCall]
    requests: dict[int, Fate]
    name: str = "unnamed"


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a file, plain or `.gz`, that are not blank; `BadSchedules` where it cannot be read."""
    try:
        raw = path.read_bytes()
        lines = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).splitlines()
    except (OSError, EOFError, zlib.error) as e:
        raise BadSchedules(f"{path}: cannot be read ({e}); expected recorded schedules, JSON lines") from e
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def read_router_runs(path: Path) -> list[RouterRun]:
    """The recorded runs of a file, plain or `.gz`; `BadSchedules` says in one line what is wrong with it."""
    router_runs = []
    for number, line in lines_of(path):
        try:
            router_runs.append(msgspec.json.decode(line, type=RouterRun))
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise BadSchedules(f"{path}:{number}: not a recorded schedule ({e})") from e
        if router_runs[-1].config.block_size != tgi_0_9_4.BLOCK:
            raise BadSchedules(f"{path}:{number}: config.block_size: expected {tgi_0_9_4.BLOCK}, the constant of 0.9.4")
    if not router_runs:
        raise BadSchedules(f"{path}: no recorded schedules in it; expected JSON lines")
    return router_runs


def replay(router_run: RouterRun) -> tuple[list[RecordedCall], dict[int, Fate]]:
    """The calls the simulated router makes, one per step, and what becomes of each request."""
    calls: list[RecordedCall] = []
    requests = {
        a.uid: Request(a.uid, a.input_length, a.actual_new_tokens, a.max_new_tokens) for a in router_run.arrivals
    }
    tokens: dict[int, list[int]] = {uid: [] for uid in requests}
    outcome: dict[int, str] = {}

    def record(call: Call) -> None:
        uids = [r.id for r in call.members]
        last = len(call.ends) - 1
        start = call.start
        # of a prefill, and of the filter after it, the shard reports the new batch alone, which we do not keep apart
        alone = call.op == "prefill" or (call.op == "filter" and calls[-1].op == "prefill")
        for step, end in enumerate(call.ends):
            t0 = None if call.op == "filter" else int(start)
            calls.append(RecordedCall(call.op, int(end), uids, t0, None if alone else call.used))
            start = end
            if call.op != "filter":
                for r in call.members:
                    if step < last or not r.gone:  # the run ends with the step in which somebody left
                        tokens[r.id].append(int(end))

    def leave(r: Request) -> None:
        if r.status is None and r.queued == r.queued:
            outcome[r.id] = "client_dropped"
            front.cancel(r)

    def ended(r: Request) -> None:
        outcome[r.id] = {"ok": "ok", "overloaded": "429"}[r.status]

    def due(time: int, act: Callable[[Request], None], request: Request) -> None:
        clock.at(time).callbacks.append(lambda _: act(request))

    clock = Clock()
    flags = {k: v for k, v in msgspec.structs.asdict(router_run.config).items() if k != "block_size"}
    config = tgi_0_9_4.Flags(**flags, max_input_length=10**9, max_total_tokens=2 * 10**9)
    front = FrontEnd(clock, ended, config.permits)
    front.replica = Replica(clock, Engine(config), router_run.cost_model, front.ended, on_call=record)
    # at one instant clients leave first, then requests arrive, then the router acts
    for a in router_run.arrivals:
        if a.client_drop_t is not None:
            due(a.client_drop_t, leave, requests[a.uid])
    for a in router_run.arrivals:
        due(a.t, front.submit, requests[a.uid])
    clock.run()
    fates = {
        uid: Fate(outcome.get(uid, "still there"), None if r.queued != r.queued else int(r.queued), tokens[uid])
        for uid, r in requests.items()
    }
    return calls, fates


def differences(router_run: RouterRun) -> list[str]:
    """Where the simulated schedule departs from the recorded one, first things first; empty when it is the same."""
    calls, fates = replay(router_run)
    recorded = [c for c in router_run.calls if c.op != "clear"]  # nothing is kept: no call of ours
    found = []
    for i, (mine, theirs) in enumerate(zip(calls, recorded, strict=False)):
        for key in ("op", "t0", "t1", "uids", "next_max_tokens"):
            ours, real = getattr(mine, key), getattr(theirs, key)
            if ours != real and not (key == "next_max_tokens" and (ours is None or real is None)):
                found.append(f"call {i}: {key} {ours}, recorded {real}")
    if len(calls) != len(recorded):
        found.append(f"{len(calls)} calls, recorded {len(recorded)}")
    for uid, real_fate in router_run.requests.items():
        for key in ("outcome", "queued", "token_times"):
            ours, real = getattr(fates[uid], key), getattr(real_fate, key)
            if ours != real and not (key == "queued" and real is None):
                found.append(f"request {uid}: {key} {ours}, recorded {real}")
    return found
