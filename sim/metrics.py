"""Every statistic of a run, for measured and simulated alike: latencies, rates, shares, over each rung's steady window.

Who counts (`formats.md`): E2E, TPOT and RPS: requests whose last token falls in [settled, end); TTFT: whose first token
does; ITL: gaps whose later token does; output tokens by their own time; input tokens at the first token.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.errors import NotEnoughData
from sim.run import Run, Rung
from sim.steps import DECODE, PREFILL

Floats = NDArray[np.float64]

QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
COMPARED = (
    *(f"{what}_{which}" for what in ("e2e", "ttft", "itl") for which in ("mean", *QUANTILES)),
    "tpot_mean",
    "tpot_p50",
    "rps",
    "output_tokens_per_s",
    "input_tokens_per_s",
    "goodput",
    "error_rate",
    "overloaded_rate",
)
PER_REQUEST = ("e2e", "ttft", "tpot")  # what an SLO can be put on, request by request


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

    `slo` (by metric, s) decides `goodput`; the run's own scenario's if absent.
    """
    low, high = rung.settled, rung.end
    seconds = high - low
    if not seconds > 0:
        raise NotEnoughData("the rung has no steady window")
    requests = run.requests
    status = requests["status"].to_numpy()
    ok = status == "ok"
    first, last = requests["first_token"].to_numpy(), requests["last_token"].to_numpy()
    sent, ended = requests["scheduled"].to_numpy(), requests["ended"].to_numpy()
    output = requests["output_tokens"].to_numpy()

    done = ok & (last >= low) & (last < high)
    began = (first >= low) & (first < high)
    over = (ended >= low) & (ended < high) & (status != "aborted")
    e2e = (last - sent)[done]
    ttft = (first - sent)[began]
    several = done & (output > 1)
    tpot = (last - first)[several] / (output[several] - 1)
    gaps, weights, tokens = _gaps(run, low, high)

    found: dict[str, float] = {}
    for name, values in (("e2e", e2e), ("ttft", ttft)):
        found |= _spread(name, values, np.ones(len(values)))
    found |= _spread("itl", gaps, weights)
    found["tpot_mean"] = float(tpot.mean()) if len(tpot) else float("nan")
    found["tpot_p50"] = float(np.median(tpot)) if len(tpot) else float("nan")
    found["rps"] = float(done.sum()) / seconds
    found["output_tokens_per_s"] = tokens / seconds
    found["input_tokens_per_s"] = float(requests["prompt_tokens"].to_numpy()[began].sum()) / seconds
    per_request = {"e2e": last - sent, "ttft": first - sent, "tpot": (last - first) / np.maximum(output - 1, 1)}
    good = done.copy()
    for metric, limit in (run.scenario.slo if slo is None else slo).items():
        what = metric.partition("_")[0]
        if what in per_request:
            good &= per_request[what] <= limit
    found["goodput"] = float(good.sum()) / seconds
    found["error_rate"] = float((over & ~ok).sum() / max(1, over.sum()))
    found["overloaded_rate"] = float((over & (status == "overloaded")).sum() / max(1, over.sum()))
    found["in_flight"] = _area(sent, ended, low, high) / seconds
    found["queue"] = _area(sent, np.where(np.isnan(first), ended, first), low, high) / seconds
    found["completions"] = float(done.sum())
    arrivals = float(((sent >= low) & (sent < high)).sum())
    growth = float(((sent < high) & (ended >= high)).sum() - ((sent < low) & (ended >= low)).sum())
    found["backlog"] = growth / max(1.0, arrivals)  # of the requests that came, the share that was left standing
    if run.steps is not None:
        found |= _shares(run, low, high)
    return found


def weighted_quantile(values: Floats, weights: Floats, q: Floats) -> Floats:
    """The least value below or at which a share `q` of the weight lies."""
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    at = np.searchsorted(total, q * total[-1] * (1 - 1e-12))
    quantiles: Floats = values[order][np.minimum(at, len(order) - 1)]
    return quantiles


def _spread(name: str, values: Floats, weights: Floats) -> dict[str, float]:
    names = [f"{name}_{which}" for which in ("mean", *QUANTILES)]
    if not len(values):
        return dict.fromkeys(names, float("nan"))
    at = weighted_quantile(values, weights, np.array(list(QUANTILES.values())))
    mean = float(np.average(values, weights=weights))
    return dict(zip(names, [mean, *at.tolist()], strict=True))


def _area(start: Floats, end: Floats, low: float, high: float) -> float:
    """∫ N dt over the window: the overlap of every request with it, unfinished ones included."""
    return float(np.clip(np.minimum(end, high) - np.maximum(start, low), 0.0, None).sum())


def _gaps(run: Run, low: float, high: float) -> tuple[Floats, Floats, float]:
    """The gaps between tokens that end in the window, how many requests had each, and the tokens that came in it."""
    if run.token_times is not None:
        return _measured_gaps(run.token_times, low, high)
    if run.steps is not None:
        return _simulated_gaps(run, low, high)
    # neither: a run that was not streamed knows only when its answers came
    last = run.requests["last_token"].to_numpy()
    inside = (last >= low) & (last < high)
    return np.empty(0), np.empty(0), float(run.requests["output_tokens"].to_numpy()[inside].sum())


