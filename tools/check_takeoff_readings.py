"""How far onsets of one machine lie apart when they are read off ladders of other rungs
(`calibrate.sources.figures.READ_OFF_ERROR`).

An article does not print its ladder. Users of equal lengths lock into groups, and how they do depends on where they are
added, so that part of what is read is the ladder's. Prints, for machines that fit the article and for made-up ones, the
root mean square over machines of the deviation between five ladders.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from calibrate.coverage import LONG_ANSWERS, LONG_PROMPTS, SERVER, draw_machine
from calibrate.sources.figures import READ_OFF_ERROR, USERS, FigureSimulator
from sim.executors import Tell, processes
from sim.model.calibration import read_calibration
from sim.replicate import Task
from sim.results import rates
from sim.results.curve import latency_onset

ARTICLE = Path(__file__).parent.parent / "scenarios" / "shipped" / "data" / "llama2-70b.calibration.json"
MACHINES = 12
LADDERS = (
    USERS,
    (1, 2, 4, 8, 16, 32, 64, 128),
    (1, 3, 6, 12, 24, 48, 96),
    (1, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100, 120),
    (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128),
)


def main() -> int:
    """Print the deviations; 1 if what is assumed is less than three quarters of them, or more than four thirds."""
    rng = np.random.default_rng(0)
    draws = read_calibration(ARTICLE).draws
    rows = rng.integers(len(draws["takeoff_factor"]), size=MACHINES).tolist()
    fitting = [({name: column[i] for name, column in draws.items()}, draws["takeoff_factor"][i]) for i in rows]
    made_up = [draw_machine(np.random.default_rng([2023, number])) for number in range(MACHINES)]
    squares = []
    with processes() as executor:
        for name, machines in (("fitting the article", fitting), ("made up", made_up)):
            for of in (LONG_PROMPTS, LONG_ANSWERS):
                tasks = [
                    (FigureSimulator((), SERVER, {}).task(machine, of, users, (7, k)), factor)
                    for machine, factor in machines
                    for k, users in enumerate(LADDERS)
                ]
                read = np.array(executor.run(_read, tasks)).reshape(len(machines), -1)
                apart = read.std(axis=1, ddof=1) / read.mean(axis=1)
                squares.append(float(np.nanmean(apart**2)))
                print(
                    f"{of.prompt_tokens}/{of.output_tokens}, {len(machines)} machines {name}: "
                    f"{100 * squares[-1] ** 0.5:.1f} % (middle machine {100 * np.nanmedian(apart):.1f} %)"
                )
    found = float(np.mean(squares)) ** 0.5
    print(f"together {100 * found:.1f} %; assumed {100 * READ_OFF_ERROR:.1f} %")
    return 0 if 0.75 < READ_OFF_ERROR / found < 4 / 3 else 1


def _read(task: tuple[Task, float], tell: Tell) -> float:
    return latency_onset(rates.table(task[0].run(tell)), task[1]).rps


if __name__ == "__main__":
    sys.exit(main())
