"""Hold forecasts against the measured runs in data/: what was never fitted, and the goals it should meet.

Each run is forecast up to three times. *The run*: the calibration has seen every other run of that machine and nothing
of this one. *Its loads*: it has seen every second load of this run as well, and is scored on the rest, then the other
way round. *Its profile*: it has seen runs of the one other profile of fixed lengths only; there a goal also counts as
met where the bands say how little is known, by holding what was measured. Two rows beside them count for nothing.
*Itself*: the calibration has seen this run alone, so that the machine's speed on that day is known and what is missed
is the model's. *Repeated*: how far the real server was from itself when a load was repeated. Errors are means over a
run's loads for E2E mean and p50, RPS and tokens/s, medians for the others; an error that is small in milliseconds
counts as met. How well known step times are found is printed by `tools/check_fit.py`, which `make validate` runs as
well.

    python tools/validate.py [--fit FOLDER --runs FOLDER]

With folders, the runs in RUNS are forecast from all runs in FIT instead. Below each table stands how often central
intervals of 50, 80 and 90 % held, with a standard error clustered by run, and the mean interval score of the logarithm
(`tools/held_out.py`), of runs of which nothing was fitted.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from held_out import DATA, SHOWN, Score, coverage, runs_in, score
from rich.console import Console
from rich.table import Table

from calibrate.sources.streamed import calibrate_runs
from scenarios.compare.comparison import Row
from scenarios.compare.goals import FLASH, MIXED, PADDED, Goal, goals
from scenarios.compare.run_with_model import compare, forecast_run
from sim.executors import Executor, processes
from sim.run import Run

MEANS = ("e2e_mean", "e2e_p50", "output_tokens_per_s", "rps")
# one profile from the other's calibration alone
CROSS = {
    "flash": {"e2e_mean": Goal(0.06), "output_tokens_per_s": Goal(0.06)},
    "padded": {"e2e_mean": Goal(0.12), "output_tokens_per_s": Goal(0.12)},
    "mixed": {"e2e_mean": Goal(0.08), "output_tokens_per_s": Goal(0.08)},
}
GOALS = {"flash": FLASH, "padded": PADDED, "mixed": MIXED}
FAMILIES = (("tgi-0.9.4-router-http", "flash"), ("tgi-0.9.4-cpu", "padded"), ("vllm-cpu", "mixed"))
COVERAGE = {"flash": (0.85, 0.97), "padded": (0.80, 0.97), "mixed": (0.85, 0.97)}


def main() -> int:
    """Print the tables; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", type=Path, help="a folder of runs to fit")
    parser.add_argument("--runs", type=Path, help="a folder of runs of the same machine, to forecast")
    asked = parser.parse_args()
    if (asked.fit is None) != (asked.runs is None):
        parser.error("--fit and --runs belong together")
    missed = 0
    out = Console(width=150)
    with processes() as executor:
        if asked.fit is not None:
            missed = _unseen(runs_in(asked.runs), runs_in(asked.fit), executor, out)
        else:
            for folder, kind in FAMILIES:
                missed += _family(runs_in(DATA / folder), folder, kind, executor, out)
    out.print(f"{missed} goals missed" if missed else "all goals met")
    return 1 if missed else 0


def _unseen(runs: Sequence[Run], fit: Sequence[Run], executor: Executor, out: Console) -> int:
    """Forecast runs from others; how many goals were missed."""
    table = _table("error of runs of which nothing was fitted, %")
    missed, scores = 0, []
    for run in runs:
        rows, scored = _rows(run, fit, None, executor)
        missed += _add(table, run.name, "the run", rows, dict(goals(run.server)))
        scores.append(scored)
    out.print(table)
    _say_scores(scores, out)
    return missed


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("run", "held out", *SHOWN, "inside"):
        table.add_column(name, justify="left" if name in ("run", "held out") else "right")
    return table


def _say_scores(scores: Sequence[Score], out: Console) -> None:
    one = len(scores) == 1  # has no error clustered by run
    held = ", ".join(f"{100 * s:.0f}" + ("" if one else f" ± {100 * e:.0f}") for s, e in coverage(scores))
    mean = float(np.mean([s.interval.mean() for s in scores]))
    out.print(
        f"runs of which nothing was fitted: intervals of 50, 80 and 90 % held {held} %; mean interval score {mean:.3f}",
        highlight=False,
    )


