"""Compares the steps that TGI's own metrics count with those visible in the streams.

In 0.9.4 every running request gets one token per step, so tokens that arrive together are one step. The number of steps
and the mean time of a decode step are compared per window; the two sources share nothing but the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.model.files.records import read_scrapes
from sim.model.warning import Notice, notice
from sim.run import Run

AGREE = 0.05  # relative
MIN_STEPS = 50  # in a window: with fewer, steps at its edges decide
APART = 0.5  # of the median gap between a request's tokens: tokens that are closer belong to one step
DECODE, PREFILL = 'tgi_batch_inference_{}{{method="decode"}}', 'tgi_batch_inference_{}{{method="prefill"}}'

Floats = NDArray[np.float64]


class Steps(NamedTuple):
    """Steps in a window: their number, and the mean time of a decode step in s (NaN if unknown)."""

    number: float
    decode: float


def by_streams(token_times: Sequence[Floats], start: float, end: float) -> Steps:
    """Steps by the streams: bursts with at most one token of each request, first tokens apart from others."""
    gaps = [np.diff(t) for t in token_times if len(t) > 1]
    if not gaps:
        return Steps(0, float("nan"))
    apart = APART * float(np.median(np.concatenate(gaps)))
    tokens = sorted(
        (t, request, i == 0)
        for request, times in enumerate(token_times)
        for i, t in enumerate(times.tolist())
        if start <= t < end
    )
    count, decodes = 0, []
    began = last = float("-inf")
    members: set[int] = set()
    kind = None
    for t, request, first in tokens:
        if t - last > apart or request in members or first is not kind:
            if count and not first:
                decodes.append(t - began)
            count, began, members, kind = count + 1, t, set(), first
        members.add(request)
        last = t
    return Steps(count, float(np.mean(decodes)) if decodes else float("nan"))


def by_metrics(scrapes: Sequence[tuple[float, dict[str, float]]], start: float, end: float) -> Steps | None:
    """Steps by the server's counters, between two times of the run; None if it was not scraped then."""
    times = np.array([t for t, _ in scrapes])
    if len(times) < 2 or times[0] > start + 1.0 or times[-1] < end - 1.0:
        return None

    def increase(name: str) -> float:
        values = np.array([metrics.get(name, 0.0) for _, metrics in scrapes])
        return float(np.diff(np.interp([start, end], times, values))[0])

    decodes, prefills = increase(DECODE.format("count")), increase(PREFILL.format("count"))
    took = increase(DECODE.format("duration_sum"))
    return Steps(decodes + prefills, took / decodes if decodes > 0 else float("nan"))


def disagreements(run: Run) -> dict[int, list[Notice]]:
    """Warnings by rung number, where the server's metrics and the streams disagree."""
    scrapes = read_scrapes(run.path / "server.jsonl") if run.path is not None else []
    found: dict[int, list[Notice]] = {}
    for i, rung in enumerate(run.rungs):
        if not rung.end > rung.settled or run.token_times is None or run.event_tokens is not None:
            continue  # events of several tokens show no single steps
        counted = by_metrics(scrapes, rung.settled, rung.end)
        if counted is None or counted.number < MIN_STEPS:
            continue
        near = [t for t in run.token_times if len(t) and t[-1] >= rung.settled and t[0] < rung.end]
        seen = by_streams(near, rung.settled, rung.end)
        warnings = []
        if abs(seen.number / counted.number - 1) > AGREE:
            warnings.append(
                notice(
                    "steps-disagree",
                    f"the streams show {seen.number:.0f} steps, the server counted {counted.number:.0f}",
                )
            )
        if counted.decode > 0 and abs(seen.decode / counted.decode - 1) > AGREE:
            ms = f"{1000 * seen.decode:.2f} ms by the streams, {1000 * counted.decode:.2f} ms by the server's metrics"
            warnings.append(notice("steps-disagree", f"a decode step takes {ms}"))
        if warnings:
            found[i] = warnings
    return found
