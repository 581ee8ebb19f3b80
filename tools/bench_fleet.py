"""What a fleet costs: requests per CPU second of four replicas against those of one server without a balancer.

Machine and loads are those of `bench_sim.py` and `bench_vllm.py`; the fleet has four times the users, or the rate, and
so four times the requests. Runs alternate, each in a process of its own, and the fastest of each kind counts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import msgspec
from bench_sim import BENCHES, CLOCKS, NOISE, SERVER, STEP_TIME
from bench_vllm import LOADS

from sim.cluster.ladder import climb
from sim.model.fleet import Fleet
from sim.model.machine import Machine
from sim.model.scenario import Scenario
from sim.results import metrics
from sim.steptime.noise_parameters import Noise

REPLICAS, GOAL = 4, 0.8  # of the speed of one


def of_fleet(one: Scenario, replicas: int) -> Scenario:
    """A scenario with so many replicas and so many times the load, in the same time."""
    users, rate = ([x * replicas for x in loads] if loads else None for loads in (one.load.users, one.load.rate))
    load = msgspec.structs.replace(one.load, users=users, rate=rate, spawn_rate=one.load.spawn_rate * replicas)
    return msgspec.structs.replace(one, load=load, fleet=Fleet(replicas=replicas))


def run(engine: str, name: str, noise: bool, requests: int, replicas: int) -> float:
    """Simulate one load once, with so many requests a replica: requests per CPU second."""
    flags = SERVER if engine == "tgi" else LOADS[name].flags
    scenario = BENCHES[name].scenario(requests)
    if replicas > 1:
        scenario = of_fleet(scenario, replicas)
    model = Machine(STEP_TIME, flags, NOISE if noise else Noise(), CLOCKS)
    began = time.process_time()
    simulated = climb(scenario, model, (1, 0))
    metrics.table(simulated)
    return len(simulated.requests) / (time.process_time() - began)


def apart(*arguments: str) -> float:
    """The speed of a run in a process of its own."""
    command = [sys.executable, __file__, "--one", *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(requests: int, repeats: int) -> int:
    """Print every speed and their ratio; 1 if a fleet is slower than the goal."""
    missed = False
    print(f"requests per CPU second of one server and of {REPLICAS} replicas; goal {GOAL:.0%}")
    for engine in ("tgi", "vllm"):
        for name in ("C", "A"):
            for noise in (0, 1):
                one, fleet = 0.0, 0.0
                for _ in range(repeats):
                    one = max(one, apart(engine, name, str(noise), str(requests), "1"))
                    fleet = max(fleet, apart(engine, name, str(noise), str(requests), str(REPLICAS)))
                short = fleet < GOAL * one
                missed |= short
                what = f"  {engine:<5}{BENCHES[name].what}, noise {'on' if noise else 'off'}"
                print(
                    f"{what:<46}{one:>10,.0f}{fleet:>10,.0f}{fleet / one:>8.0%}{'  MISSED' if short else ''}",
                    flush=True,
                )
    return int(missed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=5, metavar=("ENGINE", "LOAD", "NOISE", "REQUESTS", "REPLICAS"), help="one run")
    parser.add_argument("--requests", type=int, default=50_000, help="of each replica")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many runs counts")
    options = parser.parse_args()
    if options.one:
        engine, name, *numbers = options.one
        noise, requests, replicas = map(int, numbers)
        print(run(engine, name, noise == 1, requests, replicas))
    else:
        sys.exit(main(options.requests, options.repeats))
