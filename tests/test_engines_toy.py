"""A second engine is one module: static batching, in thirty lines, on the clock that runs every engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from sim.cluster.clock import Clock
from sim.cluster.replica import Replica
from sim.engines.engine import Decision, Outcome, Plan, Scheduled, ServerState
from sim.model.request import Request
from sim.model.status import Status
from sim.steptime.linear import affine
from sim.steptime.work import NOTHING, StepWork


class Static:
    """Serves `size` requests at a time, all to the end of the longest, before it takes the next ones."""

    decide: Callable[[Decision], Decision] | None = None
    observer: Callable[[Scheduled], None] | None = None

    def __init__(self, size: int):
        self.size = size
        self.queue: list[Request] = []
        self.batch: dict[Request, int] = {}  # and the tokens received

    def submit(self, request: Request, done: int = 0) -> Status | None:
        self.queue.append(request)
        return None

    def cancel(self, request: Request, done: int = 0) -> None:
        self.queue.remove(request)

    def plan(self) -> Plan | None:
        if not self.batch:
            new, self.queue = self.queue[: self.size], self.queue[self.size :]
            if not new:
                return None
            self.batch = dict.fromkeys(new, 0)
            tokens = sum(r.prompt_tokens for r in new)
            return Plan(StepWork(passes=1, prefill_tokens=tokens, prefill_sequences=len(new)), admitted=new)
        contexts = [r.prompt_tokens + n for r, n in self.batch.items()]
        work = StepWork(passes=1, decode_sequences=len(contexts), decode_context=sum(contexts))
        steps = min(left for r, n in self.batch.items() if (left := r.output_tokens - n) > 0)
        return Plan(work, StepWork(decode_context=len(contexts)), steps)

    def valid_steps(self, plan: Plan, done: int) -> int:
        return plan.steps

    def commit(self, plan: Plan, steps: int) -> Outcome:
        before = dict(self.batch)
        self.batch = {r: n + steps for r, n in before.items()}
        finished = [r for r, n in before.items() if n < r.output_tokens <= self.batch[r]]
        if all(n >= r.output_tokens for r, n in self.batch.items()):
            self.batch = {}
        return Outcome(1, plan.admitted, (), finished)

    def received(self, request: Request, done: int) -> int:
        return min(self.batch.get(request, 0) + done, request.output_tokens) if request in self.batch else 0

    def state(self, done: int = 0) -> ServerState:
        return ServerState(len(self.queue), 0, len(self.batch), 0, 0)

    def counters(self, done: int = 0) -> Mapping[str, float]:
        return {}


def test_the_simulator_runs_an_engine_that_it_has_never_heard_of() -> None:
    clock, ended = Clock(), []
    step_time = affine(a0=1.0, a1=0.01, b0=0.5, b1=0.1, b2=0.001)
    replica = Replica(clock, Static(2), step_time, ended.append)
    requests = [Request(0, 100, 3, 3), Request(1, 100, 5, 5), Request(2, 50, 1, 1)]
    for r in requests:
        replica.submit(r)
    clock.run()
    prefill = 1.0 + 200 * 0.01
    decode = [0.5 + 2 * 0.1 + 0.001 * (202 + 2 * step) for step in range(4)]  # both, to the end of the longer one
    assert [r.id for r in ended] == [0, 1, 2]
    assert requests[0].first_token == pytest.approx(prefill)
    assert requests[0].last_token == pytest.approx(prefill + sum(decode[:2]))
    assert requests[1].last_token == pytest.approx(prefill + sum(decode))
    assert requests[2].last_token == pytest.approx(prefill + sum(decode) + 1.0 + 50 * 0.01)
    assert replica.step_table()["count"].tolist() == [1, 2, 2, 1]
    assert StepWork() == NOTHING
