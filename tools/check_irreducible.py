"""How many of its goals would a model miss that knew the machine exactly?

    python tools/check_irreducible.py [--days N] [--seed N]

A machine that is not itself from minute to minute cannot be forecast better than it repeats itself. Each family of
recorded runs in data/ is calibrated, and its central machine, with its noise and drift, is measured again on many
simulated days: every ladder as it was recorded. A forecast that knows all of that machine but the day is then held
against each day, and to the goals of `tools/validate.py`. Printed, for every run: the mean error, in brackets the share
of days that miss the goal; then how many goals a whole set of such runs misses in a day, to be held against what
validate misses. Nothing here can fail: it says what can be asked.
"""

from __future__ import annotations

import argparse
import sys

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from validate import COVERAGE, DATA, FAMILIES, GOALS, MEANS, SHOWN, Goal

from calibrate.sources.streamed import calibrate_runs
from scenarios.compare.run_with_model import forecast_run
from sim.executors import Executor, processes
from sim.model.calibration import Calibration
from sim.results.curve import band
from sim.run import Run, read_run

Floats = NDArray[np.float64]


def main() -> int:
    """Print a table for every family of runs."""
    parser = argparse.ArgumentParser(description="How many goals would a model miss that knew the machine exactly?")
    parser.add_argument("--days", type=int, default=99)
    parser.add_argument("--seed", type=int, default=2026)
    asked = parser.parse_args()
    out = Console(width=130)
    with processes() as executor:
        for folder, kind in FAMILIES:
            runs = [read_run(path.parent) for path in sorted((DATA / folder).glob("*/run.json"))]
            known = msgspec.structs.replace(calibrate_runs(runs), draws={})
            table = Table(title=f"{folder}: error of a model that knows the machine, %", title_justify="left")
            for name in ("run", *SHOWN):
                table.add_column(name, justify="left" if name == "run" else "right")
            missed = np.zeros(asked.days)
            for number, run in enumerate(runs):  # each on days of its own, as they were recorded
                cells, misses = of_run(run, known, GOALS[kind], asked.days, asked.seed + number, executor)
                table.add_row(run.name, *cells)
                missed += misses
            low, high = np.quantile(missed, (0.05, 0.95))
            out.print(table)
            out.print(
                f"of {len(runs) * len(SHOWN)} goals it misses {missed.mean():.1f} a day, on nine days of ten between "
                f"{low:.0f} and {high:.0f}\n",
                highlight=False,
            )
    return 0


def of_run(
    run: Run, known: Calibration, goals: dict[str, Goal], days: int, seed: int, executor: Executor
) -> tuple[list[str], Floats]:
    """What is printed of one run, metric by metric, and how many goals it misses on each day, (days,)."""
    tables = forecast_run(run, known, executor, replicates=days, seed=seed)
    cells, missed = [], np.zeros(days)
    for metric in SHOWN:
        error, miss = held_against(np.array([t[metric] for t in tables]), metric, goals[metric])
        cells.append(f"{100 * error.mean():.1f} ({100 * miss.mean():.0f})")
        missed += miss
    return cells, missed


def held_against(measured: Floats, metric: str, goal: Goal) -> tuple[Floats, NDArray[np.bool_]]:
    """The error of each day's run, (days,), and whether it misses its goal, from what was `measured`, (days, rungs)."""
    middle, low, high = np.array([band(rung) for rung in measured.T]).T
    summarise = np.mean if metric in MEANS else np.median
    error, apart = (summarise(np.abs(x), axis=1) for x in (middle / measured - 1, middle - measured))
    miss = (error > goal.error) & (apart > goal.seconds)
    if goal.inside:
        miss |= ((measured >= low) & (measured <= high)).mean(axis=1) < COVERAGE["padded"][0]
    return error, miss


if __name__ == "__main__":
    sys.exit(main())
