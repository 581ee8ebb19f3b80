"""Compares the steps that the server's own metrics count with those visible in the streams.

Every running request gets at most one token per step, so tokens that arrive together are one step: in TGI 0.9.4 first
tokens have steps of their own, in vLLM they share them. Compared per window are the number of steps, and the mean time
of a decode step (TGI) or the mean gap between a request's tokens (vLLM); the two sources share nothing but the server.
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
VLLM_STEPS = "vllm:iteration_tokens_total_count"  # only steps that delivered a token
VLLM_GAP = "vllm:inter_token_latency_seconds_{}"
DECODE, PREFILL = 'tgi_batch_inference_{}{{method="decode"}}', 'tgi_batch_inference_{}{{method="prefill"}}'

Floats = NDArray[np.float64]


class Steps(NamedTuple):
    """Steps in a window: their number, and the mean time of a decode step, or gap between tokens, in s (NaN if
    unknown)."""

    number: float
    decode: float


def by_streams(token_times: Sequence[Floats], start: float, end: float, mixed: bool = False) -> Steps:
    """Steps by the streams: bursts with at most one token of each request; first tokens are apart from others, unless
    steps are `mixed`, whose decode time is the mean gap between tokens."""
    gaps = [np.diff(t) for t in token_times if len(t) > 1]
    if not gaps:
        return Steps(0, float("nan"))
    apart = APART * float(np.median(np.concatenate(gaps)))
    tokens = sorted(
        (t, request, i == 0 and not mixed)
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
    if mixed:
        ends = np.concatenate([t[1:] for t in token_times if len(t) > 1])
        decodes = np.concatenate(gaps)[(ends >= start) & (ends < end)].tolist()
    return Steps(count, float(np.mean(decodes)) if decodes else float("nan"))


def by_metrics(scrapes: Sequence[tuple[float, dict[str, float]]], start: float, end: float) -> Steps | None:
    """Steps by the server's counters, between two times of the run; None if it was not scraped then."""
    times = np.array([t for t, _ in scrapes])
    if len(times) < 2 or times[0] > start + 1.0 or times[-1] < end - 1.0:
        return None

    def increase(name: str) -> float:
        values = np.array([sum(v for key, v in metrics.items() if key.startswith(name)) for _, metrics in scrapes])
        return float(np.diff(np.interp([start, end], times, values))[0])

    if counts_mixed(scrapes):
        gaps = increase(VLLM_GAP.format("count"))
        return Steps(increase(VLLM_STEPS), increase(VLLM_GAP.format("sum")) / gaps if gaps > 0 else float("nan"))
    decodes, prefills = increase(DECODE.format("count")), increase(PREFILL.format("count"))
    took = increase(DECODE.format("duration_sum"))
    return Steps(decodes + prefills, took / decodes if decodes > 0 else float("nan"))


def counts_mixed(scrapes: Sequence[tuple[float, dict[str, float]]]) -> bool:
    """Whether the metrics are vLLM's, whose steps mix prompts and decodes."""
    return any(key.startswith(VLLM_STEPS) for _, metrics in scrapes[-1:] for key in metrics)


def disagreements(run: Run) -> dict[int, list[Notice]]:
    """Warnings by rung number, where the server's metrics and the streams disagree."""
    scrapes = read_scrapes(run.path / "server.jsonl") if run.path is not None else []
    mixed = counts_mixed(scrapes)
    took = "the mean gap between tokens is" if mixed else "a decode step takes"
    found: dict[int, list[Notice]] = {}
    for i, rung in enumerate(run.rungs):
        if not rung.end > rung.settled or run.token_times is None or run.event_tokens is not None:
            continue  # events of several tokens show no single steps
        counted = by_metrics(scrapes, rung.settled, rung.end)
        if counted is None or counted.number < MIN_STEPS:
            continue
        near = [t for t in run.token_times if len(t) and t[-1] >= rung.settled and t[0] < rung.end]
        seen = by_streams(near, rung.settled, rung.end, mixed)
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
            warnings.append(notice("steps-disagree", f"{took} {ms}"))
        if warnings:
            found[i] = warnings
    return found
