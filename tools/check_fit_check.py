"""How often the check of a calibration fails: of right ones, when it should not, and of wrong ones, when it should.

    python tools/check_fit_check.py [--machines N] [--wrong N] [--seed N]

Simulated servers are measured and calibrated as in `check_fit.py`; some are quiet to the last step, some ladders are
short. Right: the scenario says what the server is. Wrong: the server has another prefill budget, another token budget
or other admission rules than its scenario says, or a machine that is slower from the middle of the ladder on. Exit
status 1 when more right ones fail than 1 % allows, or fewer wrong token budgets and admission rules than half. Short
prompts do not feel a prefill budget; a machine that changes is taken for one that drifts, whose bands are wide, and the
fit itself warns of its loads.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from scipy.stats import binom

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # how clients see a simulated server is the tests' own

from streams import SERVER, TRUTH, lengths, observe

from calibrate.sources.streamed import calibrate_runs
from scenarios.compare.fit_check import check_runs
from sim.engines.tgi_0_9_4 import Flags
from sim.executors import Tell, processes
from sim.model.calibration import FitCheck
from sim.model.errors import UserError
from sim.run import Run
from sim.steptime.noise_parameters import Noise

LADDERS = (  # lengths, users, s of a rung
    (lengths(1500, 100), [1, 2, 4, 8, 16, 32], 14.0),
    (lengths(50, 500), [1, 2, 4, 8, 16, 32], 14.0),
    (lengths((16, 400), (20, 180)), [1, 4, 16, 64], 10.0),
    (lengths(400, 40), [1, 2, 3, 4, 6, 8], 5.0),  # as the shipped stand-in scenario
)
LEFT = 15.0  # s in which what is under way when the ladder ends is done
SERVERS: dict[str, dict[str, Any]] = {
    "right": {},
    "prefill budget 3000, not 14000": {"max_batch_prefill_tokens": 3000},
    "token budget 12000, not 36000": {"max_batch_total_tokens": 12000},
    "max_waiting_tokens 200, not 20": {"max_waiting_tokens": 200},
}
SLOWED = {"10 % slower from the middle on": 1.1, "30 % slower from the middle on": 1.3}
MUST = ("token budget 12000, not 36000", "max_waiting_tokens 200, not 20")


class Tried(NamedTuple):
    """One calibration: what is wrong with it, and what its check found (None: it could not be fitted at all)."""

    kind: str
    number: int
    found: FitCheck | None


def main() -> int:
    """Print every failed check, and how many there were."""
    parser = argparse.ArgumentParser(description="Check the check of calibrations.")
    parser.add_argument("--machines", type=int, default=40)
    parser.add_argument("--wrong", type=int, default=8)
    parser.add_argument("--seed", type=int, default=2026)
    asked = parser.parse_args()
    jobs = [("right", asked.seed + i) for i in range(asked.machines)]
    jobs += [(kind, asked.seed + i) for kind in [*SERVERS, *SLOWED][1:] for i in range(asked.wrong)]
    tried = []
    with processes() as pool:
        for one in pool.run(attempt, jobs):
            tried.append(one)
            if one.found is not None and not one.found.passed:
                named = [f"{r.at}: {r.metric} {100 * (r.relative_error or 0):+.0f} %" for r in one.found.rows if r.far]
                outside = f"{one.found.missed} missed, {one.found.allowed} allowed"
                print(f"{one.kind}, machine {one.number}: {outside}; far off: {', '.join(named) or 'none'}", flush=True)
    met = True
    for kind in [*SERVERS, *SLOWED]:
        mine = [one for one in tried if one.kind == kind]
        failed = sum(one.found is None or not one.found.passed for one in mine)
        print(f"{kind}: {failed} of {len(mine)} fail")
        if kind == "right":
            met &= failed <= binom.ppf(0.99, len(mine), 0.01)
        elif kind in MUST:
            met &= 2 * failed >= len(mine)
    return 0 if met else 1


def attempt(job: tuple[str, int], _: Tell) -> Tried:
    """Measure a machine, calibrate it and check that."""
    kind, number = job
    rng = np.random.default_rng([number, 1])
    truth = {name: value * float(np.exp(0.3 * rng.standard_normal())) for name, value in TRUTH.items()}
    spread = rng.uniform(0.02, 0.08)
    noise = Noise(
        prefill=[1 - spread / 2, 1.0, 1 + spread / 2],
        decode=[1 - spread, 1.0, 1 + spread],
        drift=rng.uniform(0.003, 0.02),
        drift_seconds=rng.uniform(4.0, 20.0),
    )
    workload, users, seconds = LADDERS[number % len(LADDERS)]
    server: Flags = msgspec.structs.replace(SERVER, **SERVERS.get(kind, {}))
    run = observe(
        users,
        workload,
        truth=truth,
        noise=Noise() if number % 5 == 4 else noise,
        seconds=seconds,
        jitter=2e-4,
        seed=number,
        server=server,
        after=LEFT,
    ).run
    run = replace(run, scenario=msgspec.structs.replace(run.scenario, server=SERVER))
    if kind in SLOWED:
        run = slowed(run, SLOWED[kind])
    try:
        return Tried(kind, number, check_runs(calibrate_runs([run], number), [run], seed=number))
    except UserError:
        return Tried(kind, number, None)


def slowed(run: Run, factor: float) -> Run:
    """The run as if everything had taken `factor` times as long from its middle rung on."""
    since = run.rungs[len(run.rungs) // 2].start

    def late(t: Any) -> Any:
        return np.where(np.asarray(t) > since, since + (np.asarray(t) - since) * factor, t)

    times = ("scheduled", "sent", "ended", "first_token", "last_token")
    requests = run.requests.assign(**{name: late(run.requests[name].to_numpy()) for name in times})
    marks = ("start", "ramped", "settled", "end")
    rungs = [replace(rung, **{name: float(late(getattr(rung, name))) for name in marks}) for rung in run.rungs]
    assert run.token_times is not None
    return replace(run, requests=requests, rungs=rungs, token_times=[late(t) for t in run.token_times])


if __name__ == "__main__":
    sys.exit(main())