def _measured_gaps(token_times: list[Floats], low: float, high: float) -> tuple[Floats, Floats, float]:
    parts, tokens = [], 0
    for times in token_times:
        if not len(times) or times[-1] < low or times[0] >= high:
            continue
        a, b = np.searchsorted(times, [low, high], side="left")
        tokens += int(b - a)
        parts.append(np.diff(times[max(a - 1, 0) : b]))
    gaps = np.concatenate(parts) if parts else np.empty(0)
    return gaps, np.ones(len(gaps)), float(tokens)


def _simulated_gaps(run: Run, low: float, high: float) -> tuple[Floats, Floats, float]:
    """From the steps: every running request gets a token at each decode step's end, and its first at its prefill's.

    The first step of a row ends a gap that began, for those that were running, at the decode step before (prefills and
    filtering lie in between), and for those just prefilled at their prefill.
    """
    assert run.steps is not None
    steps = run.steps
    kind, sequences = steps["kind"].to_numpy(), steps["sequences"].to_numpy()
    start, end = steps["start"].to_numpy(), steps["end"].to_numpy()
    seen = (end >= low) & (start < high)
    prefilled = seen & (kind == PREFILL) & (end < high)
    tokens = float(sequences[prefilled].sum())

    rows = np.flatnonzero(kind == DECODE)
    number = np.cumsum(kind == DECODE) - 1  # of each row among the decode rows
    values: list[Floats] = []
    weights: list[Floats] = []
    ends_of: list[Floats] = []
    inside = rows[seen[rows]]
    counts = steps["count"].to_numpy()
    if run.step_ends is not None and len(run.step_ends):
        ends_of = [run.step_ends[number[i]] for i in inside]
        ends = np.concatenate(ends_of) if ends_of else np.empty(0)
        step = np.concatenate([np.arange(1, counts[i] + 1) for i in inside]) if len(inside) else np.empty(0)
        row = np.repeat(inside, counts[inside])
    else:
        row = np.repeat(inside, counts[inside])
        step = np.arange(1, len(row) + 1) - np.repeat(np.cumsum(counts[inside]) - counts[inside], counts[inside])
        line = steps["first"].to_numpy()[row], steps["growth"].to_numpy()[row], steps["extra"].to_numpy()[row]
        ends = start[row] + line[2] + step * line[0] + line[1] * (step * (step - 1) / 2)
    late = ends >= low
    late &= ends < high
    tokens += float(sequences[row[late]].sum())

    later = np.flatnonzero(late & (step > 1))
    values.append(ends[later] - ends[later - 1])
    weights.append(sequences[row[later]].astype(np.float64))

    kept = np.where(kind == PREFILL, steps["kept"].to_numpy(), 0)
    before = np.concatenate([[0], np.cumsum(kept)])
    previous = np.concatenate([[-1], rows[:-1]]) if len(rows) else rows
    firsts = np.flatnonzero(late & (step == 1))
    row_of = row[firsts]
    prior = previous[number[row_of]]
    fresh = before[row_of] - before[prior + 1]  # prefilled since the decode row before
    old = sequences[row_of] - fresh
    has = (old > 0) & (prior >= 0)
    values.append((ends[firsts] - end[prior])[has])
    weights.append(old[has].astype(np.float64))
    for back in (1, 2):  # at most two prefills in a row while somebody is running (`tgi-0.9.4.md` §3.2)
        at = row_of - back
        fits = (at > prior) & (at >= 0) & (kept[np.maximum(at, 0)] > 0)
        values.append((ends[firsts] - end[at])[fits])
        weights.append(kept[at[fits]].astype(np.float64))
    return np.concatenate(values), np.concatenate(weights), tokens


def _shares(run: Run, low: float, high: float) -> dict[str, float]:
    """What the server did in the window: shares of time, mean decode batch, occupancy of the token budget."""
    assert run.steps is not None
    steps = run.steps
    kind, start, end = steps["kind"].to_numpy(), steps["start"].to_numpy(), steps["end"].to_numpy()
    overlap = np.clip(np.minimum(end, high) - np.maximum(start, low), 0.0, None)
    seconds = high - low
    busy = {what: float(overlap[kind == code].sum()) for what, code in (("prefill", PREFILL), ("decode", DECODE))}
    decode = np.where(kind == DECODE, overlap, 0.0)
    budget = run.scenario.server.max_batch_total_tokens
    found = {
        "prefill_share": busy["prefill"] / seconds,
        "decode_share": busy["decode"] / seconds,
        "idle_share": max(0.0, 1.0 - (busy["prefill"] + busy["decode"]) / seconds),
        "mean_batch": float((decode * steps["sequences"].to_numpy()).sum() / decode.sum()) if decode.any() else 0.0,
    }
    if isinstance(budget, int):
        found["budget_share"] = (
            float((decode * steps["used"].to_numpy()).sum() / decode.sum() / budget) if decode.any() else 0.0
        )
    return found
