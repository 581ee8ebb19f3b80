"""What TGI's own metrics say about its steps, held against what the streams say.

In 0.9.4 every running request gets one token a step, so tokens that come together are one step. The number of steps and
the mean time of a decode step are compared per window; the two witnesses share nothing but the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.model.files.records import read_scrapes
from sim.run import Run

AGREE = 0.05  # relative
FEWEST = 50  # steps in a window, below which its edges matter more than its middle
APART = 0.5  # of the median gap between a request's tokens: what comes closer together is one step
DECODE, PREFILL = 'tgi_batch_inference_{}{{method="decode"}}', 'tgi_batch_inference_{}{{method="prefill"}}'

Floats = NDArray[np.float64]


class Steps(NamedTuple):
    """Steps in a window: how many, and the mean time of a decode step in s (NaN if unknown)."""

    number: float
    decode: float


def by_streams(token_times: Sequence[Floats], start: float, end: float) -> Steps:
    """Steps as the client saw them: bursts of tokens, of which no request has two, first tokens apart from others."""
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
    """Steps as the server counted them, between two instants of the run; None where it was not scraped."""
    times = np.array([t for t, _ in scrapes])
    if len(times) < 2 or times[0] > start + 1.0 or times[-1] < end - 1.0:
        return None

    def grown(name: str) -> float:
        values = np.array([metrics.get(name, 0.0) for _, metrics in scrapes])
        return float(np.diff(np.interp([start, end], times, values))[0])

    decodes, prefills = grown(DECODE.format("count")), grown(PREFILL.format("count"))
    took = grown(DECODE.format("duration_sum"))
    return Steps(decodes + prefills, took / decodes if decodes > 0 else float("nan"))


def disagreements(run: Run) -> dict[int, list[str]]:
    """By number of the rung: where the server's metrics and the streams tell different stories."""
    scrapes = read_scrapes(run.path / "server.jsonl") if run.path is not None else []
    found: dict[int, list[str]] = {}
    for i, rung in enumerate(run.rungs):
        if not rung.end > rung.settled or run.token_times is None or run.event_tokens is not None:
            continue  # events of several tokens show no single steps
        said = by_metrics(scrapes, rung.settled, rung.end)
        if said is None or said.number < FEWEST:
            continue
        near = [t for t in run.token_times if len(t) and t[-1] >= rung.settled and t[0] < rung.end]
        seen = by_streams(near, rung.settled, rung.end)
        warnings = []
        if abs(seen.number / said.number - 1) > AGREE:
            warnings.append(f"the streams show {seen.number:.0f} steps, the server counted {said.number:.0f}")
        if said.decode > 0 and abs(seen.decode / said.decode - 1) > AGREE:
            ms = f"{1000 * seen.decode:.2f} ms by the streams, {1000 * said.decode:.2f} ms by the server's metrics"
            warnings.append(f"a decode step takes {ms}")
        if warnings:
            found[i] = warnings
    return found
