"""The gaps between a request's consecutive tokens: all of them, without walking over every step.

Where an event carries several tokens, they are the gaps between events (`events`).

The gaps of a run of decode steps of one batch are a line: `first`, `first + growth`, ... So a run of a thousand steps
is one row here, and what is asked of gaps costs the same however long the answers are (without noise).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.model.status import Status
from sim.results.events import event_times
from sim.run import Run
from sim.steptime.segment import Segment

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FEW = 10_000  # gaps that are laid out one by one
ENOUGH = 1 - 1e-12  # of the wanted weight: sums of weights round


@dataclass(frozen=True)
class Gaps:
    """Lines of gaps: row i is `count[i]` gaps from `first[i]` s on, each `growth[i]` s longer than the one before, and
    `weight[i]` requests had each of them. `tokens` is how many tokens came in the window, first ones included."""

    first: Floats
    growth: Floats
    count: Ints
    weight: Floats
    tokens: float

    def mean(self) -> float:
        """The mean over all gaps; NaN without any."""
        total = float((self.count * self.weight).sum())
        sums = self.count * self.first + self.growth * (self.count * (self.count - 1) / 2)
        return float((sums * self.weight).sum()) / total if total else float("nan")

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """For each share, the least gap such that this share of all gaps is no longer; NaN without any."""
        total = float((self.count * self.weight).sum())
        if not total:
            return [float("nan")] * len(shares)
        if len(self.count) == self.count.sum():
            return weighted_quantiles(self.first, self.weight, shares)
        return [self._quantile(share * total * ENOUGH) for share in shares]

    def _quantile(self, wanted: float) -> float:
        first, growth, count, weight = self.first, self.growth, self.count, self.weight
        low, high = float(first.min()), float((first + growth * (count - 1)).max())
        for _ in range(64):  # halve the range until few gaps are left in it (or all that are left are equal)
            if count.sum() <= FEW:
                break
            middle = (low + high) / 2
            with np.errstate(divide="ignore", invalid="ignore"):
                line = np.floor((middle - first) / growth) + 1
            under = np.clip(np.where(growth > 0, line, np.where(first <= middle, count, 0)), 0, count).astype(np.int64)
            mass = float((under * weight).sum())
            if mass >= wanted:
                high, count = middle, under
            else:
                low, wanted = middle, wanted - mass
                first, count = first + growth * under, count - under
            left = count > 0
            first, growth, count, weight = first[left], growth[left], count[left], weight[left]
        place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return _at(np.repeat(first, count) + np.repeat(growth, count) * place, np.repeat(weight, count), [wanted])[0]


def weighted_quantiles(values: Floats, weights: Floats, shares: Sequence[float]) -> list[float]:
    """For each share, the least value at or below which this share of the weight lies; NaN without values."""
    if not len(values):
        return [float("nan")] * len(shares)
    total = float(weights.sum())
    return _at(values, weights, [share * total * ENOUGH for share in shares])


def _at(values: Floats, weights: Floats, wanted: Sequence[float]) -> list[float]:
    order = np.argsort(values)
    at = np.searchsorted(np.cumsum(weights[order]), wanted)
    found: list[float] = values[order[np.minimum(at, len(order) - 1)]].tolist()
    return found


def gaps(run: Run, low: float, high: float) -> Gaps:
    """The gaps whose later token came in [low, high), s since the run began."""
    if run.token_times is None and run.steps is not None:
        return _of_fleet(run.steps, run.step_ends or [], low, high)
    # of an answer that was not streamed it is only known when it came
    last = run.requests["last_token"].to_numpy()
    whole = (last >= low) & (last < high) & (run.requests["status"].to_numpy() == Status.OK)
    times = run.token_times or []
    if times:
        whole &= np.array([not len(t) for t in times], dtype=bool)
    carried = run.event_tokens if times and run.event_tokens is not None else [None] * len(times)
    return _measured(times, carried, low, high, float(run.requests["output_tokens"].to_numpy()[whole].sum()))


def _single(values: Floats, weights: Floats, tokens: float) -> Gaps:
    return Gaps(values, np.zeros(len(values)), np.ones(len(values), dtype=np.int64), weights, tokens)


def _measured(
    token_times: Sequence[Floats], event_tokens: Sequence[Ints | None], low: float, high: float, tokens: float
) -> Gaps:
    """The gaps between the events of streams; `tokens` came besides, in one piece."""
    parts = []
    for times, carried in zip(token_times, event_tokens, strict=True):
        if not len(times) or times[-1] < low or times[0] >= high:
            continue
        a, b = np.searchsorted(times, [low, high], side="left")
        tokens += int(b - a)
        if carried is not None:
            times = event_times(times, carried)
            a, b = np.searchsorted(times, [low, high], side="left")
        parts.append(np.diff(times[max(a - 1, 0) : b]))
    values = np.concatenate(parts) if parts else np.empty(0)
    return _single(values, np.ones(len(values)), tokens)


def _of_fleet(steps: pd.DataFrame, step_ends: list[Floats], low: float, high: float) -> Gaps:
    """Of every replica, whose rows of `steps` stand together, by itself."""
    edges = [0, *(np.flatnonzero(np.diff(steps["replica"].to_numpy())) + 1).tolist(), len(steps)]
    if len(edges) == 2:
        return _simulated(steps, step_ends, low, high)
    decodes = np.concatenate([[0], np.cumsum(steps["decode_sequences"].to_numpy() > 0)])
    parts = [_simulated(steps.iloc[a:b], step_ends[decodes[a] : decodes[b]], low, high) for a, b in pairwise(edges)]
    return _joined(parts)


def _joined(parts: Sequence[Gaps]) -> Gaps:
    first, growth, count, weight = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("first", "growth", "count", "weight")
    )
    return Gaps(first, growth, count, weight, sum(part.tokens for part in parts))


def _simulated(steps: pd.DataFrame, step_ends: list[Floats], low: float, high: float) -> Gaps:
    """From the steps: every decoding request gets a token at each step's end, and its first with its prompt's last.

    The first step of a row ends a gap that began, for those that were decoding, at the decode step before (prefills and
    filtering may lie in between), and for those just prefilled at their prefill. The gap that a preemption makes is not
    among them: its length depends on whose it is.
    """
    start, end, decoding = (steps[name].to_numpy() for name in ("start", "end", "decode_sequences"))
    tokens = float(steps["begun"].to_numpy()[(end >= low) & (end < high)].sum())
    rows = np.flatnonzero((decoding > 0) & (end >= low) & (start < high))
    if not len(rows):
        return _single(np.empty(0), np.empty(0), tokens)
    number = np.cumsum(decoding > 0) - 1  # of each row among the decode rows
    count = steps["count"].to_numpy()[rows]
    sequences = decoding[rows].astype(np.float64)

    # the steps of a row that end in the window are a, a + 1, ... b - 1, counted from 0
    if step_ends:
        ends = np.concatenate(step_ends[number[rows[0]] : number[rows[-1]] + 1])
        begins = np.cumsum(count) - count
        a, b = (np.clip(np.searchsorted(ends, edge) - begins, 0, count) for edge in (low, high))
        came = ends[begins]
        inside = (ends >= low) & (ends < high)
        inside[begins] = False
        later = np.flatnonzero(inside)
        lines = _single(ends[later] - ends[later - 1], np.repeat(sequences, count)[later], 0.0)
    else:
        first, growth, extra = (steps[name].to_numpy()[rows] for name in ("first", "growth", "extra"))
        came = start[rows] + extra + first
        a, b = np.zeros_like(count), count.copy()
        for edge, at in ((low, a), (high, b)):
            for i in np.flatnonzero((start[rows] < edge) & (end[rows] >= edge)):  # one at most: rows do not overlap
                run = Segment(start[rows[i]], first[i], growth[i], extra[i])
                at[i] = run.steps_by(edge) - 1
        second = np.maximum(a, 1)
        on = b > second
        lines = Gaps((first + growth * second)[on], growth[on], (b - second)[on], sequences[on], 0.0)

    tokens += float((sequences * (b - a)).sum())
    begun = (a == 0) & (b > 0)
    values, weights = _first_gaps(steps, rows[begun], came[begun])
    return _joined([_single(values, weights, tokens), lines])


def _first_gaps(steps: pd.DataFrame, row: Ints, came: Floats) -> tuple[Floats, Floats]:
    """The gaps that end with the first step of each decode `row`, at `came`, and how many requests had them."""
    decoding, end = steps["decode_sequences"].to_numpy(), steps["end"].to_numpy()
    kept = np.where(decoding == 0, steps["kept"].to_numpy(), 0)
    before = np.concatenate([[0], np.cumsum(kept)])
    decodes = np.flatnonzero(decoding)
    prior = np.concatenate([[-1], decodes])[np.searchsorted(decodes, row)]
    fresh = before[row] - before[prior + 1]  # prefilled since the decode row before
    old = decoding[row] - fresh
    has = (old > 0) & (prior >= 0)
    values, weights = [(came - end[prior])[has]], [old[has].astype(np.float64)]
    for back in (1, 2):  # at most two prefills in a row while somebody is running (router/src/infer.rs:246-354)
        at = row - back
        fits = (at > prior) & (at >= 0) & (kept[np.maximum(at, 0)] > 0)
        values.append((came - end[at])[fits])
        weights.append(kept[at[fits]].astype(np.float64))
    return np.concatenate(values), np.concatenate(weights)
