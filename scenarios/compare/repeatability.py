"""Repeatability of the server: the difference between two measurements of a load, below which no model can get."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from scenarios.progress import read_run_with_progress
from sim.model.metric import COMPARED
from sim.model.warning import Notice, notice
from sim.results import metrics
from sim.run import Run


def read_repeats(run: Run, named: Iterable[Path] = ()) -> list[Run]:
    """The runs that measured the same again: those named, and the run's sibling `<run>-again` if there is one."""
    paths = list(named)
    if run.path is not None:
        own = run.path.resolve()
        sibling = own.with_name(f"{own.name}-again")
        if (sibling / "run.json").exists() and sibling not in {path.resolve() for path in paths}:
            paths.append(sibling)
    return [read_run_with_progress(path) for path in paths]


def repeat_errors(
    run: Run, measured: pd.DataFrame, repeats: Iterable[Run]
) -> tuple[dict[tuple[int, str], float], list[Notice]]:
    """How far the real server is from itself: the same load measured again, relative to the first time (of several
    repeats, the farthest); and which repeats are none."""
    found: dict[tuple[int, str], float] = {}
    warnings = []
    for other in repeats:
        again = metrics.table(other)
        if again.empty:
            warnings.append(notice("not-a-repeat", f"{other.name} does not repeat {run.name}: it has no whole window"))
            continue
        again = again.set_index("load")
        common = measured[measured["load"].isin(again.index)]
        if other.scenario.workload != run.scenario.workload or common.empty:
            why = "has no load in common with it" if common.empty else "asked for other lengths"
            warnings.append(notice("not-a-repeat", f"{other.name} does not repeat {run.name}: it {why}"))
            continue
        for _, here in common.iterrows():
            for metric in COMPARED:
                error = relative(float(again[metric].loc[[here["load"]]].iloc[0]), float(here[metric]))
                key = int(here["rung"]), metric
                if error is not None and not math.isnan(error) and abs(error) >= abs(found.get(key, 0.0)):
                    found[key] = error
    return found, warnings


def relative(simulated: float | None, measured: float) -> float | None:
    """simulated / measured − 1; None where nothing was forecast, or nothing measured and something forecast."""
    if simulated is None:
        return None
    if measured:
        return simulated / measured - 1
    return 0.0 if simulated == 0 else None
