"""How fast the simulator is: requests per CPU second, metrics and turnaround on (`make bench`).

Every load is simulated through the front door (`sim.cluster.ladder.climb`, `sim.results.metrics.table`) in a process of
its own. The machine is a Llama-2-70B on four A100 in round figures; a user comes back some milliseconds after his
answer.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

from sim.cluster.ladder import climb
from sim.engines.tgi_0_9_4 import Flags
from sim.model.calibration import Clocks, Delay
from sim.model.machine import Machine
from sim.model.scenario import Load, Scenario
from sim.model.workload import Exponential, Lengths, Workload
from sim.results import metrics
from sim.steptime.linear import affine
from sim.steptime.noise_parameters import Noise

STEP_TIME = affine(a0=0.05, a1=2.19997e-4, a2=6e-9, a3=2e-3, b0=0.045, b1=2.5e-4, b2=2e-7, b3=2e-6, c0=2e-3, f0=1e-3)
NOISE = Noise(prefill=[0.96, 0.99, 1.0, 1.01, 1.04], decode=[0.95, 0.99, 1.0, 1.01, 1.05], drift=0.01)
CLOCKS = Clocks(
    uplink=Delay(quantiles=[5e-4, 1e-3, 2e-3], per_token=1e-6),
    downlink=Delay(quantiles=[5e-4, 1e-3, 2e-3]),
    turnaround=Delay(quantiles=[1e-3, 2e-3, 5e-3]),
)


@dataclass(frozen=True)
class Loaded:
    """One load, how many requests of it make `requests` (by seconds of simulated time each), and the goal."""

    what: str
    workload: Workload
    seconds: float  # simulated, per request
    users: int | None = None
    rate: float | None = None
    goal: int | None = None  # requests per CPU second

    def scenario(self, requests: int) -> Scenario:
        """The load for as long as so many requests take."""
        load = Load(
            users=[self.users] if self.users else None,
            rate=[self.rate] if self.rate else None,
            seconds=requests * self.seconds,
            spawn_rate=100.0,
        )
        return Scenario(server=Flags(), name=self.what, workload=self.workload, load=load)


MIXED = Workload(
    prompt_tokens=Lengths(uniform=(16, 3000)), output_tokens=Lengths(exponential=Exponential(mean=200, high=1500))
)
BENCHES = {
    "C": Loaded("C: 50/500, 128 users", Workload(prompt_tokens=50, output_tokens=500), 0.3505, users=128, goal=50_000),
    "C100": Loaded("C at 100 tokens out", Workload(prompt_tokens=50, output_tokens=100), 0.09, users=128),
    "C2000": Loaded("C at 2,000 tokens out", Workload(prompt_tokens=50, output_tokens=2000), 1.5, users=128),
    "A": Loaded(
        "A: 1500/100, Poisson 1/s", Workload(prompt_tokens=1500, output_tokens=100), 1.01, rate=1.0, goal=20_000
    ),
    "mixed": Loaded("16-3000 in, geometric 200 out", MIXED, 0.6, users=128),
}
SERVER = Flags(
    max_batch_prefill_tokens=14_000, max_batch_total_tokens=400_000, max_input_length=3_000, max_total_tokens=4_500
)


def run(name: str, requests: int, noise: bool) -> dict[str, float]:
    """Simulate one load once: requests per CPU second, memory, and what the simulated server did."""
    scenario = BENCHES[name].scenario(requests)
    model = Machine(STEP_TIME, SERVER, NOISE if noise else Noise(), CLOCKS)
    began = time.process_time()
    simulated = climb(scenario, model, (1, 0))
    row = metrics.table(simulated).iloc[0]
    took = time.process_time() - began
    assert simulated.steps is not None
    return {
        "requests": len(simulated.requests),
        "speed": len(simulated.requests) / took,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "events": len(simulated.steps) / len(simulated.requests),
        **{share: float(row[share]) for share in ("mean_batch", "prefill_share", "decode_share", "budget_share")},
    }


def apart(name: str, requests: int, noise: bool, repeats: int = 3) -> dict[str, float]:
    """The fastest of some runs, each in a process of its own: memory is counted from nothing, others disturb less."""
    command = [sys.executable, __file__, "--one", name, str(requests), str(int(noise))]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(repeats)]
    return max((json.loads(out) for out in runs), key=lambda result: float(result["speed"]))


def main() -> int:
    """Print every speed beside its goal; 1 if a goal is missed."""
    missed = 0

    def line(what: str, value: str, goal: str = "", met: bool = True) -> None:
        nonlocal missed
        missed += not met
        print(f"{what:<46}{value:>14}  {goal}{'' if met else '  MISSED'}".rstrip(), flush=True)

    line("requests per CPU second, metrics and turnaround on", "")
    for name, requests in (("C", 100_000), ("A", 100_000), ("mixed", 100_000)):
        bench = BENCHES[name]
        for noise in (False, True):
            found = apart(name, requests, noise)
            goal = f"goal {bench.goal:,}" if bench.goal else ""
            met = found["speed"] >= (bench.goal or 0) and found["requests"] >= 0.99 * requests
            line(f"  {bench.what}, noise {'on' if noise else 'off'}", f"{found['speed']:,.0f}", goal, met)
    print(
        f"  The mixed load has {found['events']:.2f} runs of steps a request: each answer has its own length, so its\n"
        f"  end is an event, and Python's time for one is the bound. What bounds the simulated server is prefilling,\n"
        f"  {found['prefill_share']:.0%} of its time; {found['mean_batch']:.0f} of 128 run, in "
        f"{found['budget_share']:.0%} of the token budget."
    )
    short, long = apart("C100", 100_000, False, 5), apart("C2000", 100_000, False, 5)
    for name, found in (("C100", short), ("C2000", long)):
        line(f"  {BENCHES[name].what}, noise off", f"{found['speed']:,.0f}")
    apart_by = abs(long["speed"] / short["speed"] - 1)
    line("  apart by", f"{apart_by:.1%}", "goal 10 %", apart_by <= 0.10)
    for noise in (False, True):
        million = apart("C", 1_000_000, noise, 1)
        met = million["gigabytes"] <= 1.0 and million["requests"] >= 1_000_000
        what = f"  memory for {million['requests']:,} of C, noise {'on' if noise else 'off'}"
        line(what, f"{million['gigabytes']:.2f} GB", "goal 1 GB", met)
    return int(missed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("LOAD", "REQUESTS", "NOISE"), help="one run, as JSON")
    one = parser.parse_args().one
    if one:
        print(json.dumps(run(one[0], int(one[1]), one[2] == "1")))
    else:
        sys.exit(main())
