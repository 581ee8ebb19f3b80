"""How far the network latency of one recorded run is from that of another
(`calibrate.schedule.admission_timing.LATENCY_BETWEEN_RUNS`).

Who was queued in time for a scheduling point, and who was not, tells how long the latency of a run was beside that of
all runs of its machine. Prints for each run by how much it was longer, and for all the standard deviation that makes
these admissions most likely, with the interval of those that are nearly as likely.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, ndtr

from calibrate.regression.design import build_rows
from calibrate.regression.fit import choose, regress
from calibrate.regression.variance_components import fit_random_effects
from calibrate.schedule.admission_timing import LAPSE_RATE, LATENCY_BETWEEN_RUNS, admission_timings, margins
from calibrate.schedule.schedule import schedule_of
from calibrate.sources.streamed import candidate_forms
from sim.run import read_run

Floats = NDArray[np.float64]

DATA = Path(__file__).parent.parent / "data"
LONGER = np.linspace(-0.9, 0.9, 361)  # latency of a run beside that of all, relative
SPREADS = np.geomspace(0.01, 0.5, 60)
NEARLY = 1.35  # nats: a 90 % interval


def main() -> int:
    """Print it; 1 if what is assumed is not nearly as likely as the best."""
    told = [_of_a_machine(folder) for folder in ("tgi-0.9.4-router-http", "tgi-0.9.4-cpu")]
    runs = np.concatenate(told)
    likely = np.array([_of_spread(runs, spread) for spread in SPREADS])
    near = SPREADS[likely > likely.max() - NEARLY]
    found = SPREADS[likely.argmax()]
    print(f"from run to run {found:.2f} ({near.min():.2f} to {near.max():.2f}); assumed {LATENCY_BETWEEN_RUNS:.2f}")
    return 0 if near.min() <= LATENCY_BETWEEN_RUNS <= near.max() else 1


def _of_a_machine(folder: str) -> Floats:
    """The log-likelihood of `LONGER` for each run of a machine that shows admissions, (runs, len(LONGER))."""
    runs = [read_run(path.parent) for path in sorted((DATA / folder).glob("*/run.json"))]
    schedules = [schedule_of(run) for run in runs]
    rows, admissions = build_rows(runs, schedules), admission_timings(runs, schedules)
    first, _ = choose(rows, candidate_forms(runs[0].scenario.server), admissions)
    fit = regress(rows, first.form, admissions, fit_random_effects(first, rows))
    spread = float((rows.seconds / fit.predicted)[~rows.prefill].std())
    told = []
    for run, schedule in zip(runs, schedules, strict=True):
        mine = admission_timings([run], [schedule])
        if not len(mine):
            continue
        margin, scale, latency = margins(mine, fit.names, fit.coefficients, spread)
        won, weight = np.where(mine["won"], 1.0, -1.0), mine["weight"].to_numpy()
        z = (won * (margin - np.outer(LONGER, latency)) / scale).clip(-4.0, 4.0)
        told.append(np.log(LAPSE_RATE + (1 - 2 * LAPSE_RATE) * ndtr(z)) @ weight)
        best = int(told[-1].argmax())
        print(f"{run.name}: {weight.sum():.0f} groups, {LONGER[best]:+.0%} ({told[-1][best] - told[-1][180]:.1f} nats)")
    return np.array(told)


def _of_spread(runs: Floats, spread: float) -> float:
    """The log-likelihood of all runs if their latencies differ by this."""
    prior = -0.5 * (LONGER / spread) ** 2
    return float(logsumexp(runs + prior - logsumexp(prior), axis=1).sum())


if __name__ == "__main__":
    sys.exit(main())
