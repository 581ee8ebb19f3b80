"""How the client's clock differs from the server's, from what a closed-loop run shows of it.

Milliseconds decide who shares a prefill, so delays are distributions. The downlink is seen against the earliest token
of each step (what is the same for all of them cannot be seen, and does not matter). The turnaround is how soon a user
comes back whose answer ended alone in its step; where several end in one step, how much later the last of them comes
back than chance would have it is the time a client needs for each. The uplink is what a prefill on an idle server takes
longer than one on a busy server; the regression has found its mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls

from calibrate.schedule.admission_timing import UPLINK_SPREAD
from calibrate.schedule.rebuild import Schedule
from sim.model.calibration import Clocks, Delay
from sim.run import Run

Floats = NDArray[np.float64]

# what a client on the same network was seen to take, where nothing is seen
ASSUMED = Clocks(uplink=Delay(quantiles=[1.2e-3, 1.8e-3]), turnaround=Delay(quantiles=[2e-4, 6e-4]))
TABLE = np.linspace(0.0, 1.0, 21)
_ALONE = 30  # answers that ended alone in their step from which turnarounds are known well enough


def fit_clocks(runs: Sequence[Run], schedules: Sequence[Schedule], way: float, per_token: float) -> Clocks:
    """Clocks of all runs together. `way` (s, there and back) and `per_token` come from the regression."""
    downlink = np.concatenate([_downlink(s) for s in schedules])
    tables = [_returns(r, s).assign(run=i) for i, (r, s) in enumerate(zip(runs, schedules, strict=True))]
    back = pd.concat(tables, ignore_index=True)
    there = max(way - (float(downlink.mean()) if len(downlink) else 0.0), 1e-4)
    turnaround, per_prompt_token, reading = _turnaround(back)
    spacing, spacing_per_token = _spacing(back, turnaround, per_prompt_token, reading)
    back_again = Delay(quantiles=_quantiles(turnaround), per_token=per_prompt_token)
    return Clocks(
        uplink=Delay(quantiles=_lognormal(there, UPLINK_SPREAD * there), per_token=per_token),
        downlink=Delay(quantiles=_quantiles(downlink)),
        turnaround=back_again if len(turnaround) else ASSUMED.turnaround,
        reading=reading,
        spacing=Delay(quantiles=[spacing], per_token=spacing_per_token),
    )


def _downlink(schedule: Schedule) -> Floats:
    """How much later than the first of its step every token was seen, s, in steps that several shared."""
    n = len(schedule.steps)
    first = np.full(n, np.inf)
    np.minimum.at(first, schedule.step, schedule.time)
    shared = np.bincount(schedule.step, minlength=n)[schedule.step] > 1
    late: Floats = (schedule.time - first[schedule.step])[shared]
    return late


def _returns(run: Run, schedule: Schedule) -> pd.DataFrame:
    """For every answer whose user asked again: how long after its last token (`back`, think time taken off), how many
    answers ended in its step, its rank among them by when they came back, the next prompt's length, and how many
    requests ran on (`live`)."""
    requests = run.requests
    table = pd.DataFrame(
        {
            "user": requests["user"],
            "sent": requests["sent"],
            "seen": requests["last_token"],
            "step": schedule.last,
            "ok": requests["status"] == "ok",
            "prompt": requests["prompt_tokens"],
        }
    )
    table = table[table["user"] >= 0].sort_values(["user", "sent"], kind="stable")
    again = table.groupby("user")[["sent", "prompt"]].shift(-1)
    table["again"], table["next_prompt"] = again["sent"], again["prompt"]
    for start, _ in run.stretches:
        table = table[~((table["seen"] < start) & (table["again"] >= start))]
    table = table[table["ok"] & table["again"].notna() & (table["step"] >= 0)]
    table = table[schedule.steps["used"].to_numpy()[table["step"].to_numpy()]]
    table["back"] = table["again"] - table["seen"] - run.scenario.load.think
    table = table.sort_values(["step", "again"], kind="stable")
    table = table.join(schedule.steps[["live", "rung"]], on="step")
    table["rank"] = table.groupby("step").cumcount()
    table["group"] = table.groupby("step")["back"].transform("size")
    table["after"] = table["again"] - table.groupby("step")["seen"].transform("min") - run.scenario.load.think
    return pd.DataFrame(table)


def _turnaround(back: pd.DataFrame) -> tuple[Floats, float, float]:
    """How soon a user comes back whose answer ended alone in its step, s, less what it takes per token of the next
    prompt, which has to be written, and per request still running, whose tokens have to be read first; and both of
    these. Where hardly any answer ends alone, the first of every step stands for it."""
    first = back[back["group"] == 1]
    if len(first) < _ALONE:
        first = back[back["rank"] == 0]
    # every load counts alike, however many short answers ended at it
    first = first.groupby(["run", "rung"]).sample(_ALONE, replace=True, random_state=0)
    seen = first["back"].to_numpy(np.float64)
    by = first[["next_prompt", "live"]].to_numpy(np.float64)
    if len(first) == 0:
        return seen, 0.0, 0.0
    by = np.where(np.ptp(by, axis=0) < 0.2 * by.mean(axis=0), 0.0, by)  # what hardly varies says nothing
    size = np.maximum(by.mean(axis=0), 1e-9)
    (_, *shares), _ = nnls(np.column_stack([np.ones(len(seen)), by / size]), seen)
    costs = np.asarray(shares) / size
    return np.maximum(seen - by @ costs, 0.0), float(costs[0]), float(costs[1])


def _spacing(back: pd.DataFrame, turnaround: Floats, per_token: float, reading: float) -> tuple[float, float]:
    """How far apart users come back whose answers ended together, s, and s per token of the next prompt."""
    together = back[back["group"] > 1]
    if len(together[["run", "step"]].drop_duplicates()) < 10 or len(turnaround) < 10:
        return 0.0, 0.0
    last = together[together["rank"] == together["group"] - 1]
    # without a queue at the client the last of n comes back at the largest of n turnarounds
    chance = {n: _expected_largest(turnaround, n) for n in last["group"].unique().tolist()}
    alone = last["group"].map(chance) + per_token * last["next_prompt"] + reading * last["live"]
    extra = (last["after"] - alone) / (last["group"] - 1)
    # the last waits for the turns of all but the first, each with a prompt of its own to write
    waiting = together[together["rank"] > 0].groupby(["run", "step"])["next_prompt"].transform("mean")
    prompt = waiting[last.index].to_numpy(np.float64)
    weight = (last["group"] - 1).to_numpy(np.float64)
    mean = float(np.average(extra, weights=weight))
    if mean <= 0:
        return 0.0, 0.0
    if np.ptp(prompt) < 0.2 * prompt.mean():
        return mean, 0.0
    centre = float(np.average(prompt, weights=weight))
    slope = float(
        np.average((prompt - centre) * (extra - mean), weights=weight)
        / np.average((prompt - centre) ** 2, weights=weight)
    )
    slope = float(np.clip(slope, 0.0, mean / centre))
    return mean - slope * centre, slope


def _expected_largest(values: Floats, n: int) -> float:
    """The mean of the largest of n independent draws from `values`."""
    ordered = np.sort(values)
    p = np.arange(len(ordered) + 1) / len(ordered)
    return float(ordered @ np.diff(p**n))


def _quantiles(values: Floats) -> list[float]:
    if len(values) < 2:
        return [float(values[0])] if len(values) else [0.0]
    # the extremes of thousands of values are no part of the law: the ends are the 0.5 % and 99.5 % quantiles
    return [round(max(0.0, q), 6) for q in np.quantile(values, np.clip(TABLE, 0.005, 0.995)).tolist()]


def _lognormal(mean: float, sd: float) -> list[float]:
    from scipy.special import ndtri

    variance = np.log1p((sd / mean) ** 2)
    q = np.exp(np.log(mean) - variance / 2 + np.sqrt(variance) * ndtri(np.clip(TABLE, 0.01, 0.99)))
    return [round(x, 6) for x in (q * mean / Delay(quantiles=q.tolist()).mean).tolist()]
