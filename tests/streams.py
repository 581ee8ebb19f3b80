"""A simulated server seen through its clients' eyes: a run with token times, and the schedule that really made them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from sim.cluster.testbed import Bench
from sim.engines.engine import Row, Scheduled
from sim.engines.tgi_0_9_4 import Flags
from sim.model.calibration import Clocks, Delay
from sim.model.identity import Identity
from sim.model.machine import Machine
from sim.model.request import Request
from sim.model.scenario import Load, Scenario
from sim.model.server import EngineFlags
from sim.model.steps import Call
from sim.model.workload import Lengths, Sampler, Workload
from sim.run import Run, Rung
from sim.steptime.linear import step_time
from sim.steptime.noise_parameters import Noise

# A server of about a quarter of the article's step times: the kind that the recorded router-http runs have.
TRUTH = {
    "a0": 0.010, "a1": 1.279993e-4, "a2": 1.4e-9, "b0": 0.0163, "b1": 9e-5, "b2": 1e-7,
    "c0": 7e-4, "f0": 1.7e-3, "f1": 1e-5,
}  # fmt: skip
SERVER = Flags(
    max_batch_prefill_tokens=14000, max_batch_total_tokens=36000, max_input_length=3000, max_total_tokens=3600
)
VLLM = Identity(name="vllm", version="0.32.0", source="server")
TGI = Identity(name="tgi", version="0.9.4", source="server")
CLOCKS = Clocks(
    uplink=Delay(quantiles=[0.0015, 0.0018]),
    downlink=Delay(quantiles=[0.0, 1e-4, 2e-4]),
    turnaround=Delay(quantiles=[3e-4, 4e-4]),
    spacing=Delay(quantiles=[5e-4]),
)


@dataclass
class Seen:
    """`run` is what clients saw; `steps` are the true (kind, members), in order, members as rows of the run."""

    run: Run
    steps: list[tuple[str, frozenset[int]]] = field(default_factory=list)


def observe(
    users: Sequence[int],
    workload: Workload,
    *,
    seconds: float = 20.0,
    truth: dict[str, float] | None = None,
    server: EngineFlags = SERVER,
    noise: Noise | None = None,
    clocks: Clocks = CLOCKS,
    jitter: float = 0.0,
    seed: int = 0,
    model: str = "affine",
    after: float = 0.0,
) -> Seen:
    """Climb a ladder of `users`, `seconds` a rung; each token is seen up to `jitter` s late, in its stream's order.

    Tokens of steps that were still under way are not seen; who needs the last window whole asks for some s `after` it.
    """
    scenario = Scenario(name="seen", server=server, workload=workload, load=Load(users=list(users), spawn_rate=10.0))
    machine = Machine(step_time(model, truth or TRUTH), server, noise or Noise(), clocks)
    bench = Bench(scenario, machine, (seed,), Sampler(workload, seed))
    tokens: dict[Request, list[float]] = {}
    calls: list[tuple[str, list[Request]]] = []
    scheduled: deque[Sequence[Row]] = deque()

    def watch(call: Call) -> None:
        rows = scheduled.popleft()
        if call.op == "filter":
            return
        for end in call.ends:
            calls.append((call.op, list(call.members)))
            for row in rows:
                received = len(tokens.get(row.request, ()))
                if row.computed + row.tokens >= row.request.prompt_tokens + received or not row.is_prefill:
                    tokens.setdefault(row.request, []).append(end)

    bench.replicas[0].on_call = watch
    tell = bench.replicas[0].engine.observer
    assert tell is not None

    def observer(step: Scheduled) -> None:
        scheduled.append(step.rows)
        tell(step)

    bench.replicas[0].engine.observer = observer
    present, rungs = 0, []
    for there in users:
        start = float(bench.clock.now)
        for user in range(present, there):
            bench.clients.add_user(user)
            bench.clock.run(until=bench.clock.now + 0.1)
        present = there
        end = start + seconds
        bench.clock.run(until=end)
        rungs.append(Rung(start=start, ramped=start + 0.1, settled=start + seconds / 4, end=end, users=there))
    if after:
        bench.clock.run(until=bench.clock.now + after)
    rng = np.random.default_rng([seed, 7])
    order = sorted(tokens, key=lambda r: r.sent)
    row = {r: i for i, r in enumerate(order)}
    times = []
    for r in order:
        late = np.asarray(tokens[r]) + rng.uniform(0.0, jitter, len(tokens[r])) + rng.uniform(0.0, 1e-4, len(tokens[r]))
        times.append(np.maximum.accumulate(late))
    requests = pd.DataFrame(
        {
            "id": range(len(order)),
            "rung": [max(i for i, g in enumerate(rungs) if g.start <= r.sent) for r in order],
            "user": [r.user for r in order],
            "scheduled": [r.sent for r in order],
            "sent": [r.sent for r in order],
            "ended": [float(t[-1]) for t in times],
            "prompt_tokens": [r.prompt_tokens for r in order],
            "max_new_tokens": [r.max_new_tokens for r in order],
            "output_tokens": [len(t) for t in times],
            "first_token": [float(t[0]) for t in times],
            "last_token": [float(t[-1]) for t in times],
            "finish_reason": None,
            "status": ["ok" if len(t) == r.output_tokens else "aborted" for t, r in zip(times, order, strict=True)],
            "error": None,
        }
    )
    run = Run(
        "measured",
        "seen",
        scenario,
        rungs,
        requests,
        token_times=times,
        engine=TGI if isinstance(server, Flags) else VLLM,
    )
    return Seen(run, [(op, frozenset(row[r] for r in members if r in row)) for op, members in calls])


def lengths(prompt: int | tuple[int, int], output: int | tuple[int, int]) -> Workload:
    """A workload of fixed or uniformly distributed lengths."""

    def law(x: int | tuple[int, int]) -> int | Lengths:
        return x if isinstance(x, int) else Lengths(uniform=x)

    return Workload(prompt_tokens=law(prompt), output_tokens=law(output))


def questions(parameters: dict[str, float], model: str = "affine") -> np.ndarray:
    """A prefill of one prompt of 1,500; a decode step of one sequence at 550, of twenty at 1,500 each; s."""
    form = step_time(model, parameters)
    return np.array(
        [
            form.prefill(1, 1500, 1500**2, 1500),
            form.decode(1, 550, 550)[0],
            form.decode(20, 30000, 1500)[0],
        ]
    )
