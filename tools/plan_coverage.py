"""Does a plan keep what it promises? Truths are drawn from the draws of a calibration.

Each of 200 pairs has a truth (one draw of the shipped Llama-2-70B calibration) and a rate. A plan is made from the
calibration; then the truth is simulated with each number of replicas that the plan tried, chosen or not. Promised
probabilities are compared with frequencies in bins (binomial 95 % intervals), by the Brier score, and for chosen plans
by the mean promise minus the frequency. Truths come from the prior of the plan, so that this shows whether search,
test and choice bias a promise, and not whether a calibration does (`make validate`).

    make plan-coverage            200 pairs, some 20 minutes on 2 cores
"""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
from scipy.stats import beta

from scenarios.load.options import load_options
from scenarios.load.parameters import calibration_of
from scenarios.plan.plan import make_plan
from scenarios.plan.trials import Setting, Trials
from sim.executors import processes

SOURCE = "llama2-70b-1500-100"
LIMIT = 20.0  # s
BINS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
PLANS, TRUTHS = 10, 20  # loads, and truths for each: 200 pairs


def main(plans: int = PLANS, truths: int = TRUTHS) -> int:
    """Print the table; 1 where a bin's frequency, or the chosen plans', disagrees with the promise."""
    rng = np.random.default_rng(20)
    promised, kept, chosen = list[float](), list[bool](), list[bool]()
    with processes() as executor:
        for number in range(plans):
            rate = float(rng.uniform(0.5, 4.0))
            sets = (f"load.rate=[{rate:.3f}]", f"slo={{e2e_p95: {LIMIT}}}", "fleet.replicas={low: 1, high: 12}")
            (option,) = load_options(SOURCE, *sets)
            calibration = calibration_of(SOURCE, option.scenario, sets=sets)
            plan = make_plan([option], {option.name: calibration}, seed=number, executor=executor)
            row = plan.chosen
            trials = Trials({option.name: calibration}, 10_000 + number, 3600.0, executor)
            slo = (("e2e_p95", LIMIT),)
            for tried in row.tried:
                best = row.met and tried.replicas == row.replicas.value
                promise = row.probability["all"].value if best else tried.kept.value
                outcomes = trials.run([(Setting(option, tried.replicas, slo), draw) for draw in range(1, truths + 1)])
                kept += [outcome.keeps for outcome in outcomes]
                promised += [promise] * truths
                chosen += [best] * truths
    p, k, c = np.array(promised), np.array(kept), np.array(chosen)
    failed = False
    print(f"{'promised':>14} {'pairs':>6} {'mean':>6} {'kept':>6}  95 % interval")
    for low, high in pairwise(BINS):
        here = (p >= low) & ((p < high) | (high == 1.0))
        if not here.any():
            continue
        n, x = int(here.sum()), int(k[here].sum())
        ends = (beta.ppf(0.025, x, n - x + 1) if x else 0.0), (beta.ppf(0.975, x + 1, n - x) if x < n else 1.0)
        inside = ends[0] <= p[here].mean() <= ends[1]
        failed |= not inside
        span = f"{ends[0]:.2f} to {ends[1]:.2f}{'' if inside else '  outside'}"
        print(f"{low:6.2f} to {high:4.2f} {n:6d} {p[here].mean():6.2f} {x / n:6.2f}  {span}")
    print(f"Brier score {np.mean((p - k) ** 2):.4f} (always the mean: {k.mean() * (1 - k.mean()):.4f})")
    if c.any():
        bias, error = float((p - k)[c].mean()), float(np.sqrt((p * (1.0 - p))[c].sum()) / c.sum())
        failed |= abs(bias) > 2 * error
        print(f"chosen plans: promise minus frequency {bias:+.3f} ± {error:.3f} ({int(c.sum())} pairs)")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
