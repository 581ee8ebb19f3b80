"""The engine in real time makes the calls of the real 0.9.4 router: its clock replaced by ticks, nothing else."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
from schedule import RouterRun

from measure.standin.realtime import Server
from measure.standin.tgi.metrics import TgiMetrics
from sim.engines.tgi_0_9_4 import Engine, Flags
from sim.model.request import Request


class Ticket:
    """A request's other half, in ticks."""

    def __init__(self, request: Request, now: Callable[[], float]):
        self.request, self.name, self.selected = request, request.id, 0.0
        self.tokens: list[int] = []
        self._now = now

    def token(self, last: bool) -> float:
        self.tokens.append(int(self._now()))
        return self._now()


class Ticking(Server):
    """A server whose time is a number that jumps from one due thing to the next."""

    def follow(self, router_run: RouterRun) -> dict[int, Ticket]:
        """Live through a recorded run; returns the tickets by uid."""
        requests = {
            a.uid: Request(a.uid, a.input_length, a.actual_new_tokens, a.max_new_tokens) for a in router_run.arrivals
        }
        self.tickets = {uid: Ticket(r, lambda: self._time) for uid, r in requests.items()}
        self.refused: list[int] = []
        due = [(float(a.client_drop_t), 0, a.uid) for a in router_run.arrivals if a.client_drop_t is not None]
        due += [(float(a.t), 1, a.uid) for a in router_run.arrivals]
        self._due = deque(sorted(due, key=lambda event: event[:2]))  # clients leave first, then requests arrive
        asyncio.run(self._live())
        return self.tickets

    async def _live(self) -> None:
        loop = asyncio.create_task(self.run())
        while self._due:
            await asyncio.sleep(0)
            if not self._jobs:  # idle: nothing happens until the next thing is due
                self._pass(self._due[0][0])
        while self._jobs:
            await asyncio.sleep(0)
        loop.cancel()

    def _now(self) -> float:
        return self._time

    def _pass(self, until: float) -> None:
        while self._due and self._due[0][0] <= until:
            self._time, kind, uid = self._due.popleft()
            ticket = self.tickets[uid]
            if kind == 0:
                self.leave(ticket)
            elif self.has_permits():
                self.submit(ticket)
            else:
                self.refused.append(uid)
        self._time = until

    async def _until(self, end: float) -> None:
        self._pass(end)
        await asyncio.sleep(0)


def test_engine_schedule_of_the_real_router(router_run: RouterRun, tmp_path: Path) -> None:
    flags = {k: v for k, v in msgspec.structs.asdict(router_run.config).items() if k != "block_size"}
    config = Flags(**flags, max_input_length=10**9, max_total_tokens=2 * 10**9)
    metrics = TgiMetrics(1024, 2048)
    engine = Ticking(Engine(config), router_run.cost_model, metrics, config.max_concurrent_requests, tmp_path)
    tickets = engine.follow(router_run)
    rows = [msgspec.json.decode(line) for line in (tmp_path / "steps.jsonl").read_bytes().splitlines()]
    mine = [
        ("decode" if row["decode_sequences"] else "prefill", row["start"], row["end"], row["members"]) for row in rows
    ]
    recorded = [(c.op, c.t0, c.t1, c.uids) for c in router_run.calls if c.op in ("prefill", "decode")]
    assert mine == recorded
    for uid, fate in router_run.requests.items():
        assert (uid in engine.refused) == (fate.outcome == "429")
        assert tickets[uid].tokens == fate.token_times
    prefills = sum(op == "prefill" for op, *_ in recorded)
    assert f"tgi_batch_next_size_count {prefills}" in metrics.text()
