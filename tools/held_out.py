"""Runs that a calibration has not seen, and scores of their forecasts.

A row is one metric at one load. Coverage is the share of rows within central intervals of the replicates. The interval
score (Gneiting and Raftery 2007, section 6.2) of the logarithm of the metric is
u − l + (2/α)(l − y)⁺ + (2/α)(y − u)⁺ for the interval l..u of level 1 − α: the lower the better, wide intervals that
cover are no achievement, and 0.1 is about a relative width of 10 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sim.results import metrics
from sim.run import Run, read_run

DATA = Path(__file__).parent.parent / "data"
SHOWN = ("e2e_mean", "e2e_p50", "output_tokens_per_s", "rps", "e2e_p95", "ttft_p50", "ttft_p95")
LEVELS = (0.5, 0.8, 0.9)


@dataclass(frozen=True)
class Score:
    """The rows of one forecast run: relative errors of the medians, whether each of `LEVELS` covers, (rows, levels),
    and the interval score of the logarithm at 90 %, (rows,)."""

    run: str
    metric: tuple[str, ...]
    error: np.ndarray
    covered: np.ndarray
    interval: np.ndarray


def score(run: Run, tables: Sequence[pd.DataFrame], fitted: frozenset[int] = frozenset()) -> Score:
    """The score of replicates (`scenarios.compare.run_with_model.forecast_run`) of a run, without the rungs that were
    `fitted`."""
    measured = metrics.table(run)
    drawn = np.stack([table[list(SHOWN)].to_numpy(np.float64) for table in tables])  # (replicates, rungs, metrics)
    names, errors, covered, intervals = [], [], [], []
    for place, rung in enumerate(measured["rung"].tolist()):
        for column, metric in enumerate(SHOWN):
            y, x = float(measured[metric].iloc[place]), drawn[:, place, column]
            x = x[x > 0]
            if rung in fitted or not y > 0 or not len(x):
                continue
            tails = [(1 - level) / 2 for level in LEVELS]
            low = np.quantile(np.log(x), tails, method="weibull")
            high = np.quantile(np.log(x), [1 - tail for tail in tails], method="weibull")
            outside = np.maximum(low - np.log(y), 0.0) + np.maximum(np.log(y) - high, 0.0)
            names.append(metric)
            errors.append(float(np.median(x)) / y - 1)
            covered.append(outside == 0)
            intervals.append((high - low)[-1] + outside[-1] / tails[-1])
    return Score(run.name, tuple(names), np.array(errors), np.array(covered), np.array(intervals))


def coverage(scores: Sequence[Score]) -> list[tuple[float, float]]:
    """The share of rows covered at each of `LEVELS`, and its standard error clustered by run."""
    rows = np.array([len(s.error) for s in scores], dtype=np.float64)
    held = np.array([s.covered.sum(axis=0) for s in scores], dtype=np.float64)
    share = held.sum(axis=0) / rows.sum()
    deviation = held - rows[:, None] * share
    clusters = max(len(scores) - 1, 1)
    error = np.sqrt((deviation**2).sum(axis=0) * len(scores) / clusters) / rows.sum()
    return list(zip(share.tolist(), error.tolist(), strict=True))


def runs_in(folder: Path) -> list[Run]:
    """The runs in a folder's folders, by name."""
    return [read_run(path.parent) for path in sorted(folder.glob("*/run.json"))]
