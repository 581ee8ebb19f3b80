"""One rung of the ladder, in three phases: ramp, settle, measure. Decides what ends each phase; no I/O, no waiting.

Ramp ends when all users run; settle when each has finished a request sent since then (open loop: after `settle`
seconds); measure after exactly `seconds`, or once the throughput is known to ±2 % and enough requests are complete.
Each phase has a limit; a rung that reaches one has the status `limited` and a warning.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import msgspec

from measure.apis.http_error import clean
from measure.ladder.precision import CYCLES
from measure.ladder.totals import Totals, Window
from sim.model.scenario import Load, least_completions
from sim.model.warning import Notice, notice

PRECISE = 0.02  # relative half-width of tokens/s, 95 %
ERRORS_LIMIT = 0.01
ATTAINED = 0.99
MODEL_ENDED = (
    "eos_token",
    "stop_sequence",
    "tool_calls",
    "function_call",
)  # finish reasons
KEPT_UP = 0.95  # answers per arrival in open loop, less two standard errors of a Poisson stream
CANARY_SUSPECT, CANARY_LIMITED = 0.005, 0.020  # s, at p99; tools/check_client.py shows how lag shifts step times
SLACK_SECONDS = 10.0  # beyond users / spawn_rate, after which a ramp has failed


def default_users(limit: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, … up to `limit`."""
    users, step = [1, 2, 3], 4
    while step <= limit:
        users += [step, step * 3 // 2]
        step *= 2
    return [n for n in users if n <= limit]


class Rung:
    """The state of one rung. `users` is None in open loop; `span` is the length of a trace, s."""

    def __init__(self, load: Load, start: float, users: int | None, rate: float | None, span: float | None = None):
        self._load, self.start, self.users, self.rate, self._span = load, start, users, rate, span
        self.ramped: float | None = None if users is not None else start
        self.settled: float | None = None
        self.end: float | None = None
        self.status = "complete"
        self.warnings: list[Notice] = []

    @property
    def label(self) -> str:
        """The load in words."""
        return f"{self.users} user{'s' if self.users != 1 else ''}" if self.users is not None else f"{self.rate:g}/s"

    @property
    def phase(self) -> str:
        """The current phase."""
        if self.ramped is None:
            return "ramp"
        return "settle" if self.settled is None else "measure" if self.end is None else "done"

    @property
    def fixed(self) -> float | None:
        """The length of the window, s; None if it depends on the precision reached."""
        assert self.settled is not None
        if self._span is None:
            return self._load.seconds
        left = self.start + self._span - self.settled
        return left if self._load.seconds is None else min(self._load.seconds, left)

    @property
    def latest(self) -> float:
        """The latest end of the window, s since the run began."""
        assert self.settled is not None
        return self.settled + (self._load.max_seconds if self.fixed is None else self.fixed)

    def window(self, totals: Totals, now: float) -> Window | None:
        """The window so far; it never extends beyond its latest end, however late the reports are."""
        return None if self.settled is None else totals.window(self.settled, min(now, self.latest))

    def step(self, totals: Totals, now: float, window: Window | None) -> str:
        """Update the phase from what has been reported; returns what the rung waits for."""
        if self.ramped is None:
            assert self.users is not None
            if now - self.start > self.users / self._load.spawn_rate + SLACK_SECONDS:
                self._limit(notice("users-not-started", "not all users could be started"))
                self.ramped = now
            return "starting users"
        if self.settled is None:
            return self._settle(totals, now)
        return self._measure(now, window)

    def _settle(self, totals: Totals, now: float) -> str:
        assert self.ramped is not None
        if self.users is None:
            due = self.start + (self._load.settle if self._span is None else min(self._load.settle, self._span / 2))
            if now >= due:
                self.settled = due
            return f"settling for {max(0.0, due - now):.0f} s more"
        self.settled = totals.settled(self.users, self.ramped)
        if self.settled is None and now - self.ramped >= self._load.max_seconds:
            self._limit(
                notice(
                    "not-settled", f"not steady: not every user finished a request within {self._load.max_seconds:g} s"
                )
            )
            self.settled = now
        missing = self.users - totals.users_finished(self.ramped)
        return f"settling: {missing} of {self.users} users have yet to finish a request at this load"

    def _measure(self, now: float, window: Window | None) -> str:
        assert self.settled is not None
        if self.fixed is not None:
            if now >= self.latest:
                self.end = self.latest
            return f"measuring for {max(0.0, self.latest - now):.0f} s more"
        least = least_completions(self.users or 0)
        done = window.completions if window is not None else 0
        half = window.half_width if window is not None else float("inf")
        pending = []
        if done < least:
            pending.append(f"{done} of {least} requests")
        if not half <= PRECISE:
            known = f"to ±{half:.1%}, not yet ±{PRECISE:.0%}" if half < 10 else "to no precision: too short yet"
            pending.append(f"tokens/s known {known}")
        if window is not None and not pending:
            self.end = window.end  # the window that was tested, which may be up to a second old
        elif now >= self.latest:
            self.end = self.latest
            self._limit(
                notice(
                    "imprecise-window",
                    f"the window reached its limit of {self._load.max_seconds:g} s with {' and '.join(pending)}",
                )
            )
        return "measuring: " + " and ".join(pending)

    def cut(self, now: float) -> None:
        """End the window now, if it has begun: the budget is spent."""
        if self.settled is not None:
            self.end = now
            self._limit(notice("cut-short", "cut short: the budget was spent"))

    def _limit(self, warning: Notice) -> None:
        self.status = "limited"
        self.warnings.append(warning)

    def record(self, window: Window | None = None) -> dict[str, Any]:
        """The rung as `run.json` has it; without its window it is `aborted`."""
        load = {"users": self.users} if self.users is not None else {"rate": self.rate}
        times = {"start": self.start, "ramped": self.ramped, "settled": self.settled, "end": self.end}
        head: dict[str, Any] = {
            **load,
            **{name: None if t is None else round(t, 6) for name, t in times.items()},
            "status": self.status if window is not None else "aborted",
            "warnings": msgspec.to_builtins(self.warnings),
        }
        return head if window is None else head | client_view(window)


def client_view(w: Window) -> dict[str, Any]:
    """What the client observed, and how the client itself performed; results are computed from the records instead."""
    return {
        "completions": w.completions,
        "errors": w.errors,
        "attained": _rounded(w.attained),
        "in_flight": _rounded(w.in_flight),
        "half_width": _rounded(w.half_width) if w.half_width < float("inf") else None,
        "canary_p99_ms": _rounded(1000 * w.canary_p99),
        "client_cpu": _rounded(w.cpu),
        "client_limited": client_limited(w),
    }


def _rounded(x: float) -> float | None:
    return None if x != x else round(x, 4)


def client_limited(w: Window) -> bool:
    """Whether the client was delayed so much that its times do not describe the server."""
    return w.canary_p99 > CANARY_LIMITED


def window_warnings(w: Window, users: int | None, rate: float | None = None) -> list[Notice]:
    """Warnings about a window; `users` or `rate` is its load."""
    found = []
    lag = f"the load generator was delayed by {1000 * w.canary_p99:.1f} ms at p99"
    if client_limited(w):
        found.append(
            notice(
                "client-limited",
                f"client-limited: {lag} (gaps between tokens are {1000 * w.itl:.1f} ms); calibration excludes this "
                "load if others are left",
            )
        )
    elif w.canary_p99 > CANARY_SUSPECT:
        found.append(notice("client-late", f"suspect: {lag}"))
    if w.error_rate > ERRORS_LIMIT:
        kinds = ", ".join(f"{n} {status}" for status, n in sorted(w.errors.items()))
        found.append(notice("requests-failed", f"unhealthy: {w.error_rate:.1%} of the requests failed ({kinds})"))
    if w.attained < ATTAINED:
        found.append(
            notice("answers-short", f"answers have {w.attained:.0%} of the tokens requested: {_why_short(w.short)}")
        )
    if w.longer:
        found.append(
            notice(
                "answers-long",
                f"{w.longer} of {w.completions} answers are longer than requested: the server does not apply "
                "max_tokens; a forecast of this scenario assumes the requested length",
            )
        )
    if w.per_event != 1.0:
        found.append(
            notice(
                "bundled-tokens",
                f"an event carries {w.per_event:.3g} tokens on average: ITL is the time between events",
            )
        )
    if w.spread:
        found.append(
            notice(
                "tokens-spread",
                f"for {w.spread} answers the server only counts the tokens in total: they are spread evenly over the "
                "events",
            )
        )
    if w.wrong_prompts:
        found.append(
            notice(
                "prompt-length-off",
                f"{w.wrong_prompts} prompts do not have the intended length by the server's own count",
            )
        )
    if not w.completions:
        found.append(notice("empty-window", "no request was completed in the window"))
    elif w.end - w.start < CYCLES * w.e2e_mean:
        found.append(
            notice(
                "short-window", f"the window is only {(w.end - w.start) / w.e2e_mean:.1f} times as long as a request"
            )
        )
    if rate is not None and w.rps < KEPT_UP * rate - 2 * math.sqrt(rate / (w.end - w.start)):
        found.append(notice("not-steady", f"not steady: {rate:g} requests/s were sent and {w.rps:.3g} answered"))
    if users is not None and w.completions and abs(w.in_flight / users - 1) > 0.02:
        found.append(notice("in-flight-off", f"{w.in_flight:.2f} requests were in flight on average, not {users}"))
    return found


def _why_short(short: dict[str, int]) -> str:
    """Why answers are shorter than requested, with the number of answers for each reason."""
    cut, unknown = short.get("length", 0), short.get("", 0)
    ended = sum(short.get(reason, 0) for reason in MODEL_ENDED)
    parts = []
    if ended:
        parts.append(f"the model itself ended {ended}")
    for reason in sorted(short.keys() - {"length", "", *MODEL_ENDED}):
        parts.append(f"{short[reason]} ended with finish_reason: {clean(reason)}")
    if cut:
        parts.append(f"the server cut off {cut} at a limit of its own (finish_reason: length)")
    if unknown:
        parts.append(f"{unknown} have no finish_reason")
    return ", ".join(parts) or "some ended before the window"


def reason_to_stop(windows: list[Window], users: list[int], permits: int | None, listed: bool) -> str | None:
    """Why the ladder should stop, or None to continue. `windows` belong to the `users` measured so far.

    A ladder listed in the scenario is run to its end, unless requests fail.
    """
    if windows and windows[-1].error_rate > ERRORS_LIMIT:
        return f"{windows[-1].error_rate:.1%} of the requests failed"
    if listed or not users:
        return None
    if permits is not None and users[-1] >= permits:
        return f"{users[-1]} users hold all of the server's {permits} permits"
    gains = [_largest_gain(a, b) for a, b in pairwise(windows[-3:])]
    if len(gains) == 2 and max(gains) < 0.05:
        return f"a plateau: the last two rungs gained at most {max(gains):.1%} requests/s"
    return None


def _largest_gain(before: Window, after: Window) -> float:
    """The upper bound of the relative gain in requests/s from one window to the next."""
    low = before.rps * (1 - min(before.half_width, 1.0))
    return after.rps * (1 + after.half_width) / low - 1 if low > 0 else float("inf")