def _family(runs: Sequence[Run], folder: str, kind: str, executor: Executor, out: Console) -> int:
    """Forecast every run of one machine both ways; how many goals were missed."""
    wanted = GOALS[kind]
    table = _table(f"{folder}: error of what was held out, %")
    missed, goals_of, insides, scores = Counter[str](), Counter[str](), [], []
    for run in runs:
        others = [other for other in runs if other is not run]
        alike = [other for other in others if other.scenario.workload == run.scenario.workload]
        same = [other for other in alike if other.scenario.server == run.scenario.server]
        fixed = [other for other in others if other not in alike and other.scenario.workload.empirical is None]
        whole, scored = _rows(run, others, None, executor, repeats=same)
        scores.append(scored)
        halves = [row for fold in (0, 1) for row in _rows(run, others, fold, executor)[0]]
        held_out = [("its loads", halves, wanted)]
        if same or len({str(other.scenario.workload) for other in others}) > 1:
            held_out.insert(0, ("the run", whole, wanted))
        for label, rows, against in held_out:
            missed[label] += _add(table, run.name, label, rows, against)
            goals_of[label] += len(against)
            insides += [row.inside for row in rows if row.inside is not None and row.metric in SHOWN]
        if run.scenario.workload.empirical is None and fixed:
            rows, _ = _rows(run, fixed, None, executor)
            missed["its profile"] += _add(table, "", "its profile", rows, CROSS[kind], honest=True)
            goals_of["its profile"] += len(CROSS[kind])
        own, _ = _cells(_rows(run, [run], None, executor)[0], wanted, honest=False)
        table.add_row("", "[dim]itself[/dim]", *(f"[dim]{cell}[/dim]" for cell in own), "")
        again = [row for row in whole if row.repeat_error is not None]
        if again:
            of = {m: [abs(r.repeat_error or 0.0) for r in again if r.metric == m] for m in SHOWN}
            cells = [
                f"{100 * (np.mean(of[m]) if m in MEANS else np.median(of[m])):.1f}" if of[m] else "" for m in SHOWN
            ]
            table.add_row("", "[dim]repeated[/dim]", *(f"[dim]{cell}[/dim]" for cell in cells), "")
    low, high = COVERAGE[kind]
    share = float(np.mean(insides))
    met = low <= share <= high
    out.print(table)
    counted = "; ".join(f"{label} {missed[label]} of {n}" for label, n in goals_of.items())
    out.print(f"goals missed: {counted}", highlight=False)
    _say_scores(scores, out)
    out.print(
        f"90 % bands of known profiles held {share:.0%} (goal {low:.0%} to {high:.0%}){'' if met else ': missed'}\n"
    )
    return missed.total() + (not met)


def _rows(
    run: Run, others: Sequence[Run], fold: int | None, executor: Executor, repeats: Sequence[Run] = ()
) -> tuple[list[Row], Score]:
    """The comparison with a forecast from `others` and, with a fold, from the rungs of this run that are not in it; and
    its score."""
    if fold is None:
        calibration, fitted = calibrate_runs(others), set[int]()
    else:
        fitted = {i for i in range(len(run.rungs)) if i % 2 != fold}
        calibration = calibrate_runs([*others, run], rungs=[*(None for _ in others), fitted])
    tables = forecast_run(run, calibration, executor)
    rows = [row for row in compare(run, tables, fitted=fitted, repeats=repeats).rows if row.held_out]
    return rows, score(run, tables, frozenset(fitted))


def _add(
    table: Table, name: str, label: str, rows: Sequence[Row], wanted: dict[str, Goal], *, honest: bool = False
) -> int:
    """A row of the table; how many goals it misses."""
    cells, missed = _cells(rows, wanted, honest)
    known = [row.inside for row in rows if row.inside is not None and row.metric in SHOWN]
    table.add_row(name, label, *cells, f"{100 * np.mean(known):.0f}")
    return missed


def _cells(rows: Sequence[Row], wanted: dict[str, Goal], honest: bool) -> tuple[list[str], int]:
    """One number per shown metric, marked when it misses its goal, and how many do. If `honest`, a metric whose bands
    hold all that was measured misses nothing."""
    cells, missed = [], 0
    for metric in SHOWN:
        mine = [row for row in rows if row.metric == metric]
        if any(row.relative_error is None for row in mine):  # measured and not forecast
            cells, missed = [*cells, "[bold red]none[/bold red]*"], missed + 1
            continue
        summarise = np.mean if metric in MEANS else np.median
        error = float(summarise([abs(row.relative_error or 0.0) for row in mine]))
        apart = float(summarise([abs((row.simulated or 0.0) - row.measured) for row in mine]))
        goal = wanted.get(metric)
        held = float(np.mean([row.inside is True for row in mine]))
        good = goal is None or error <= goal.error or apart <= goal.seconds or (honest and held == 1.0)
        good &= goal is None or not goal.inside or held >= COVERAGE["padded"][0]
        missed += not good
        cells.append(f"{100 * error:.1f}" if good else f"[bold red]{100 * error:.1f}[/bold red]*")
    return cells, missed


if __name__ == "__main__":
    sys.exit(main())
