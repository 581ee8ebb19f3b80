"""Delays between the client's clock and the server's, from a closed-loop run.

Milliseconds decide who shares a prefill, so delays are distributions. The downlink is measured against the earliest
token of each step (a delay common to all cannot be seen and does not matter). The turnaround is how soon a user whose
answer ended alone in its step sends the next request. The spacing is the time a client needs for each answer: how much
later than by chance the last user comes back where several answers end in one step. The uplink is how much longer a
prefill takes on an idle server than on a busy one; its mean comes from the regression.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from calibrate.arrays import Floats
from calibrate.schedule.admission_timing import UPLINK_SPREAD
from calibrate.schedule.schedule import Schedule
from sim.model.calibration import Clocks, Delay
from sim.model.status import Status
from sim.run import Run

# delays of a client on the same network, for runs that show none
ASSUMED = Clocks(uplink=Delay(quantiles=[1.2e-3, 1.8e-3]), turnaround=Delay(quantiles=[2e-4, 6e-4]))
TABLE = np.linspace(0.0, 1.0, 21)
_ALONE = 30  # answers that ended alone in their step: with fewer, others are used too


def fit_clocks(runs: Sequence[Run], schedules: Sequence[Schedule], round_trip: float, per_token: float) -> Clocks:
    """Delays of all runs together; `round_trip` (s, there and back) and `per_token` (s per prompt token) come from the
    regression."""
    downlink = np.concatenate([_downlink(s) for s in schedules])
    tables = [_follow_ups(r, s).assign(run=i) for i, (r, s) in enumerate(zip(runs, schedules, strict=True))]
    back = pd.concat(tables, ignore_index=True)
    there = max(round_trip - (float(downlink.mean()) if len(downlink) else 0.0), 1e-4)
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
    """How much later than the first token of its step each token was seen, s, where several requests shared the
    step."""
    n = len(schedule.steps)
    first = np.full(n, np.inf)
    np.minimum.at(first, schedule.step, schedule.time)
    shared = np.bincount(schedule.step, minlength=n)[schedule.step] > 1
    late: Floats = (schedule.time - first[schedule.step])[shared]
    return late


def _follow_ups(run: Run, schedule: Schedule) -> pd.DataFrame:
    """One row per answer whose user sent another request.

    Columns: `back` (s from its last token to the next request, think time subtracted), `group` (answers that ended in
    its step), `rank` (among these, by when they came back), `after` (as `back`, from the first of these), `next_prompt`
    (tokens), `live` (requests that continued), `run`, `rung`.
    """
    requests = run.requests
    table = pd.DataFrame(
        {
            "user": requests["user"],
            "sent": requests["sent"],
            "seen": requests["last_token"],
            "step": schedule.last,
            "ok": requests["status"] == Status.OK,
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
    """Turnarounds of answers that ended alone in their step, s, without what they take per token of the next prompt
    (which is written first) and per continuing request (whose tokens are read first); and these two costs, s.

    Where hardly any answer ends alone, the first of every step stands for it.
    """
    first = back[back["group"] == 1]
    if len(first) < _ALONE:
        first = back[back["rank"] == 0]
    # every rung counts alike, however many short answers ended in it
    first = first.groupby(["run", "rung"]).sample(_ALONE, replace=True, random_state=0)
    seen = first["back"].to_numpy(np.float64)
    by = first[["next_prompt", "live"]].to_numpy(np.float64)
    if len(first) == 0:
        return seen, 0.0, 0.0
    by = np.where(
        np.ptp(by, axis=0) < 0.2 * by.mean(axis=0), 0.0, by
    )  # a cost per unit of what hardly varies is not identified
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
    # without a queue in the client, the last of n comes back after the largest of n turnarounds
    chance = {n: _expected_largest(turnaround, n) for n in last["group"].unique().tolist()}
    alone = last["group"].map(chance) + per_token * last["next_prompt"] + reading * last["live"]
    extra = (last["after"] - alone) / (last["group"] - 1)
    # the last waits until all but the first have written their prompts
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
    # the ends are the 0.5 % and 99.5 % quantiles: extremes of thousands of values are not typical
    return [round(max(0.0, q), 6) for q in np.quantile(values, np.clip(TABLE, 0.005, 0.995)).tolist()]


def _lognormal(mean: float, sd: float) -> list[float]:
    from scipy.special import ndtri

    variance = np.log1p((sd / mean) ** 2)
    q = np.exp(np.log(mean) - variance / 2 + np.sqrt(variance) * ndtri(np.clip(TABLE, 0.01, 0.99)))
    return [round(x, 6) for x in (q * mean / Delay(quantiles=q.tolist()).mean).tolist()]
