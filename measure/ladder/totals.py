"""What the reports of the load generator add up to, at any moment and over any window.

This is what the ladder decides by and shows while it climbs; results are computed from the run directory, in `sim`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from measure.ladder.precision import half_width
from measure.loadgen.client import ABORTED, OK
from measure.loadgen.messages import Ended, Report

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """A span of time as the client saw it; seconds. NaN where nothing came."""

    start: float
    end: float
    completions: int
    rps: float
    tokens_per_s: float
    ttft_p50: float
    ttft_p95: float
    e2e_mean: float
    e2e_p50: float
    e2e_p95: float
    itl: float
    half_width: float
    in_flight: float
    errors: dict[str, int] = field(default_factory=dict)
    attained: float = 1.0  # tokens that came, of those asked
    short: dict[str, int] = field(default_factory=dict)  # answers shorter than asked, by their finish_reason
    longer: int = 0  # answers of more tokens than asked
    per_event: float = 1.0  # tokens that an event carries
    spread: int = 0  # answers of which it is not known which event carried how many
    mismade: int = 0  # prompts in which the server counted other than the tokens meant
    canary_p99: float = float("nan")
    cpu: float = 0.0

    @property
    def error_rate(self) -> float:
        """Failed requests of all that ended."""
        failed = sum(self.errors.values())
        return failed / (failed + self.completions) if failed else 0.0


class Watch:
    """Everything reported so far."""

    def __init__(self) -> None:
        self.t = 0.0
        self.ended: list[Ended] = []
        self.errors: dict[str, str] = {}  # by status, the first text
        self.failures = 0  # since the last success
        self._tokens: dict[int, tuple[list[float], list[float]]] = {}  # by worker: times, total by then
        self._alive: dict[int, list[tuple[int, float]]] = {}
        self._lags: list[tuple[float, float]] = []
        self._cpu: list[tuple[float, float]] = []

    def hear(self, report: Report) -> None:
        """Take a report in."""
        self.t = max(self.t, report.t)
        if report.worker < 0:
            return
        times, totals = self._tokens.setdefault(report.worker, ([report.since], [0.0]))
        times.append(report.t)
        totals.append(totals[-1] + report.tokens)
        self._alive[report.worker] = report.alive
        self.ended += report.ended
        self._lags += [(report.t, lag) for lag in report.lags]
        self._cpu.append((report.t, report.cpu))
        for e in report.ended:
            if e.status == OK:
                self.failures = 0
            elif e.status != ABORTED:
                self.failures += 1
                self.errors.setdefault(e.status, e.error or "")

    def forget(self, before: float) -> None:
        """Drop what no window that begins at `before` or later can want."""
        self.ended = [e for e in self.ended if e.ended >= before]
        self._lags = [(t, lag) for t, lag in self._lags if t >= before]
        self._cpu = [(t, cpu) for t, cpu in self._cpu if t >= before]

    def counted(self, times: Floats) -> Floats:
        """Tokens that had come by each time."""
        total = np.zeros(len(times))
        for at, sums in self._tokens.values():
            total += np.interp(times, at, sums)
        return total

    def settled(self, users: int, since: float) -> float | None:
        """When the last of `users` ended its first request sent after `since`; None if one has not."""
        first: dict[int, float] = {}
        for e in takewhile(lambda e: e.ended >= since, reversed(self.ended)):
            if e.sent >= since:
                first[e.user] = e.ended
        return max(first.values()) if len(first) >= users else None

    def finished(self, since: float) -> int:
        """How many users have ended a request sent after `since`."""
        return len({e.user for e in takewhile(lambda e: e.ended >= since, reversed(self.ended)) if e.sent >= since})

    def alive(self) -> int:
        """Requests on their way."""
        return sum(map(len, self._alive.values()))

    def window(self, start: float, end: float) -> Window:
        """What happened in [start, end); events count by their own time (`docs/files.md`, Metrics)."""
        span = max(end - start, 1e-9)
        done = [e for e in self.ended if e.status == OK and e.last is not None and start <= e.last < end]
        first = np.array([e.first - e.scheduled for e in self.ended if e.first is not None and start <= e.first < end])
        e2e = np.array([e.last - e.scheduled for e in done if e.last is not None])
        gaps = [(e.last - e.first, e.tokens - 1) for e in done if e.first is not None and e.last is not None]
        streamed = [e for e in done if e.first is not None and e.events]
        steps = sum(n for _, n in gaps)
        cycle = float(e2e.mean()) if len(e2e) else float("nan")
        edges = np.array([start, end])
        failed = Counter(e.status for e in self.ended if e.status not in (OK, ABORTED) and start <= e.ended < end)
        return Window(
            start=start,
            end=end,
            completions=len(done),
            rps=len(done) / span,
            tokens_per_s=float(np.diff(self.counted(edges))[0]) / span,
            ttft_p50=quantile(first, 0.5),
            ttft_p95=quantile(first, 0.95),
            e2e_mean=cycle,
            e2e_p50=quantile(e2e, 0.5),
            e2e_p95=quantile(e2e, 0.95),
            itl=sum(t for t, _ in gaps) / steps if steps else float("nan"),
            half_width=half_width(self.counted, start, end, cycle),
            in_flight=self._area(start, end) / span,
            errors=dict(failed),
            attained=sum(e.tokens for e in done) / max(1, sum(e.asked for e in done)) if done else 1.0,
            short=dict(Counter(e.finish_reason or "" for e in done if e.tokens < e.asked)),
            longer=sum(e.tokens > e.asked for e in done),
            per_event=sum(e.tokens for e in streamed) / max(1, sum(e.events for e in streamed)) if streamed else 1.0,
            spread=sum(e.spread for e in done),
            mismade=sum(e.counted_prompt is not None and e.counted_prompt != e.prompt for e in done),
            canary_p99=quantile(np.array([lag for t, lag in self._lags if start <= t < end]), 0.99),
            cpu=max((cpu for t, cpu in self._cpu if start <= t < end), default=0.0),
        )

    def _area(self, start: float, end: float) -> float:
        spans = [(e.sent, e.ended) for e in self.ended if e.ended > start]
        spans += [(sent, end) for alive in self._alive.values() for _, sent in alive]
        return sum(max(0.0, min(b, end) - max(a, start)) for a, b in spans)


def quantile(values: Floats, q: float) -> float:
    """A quantile, or NaN of nothing."""
    return float(np.quantile(values, q)) if len(values) else float("nan")
