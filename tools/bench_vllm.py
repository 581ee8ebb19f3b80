"""How fast the simulator is with the vLLM engine: requests per CPU second, metrics and turnaround on.

Machine, network and loads C and A are those of `bench_sim.py`, with the defaults of vLLM on an A100 otherwise: steps
scheduled ahead, 2,048 tokens a step, 256 requests at once. The third load keeps the KV cache full, so that requests are
preempted; the fourth is sessions that share a system prompt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from unittest import mock

from bench_sim import BENCHES, CLOCKS, NOISE, STEP_TIME, Loaded
from msgspec.structs import replace

from sim.cluster import ladder, testbed
from sim.engines.vllm_v1 import Engine, Flags
from sim.model.machine import Machine
from sim.model.workload import Exponential, Lengths, Sessions, Workload
from sim.results import metrics
from sim.steptime.noise_parameters import Noise

FULL = Workload(
    prompt_tokens=Lengths(uniform=(100, 500)), output_tokens=Lengths(exponential=Exponential(mean=400, high=1500))
)
CHATS = Workload(
    prompt_tokens=Lengths(uniform=(20, 150)),
    output_tokens=Lengths(uniform=(20, 250)),
    sessions=Sessions(turns=8, system_prompt_tokens=500),
)


@dataclass(frozen=True)
class VllmLoad:
    """A load, the server's flags for it, and the goals with noise off and on."""

    load: Loaded
    flags: Flags
    goals: tuple[int, int]


LOADS = {
    "C": VllmLoad(BENCHES["C"], Flags(num_gpu_blocks=20_000), (50_000, 35_000)),
    "A": VllmLoad(BENCHES["A"], Flags(num_gpu_blocks=20_000), (15_000, 10_000)),
    "full": VllmLoad(Loaded("KV cache full", FULL, 0.35, users=128), Flags(num_gpu_blocks=3_000), (8_000, 8_000)),
    "chats": VllmLoad(Loaded("chats", CHATS, 0.15, users=64), Flags(num_gpu_blocks=20_000), (8_000, 8_000)),
}


def run(name: str, requests: int, noise: bool, caching: bool) -> dict[str, float]:
    """Simulate one load once: requests per CPU second, and what the simulated server did."""
    load = LOADS[name]
    scenario = load.load.scenario(requests)
    flags = replace(load.flags, enable_prefix_caching=caching)
    model = Machine(STEP_TIME, flags, NOISE if noise else Noise(), CLOCKS)
    engine = Engine(flags)
    began = time.process_time()
    with mock.patch.object(testbed, "scheduler", return_value=engine):  # which is asked for its counters below
        simulated = ladder.climb(scenario, model, (1, 0))
    metrics.table(simulated)
    took = time.process_time() - began
    assert simulated.steps is not None
    return {
        "requests": len(simulated.requests),
        "speed": len(simulated.requests) / took,
        "plans": len(simulated.steps) / len(simulated.requests),
        "preemptions": engine.scheduler.preemptions / len(simulated.requests),
        "hits": engine.scheduler.hit_tokens / max(engine.scheduler.queried_tokens, 1),
    }


def apart(*arguments: str, repeats: int = 3) -> dict[str, float]:
    """The fastest of some runs, each in a process of its own."""
    command = [sys.executable, __file__, "--one", *arguments]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(repeats)]
    return max((json.loads(out) for out in runs), key=lambda result: float(result["speed"]))


def main(requests: int, repeats: int) -> int:
    """Print every speed beside its goal; 1 if a goal is missed."""
    missed = False
    print("requests per CPU second, metrics and turnaround on; prefix caching on, off")
    for name, load in LOADS.items():
        for noise, goal in zip((0, 1), load.goals, strict=True):
            found = [apart(name, str(requests), str(noise), str(caching), repeats=repeats) for caching in (1, 0)]
            short = min(f["speed"] for f in found) < goal
            missed |= short
            speeds = "".join(f"{f['speed']:>10,.0f}" for f in found)
            what = f"  {load.load.what}, noise {'on' if noise else 'off'}"
            print(f"{what:<36}{speeds}  goal {goal:,}{'  MISSED' if short else ''}", flush=True)
        print(
            f"    a request: {found[0]['plans']:.2f} plans, {found[0]['preemptions']:.2f} preemptions, "
            f"{found[0]['hits']:.0%} of its prompt from the cache"
        )
    return int(missed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, metavar=("LOAD", "REQUESTS", "NOISE", "CACHING"), help="one run, as JSON")
    parser.add_argument("--requests", type=int, default=100_000, help="of each run")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many runs counts")
    options = parser.parse_args()
    if options.one:
        name, requests, noise, caching = options.one
        print(json.dumps(run(name, int(requests), noise == "1", caching == "1")))
    else:
        sys.exit(main(options.requests, options.repeats))
