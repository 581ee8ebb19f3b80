"""Every statistic of a run, for measured and simulated alike: latencies, rates, shares, over each rung's steady window.

Who counts (`docs/files.md`): E2E, TPOT and RPS: requests whose last token falls in [settled, end); TTFT: whose first
token does; ITL: gaps whose later token does; output tokens by their own time; input tokens at the first token. Rates
without the luck of a window's edges, which forecasts quote, are in `rates`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.model.errors import NotEnoughData
from sim.model.metric import QUANTILES
from sim.model.status import Status
from sim.model.steps import held_before
from sim.results.gaps import gaps, weighted_quantiles
from sim.run import Run, Rung

Floats = NDArray[np.float64]

SHARES = list(QUANTILES.values())


def table(run: Run, slo: Mapping[str, float] | None = None) -> pd.DataFrame:
    """One row per rung that has a steady window: its number, load, and every metric of `rung_metrics`."""
    rows = [
        {"rung": i, "load": rung.load} | rung_metrics(run, rung, slo)
        for i, rung in enumerate(run.rungs)
        if rung.end > rung.settled
    ]
    return pd.DataFrame(rows)


def rung_metrics(run: Run, rung: Rung, slo: Mapping[str, float] | None = None) -> dict[str, float]:
    """The metrics of one steady window; seconds, per second, shares of 1. NaN where nothing happened.

    `slo` (by metric, s) decides `goodput`; the run's own scenario's if absent. Whether one request keeps an ITL is
    decided by its mean.
    """
    low, high = rung.settled, rung.end
    seconds = high - low
    if not seconds > 0:
        raise NotEnoughData("the rung has no steady window")
    requests = run.requests
    status = requests["status"].to_numpy()
    ok = status == Status.OK
    first, last = requests["first_token"].to_numpy(), requests["last_token"].to_numpy()
    sent, ended = requests["scheduled"].to_numpy(), requests["ended"].to_numpy()

    done = ok & (last >= low) & (last < high)
    began = (first >= low) & (first < high)
    over = _over(requests, low, high)
    between = gaps(run, low, high)

    found = latencies(requests, low, high)
    found |= _spread("itl", between.mean(), between.quantiles(SHARES))
    found["rps"] = float(done.sum()) / seconds
    found["output_tokens_per_s"] = between.tokens / seconds
    unseen = ok.any() and np.isnan(first[ok]).all()  # not streamed: when a prompt was taken in is unknown
    prompts = requests["prompt_tokens"].to_numpy()[began]
    found["input_tokens_per_s"] = float("nan") if unseen else float(prompts.sum()) / seconds
    found["goodput"] = float((done & keeps(run, slo)).sum()) / seconds
    found["error_rate"] = error_rate(requests, low, high)
    found["overloaded_rate"] = float((over & (status == Status.OVERLOADED)).sum() / max(1, over.sum()))
    found["in_flight"] = _area(sent, ended, low, high) / seconds
    found["queue"] = _area(sent, np.where(np.isnan(first), ended, first), low, high) / seconds
    found["completions"] = float(done.sum())
    arrivals = float(((sent >= low) & (sent < high)).sum())
    growth = float(((sent < high) & (ended >= high)).sum() - ((sent < low) & (ended >= low)).sum())
    found["backlog"] = growth / max(1.0, arrivals)  # of the requests that came, the share that was left standing
    if run.steps is not None:
        found |= _shares(run, low, high)
    return found


def latencies(requests: pd.DataFrame, low: float, high: float) -> dict[str, float]:
    """E2E, TTFT and TPOT, s, of the requests of a table that count in the window."""
    status, output = requests["status"].to_numpy(), requests["output_tokens"].to_numpy()
    first, last = requests["first_token"].to_numpy(), requests["last_token"].to_numpy()
    sent = requests["scheduled"].to_numpy()
    done = (status == Status.OK) & (last >= low) & (last < high)
    began = (first >= low) & (first < high)
    several = done & (output > 1)
    tpot = (last - first)[several] / (output[several] - 1)
    found = _spread("e2e", *_of((last - sent)[done])) | _spread("ttft", *_of((first - sent)[began]))
    found |= _spread("tpot", *_of(tpot))
    if len(tpot):
        found["tpot_p50"] = float(np.median(tpot))
    return found


def error_rate(requests: pd.DataFrame, low: float, high: float) -> float:
    """The share of the requests that ended in the window without an answer."""
    over = _over(requests, low, high)
    return float((over & (requests["status"].to_numpy() != Status.OK)).sum() / max(1, over.sum()))


def class_metrics(run: Run, rung: Rung) -> dict[str, float]:
    """Latencies and error rate of each class of a mix, under `CLASS.METRIC`."""
    found: dict[str, float] = {}
    for each in run.scenario.workload.classes:
        mine = run.requests[run.requests["class"] == each.name]
        values = latencies(mine, rung.settled, rung.end)
        values["error_rate"] = error_rate(mine, rung.settled, rung.end)
        found |= {f"{each.name}.{name}": value for name, value in values.items()}
    return found


def _over(requests: pd.DataFrame, low: float, high: float) -> NDArray[np.bool_]:
    ended, status = requests["ended"].to_numpy(), requests["status"].to_numpy()
    return np.asarray((ended >= low) & (ended < high) & (status != Status.ABORTED))


def keeps(run: Run, slo: Mapping[str, float] | None = None) -> NDArray[np.bool_]:
    """Which requests, if answered, keep every one of the `slo` (by metric, s; the scenario's if absent)."""
    requests = run.requests
    first, last = requests["first_token"].to_numpy(), requests["last_token"].to_numpy()
    sent, output = requests["scheduled"].to_numpy(), requests["output_tokens"].to_numpy()
    each = (last - first) / np.maximum(output - 1, 1)
    per_request = {"e2e": last - sent, "ttft": first - sent, "tpot": each, "itl": each}
    kept = np.ones(len(requests), dtype=bool)
    for metric, limit in (run.scenario.slo if slo is None else slo).items():
        what = metric.partition("_")[0]
        if what in per_request:
            kept &= per_request[what] <= limit
    return kept


def _of(values: Floats) -> tuple[float, list[float]]:
    """Mean and quantiles of one number a request; NaN without any."""
    mean = float(values.mean()) if len(values) else float("nan")
    return mean, weighted_quantiles(values, np.ones(len(values)), SHARES)


def _spread(name: str, mean: float, quantiles: list[float]) -> dict[str, float]:
    return {f"{name}_mean": mean} | {f"{name}_{q}": at for q, at in zip(QUANTILES, quantiles, strict=True)}


def _area(start: Floats, end: Floats, low: float, high: float) -> float:
    """∫ N dt over the window: the overlap of every request with it, unfinished ones included."""
    return float(np.clip(np.minimum(end, high) - np.maximum(start, low), 0.0, None).sum())


def _shares(run: Run, low: float, high: float) -> dict[str, float]:
    """What a server did in the window, on the average over the fleet's: shares of time, mean decode batch, occupancy of
    the token budget."""
    assert run.steps is not None
    steps = run.steps
    start, end, sequences = (steps[name].to_numpy() for name in ("start", "end", "decode_sequences"))
    overlap = np.clip(np.minimum(end, high) - np.maximum(start, low), 0.0, None)
    seconds = (high - low) * run.scenario.served_by.count
    decode = np.where(sequences > 0, overlap, 0.0)
    chunks = float((overlap * steps["chunk_share"].to_numpy()).sum())  # of prompts, beside decodes
    busy = {
        "prefill": float(overlap[sequences == 0].sum()) + chunks,
        "decode": float(overlap[sequences > 0].sum()) - chunks,
    }
    budgets = [server.kv_tokens for server in run.scenario.servers]
    found = {
        "prefill_share": busy["prefill"] / seconds,
        "decode_share": busy["decode"] / seconds,
        "idle_share": max(0.0, 1.0 - (busy["prefill"] + busy["decode"]) / seconds),
        "mean_batch": float((decode * sequences).sum() / decode.sum()) if decode.any() else 0.0,
    }
    if None not in budgets:
        room = np.array(budgets, dtype=np.float64)[steps["replica"].to_numpy()]
        held = held_before(steps) / room
        found["budget_share"] = float((decode * held).sum() / decode.sum()) if decode.any() else 0.0
    return found
