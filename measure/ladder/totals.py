"""Running totals of the load generator's reports, at any moment and over any window.

The ladder decides by them and shows them while it runs; results are computed from the run directory, in `sim.results`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from measure.ladder.precision import half_width
from measure.loadgen.messages import FinishedRequest, Report
from sim.model.status import Status

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """A span of time as measured by the client; times in s. NaN where nothing was observed."""

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
    errors: dict[Status, int] = field(default_factory=dict)
    attained: float = 1.0  # tokens received, as a share of those requested
    short: dict[str, int] = field(default_factory=dict)  # answers shorter than requested, by finish_reason
    longer: int = 0  # answers longer than requested
    per_event: float = 1.0  # mean tokens per event
    spread: int = 0  # answers whose tokens were spread evenly over their events
    wrong_prompts: int = 0  # prompts whose length by the server's count is not the intended one
    canary_p99: float = float("nan")
    cpu: float = 0.0

    @property
    def error_rate(self) -> float:
        """Failed requests as a share of all that ended."""
        failed = sum(self.errors.values())
        return failed / (failed + self.completions) if failed else 0.0


class Totals:
    """Everything reported so far."""

    def __init__(self) -> None:
        self.t = 0.0
        self.finished: list[FinishedRequest] = []
        self.errors: dict[Status, str] = {}  # the first error text of each status
        self.failures = 0  # since the last success
        self._tokens: dict[int, tuple[list[float], list[float]]] = {}  # by worker: times, and totals at these times
        self._in_flight: dict[int, list[tuple[int, float]]] = {}
        self._lags: list[tuple[float, float]] = []
        self._cpu: list[tuple[float, float]] = []

    def add(self, report: Report) -> None:
        """Add a report."""
        self.t = max(self.t, report.t)
        if report.worker < 0:
            return
        times, totals = self._tokens.setdefault(report.worker, ([report.since], [0.0]))
        times.append(report.t)
        totals.append(totals[-1] + report.tokens)
        self._in_flight[report.worker] = report.in_flight
        self.finished += report.finished
        self._lags += [(report.t, lag) for lag in report.lags]
        self._cpu.append((report.t, report.cpu))
        for e in report.finished:
            if e.status == Status.OK:
                self.failures = 0
            elif e.status != Status.ABORTED:
                self.failures += 1
                self.errors.setdefault(e.status, e.error or "")

    def forget(self, before: float) -> None:
        """Drop what no window that begins at `before` or later needs."""
        self.finished = [e for e in self.finished if e.ended >= before]
        self._lags = [(t, lag) for t, lag in self._lags if t >= before]
        self._cpu = [(t, cpu) for t, cpu in self._cpu if t >= before]

    def counted(self, times: Floats) -> Floats:
        """The number of tokens received by each time."""
        total = np.zeros(len(times))
        for at, sums in self._tokens.values():
            total += np.interp(times, at, sums)
        return total

    def settled(self, users: int, since: float) -> float | None:
        """The time at which every one of `users` had finished a request sent after `since`; None if one has not yet."""
        first: dict[int, float] = {}
        for e in takewhile(lambda e: e.ended >= since, reversed(self.finished)):
            if e.sent >= since:
                first[e.user] = e.ended
        return max(first.values()) if len(first) >= users else None

    def users_finished(self, since: float) -> int:
        """How many users have finished a request sent after `since`."""
        return len({e.user for e in takewhile(lambda e: e.ended >= since, reversed(self.finished)) if e.sent >= since})

    def in_flight(self) -> int:
        """Requests in flight."""
        return sum(map(len, self._in_flight.values()))

    def window(self, start: float, end: float) -> Window:
        """What happened in [start, end): a completion counts by its last token, a first token by its own time."""
        span = max(end - start, 1e-9)
        done = [e for e in self.finished if e.status == Status.OK and e.last is not None and start <= e.last < end]
        first = np.array(
            [e.first - e.scheduled for e in self.finished if e.first is not None and start <= e.first < end]
        )
        e2e = np.array([e.last - e.scheduled for e in done if e.last is not None])
        gaps = [(e.last - e.first, e.tokens - 1) for e in done if e.first is not None and e.last is not None]
        streamed = [e for e in done if e.first is not None and e.events]
        steps = sum(n for _, n in gaps)
        cycle = float(e2e.mean()) if len(e2e) else float("nan")
        edges = np.array([start, end])
        failed: Counter[Status] = Counter(
            e.status for e in self.finished if e.status not in (Status.OK, Status.ABORTED) and start <= e.ended < end
        )
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
            attained=sum(e.tokens for e in done) / max(1, sum(e.max_new_tokens for e in done)) if done else 1.0,
            short=dict(Counter(e.finish_reason or "" for e in done if e.tokens < e.max_new_tokens)),
            longer=sum(e.tokens > e.max_new_tokens for e in done),
            per_event=sum(e.tokens for e in streamed) / max(1, sum(e.events for e in streamed)) if streamed else 1.0,
            spread=sum(e.spread for e in done),
            wrong_prompts=sum(e.counted_prompt is not None and e.counted_prompt != e.prompt_tokens for e in done),
            canary_p99=quantile(np.array([lag for t, lag in self._lags if start <= t < end]), 0.99),
            cpu=max((cpu for t, cpu in self._cpu if start <= t < end), default=0.0),
        )

    def _area(self, start: float, end: float) -> float:
        spans = [(e.sent, e.ended) for e in self.finished if e.ended > start]
        spans += [(sent, end) for requests in self._in_flight.values() for _, sent in requests]
        return sum(max(0.0, min(b, end) - max(a, start)) for a, b in spans)


def quantile(values: Floats, q: float) -> float:
    """A quantile; NaN of no values."""
    return float(np.quantile(values, q)) if len(values) else float("nan")
