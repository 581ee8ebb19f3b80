"""Long-run rates: requests and tokens per second as a load would show them for ever, without the luck of one window.

A window of 480 s holds 14 whole answers of 33 s, and 14/480 is not 1/33: counting within the edges of a window has an
error, which is largest where users are few or finish together. So (`docs/files.md`, Metrics)

- closed loop: N users, each of whom finishes a request every R + Z seconds, make N / (R + Z) requests/s. R is the mean
  E2E of the requests that end in the window (the same that `metrics` counts) and Z the mean time before them since the
  user's last one had ended: think time, retries, the client's turnaround. At every N this is X (R + Z) = N, the
  operational form of Little's law (Denning and Buzen 1978).
- open loop with a steady state: what comes goes. The rate is the offered one, times the share that is answered.
- open loop without one, and traces: what the server gets done in the window, by its tokens: the requests that end in
  it, times the tokens made in it over the tokens of those requests.

What a window counted (`docs/files.md`, Metrics) is `metrics.table`. That is what tools print, what a run's own report
shows, and what a run is compared with its replay by, whose windows are the recorded ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.model.metric import RATES
from sim.model.status import Status
from sim.results import metrics
from sim.run import Run, Rung

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

GROWING, TURNED_AWAY = 0.05, 0.01  # shares of the requests: with more left standing or refused there is no steady state


def table(run: Run, slo: Mapping[str, float] | None = None) -> pd.DataFrame:
    """`metrics.table` with long-run `RATES`, per second, and `ended`: how many requests/s end, however they do.

    For a run whose users are known. An open loop's rates are those without a steady state until `steady` says that
    there is one.
    """
    counted = metrics.table(run, slo)
    if counted.empty:
        return counted
    ends = _Ends(run, metrics.keeps(run, slo))
    rows = []
    for row in counted.to_dict("records"):
        rung = run.rungs[row["rung"]]
        tokens = row["output_tokens_per_s"] * rung.seconds
        found = ends.closed(rung, tokens) if rung.users is not None else ends.open(rung, tokens)
        if np.isnan(row["input_tokens_per_s"]):  # unknown prompts
            found.pop("input_tokens_per_s", None)
        row.update(found.items())
        rows.append(row)
    return pd.DataFrame(rows)


def growing(row: Mapping[str, float] | pd.Series) -> bool:
    """Whether an open loop has no steady state at a rung of these metrics: requests stay behind, or are turned away."""
    return bool(row["backlog"] > GROWING or row["overloaded_rate"] > TURNED_AWAY)


def steady(found: pd.DataFrame, rungs: Sequence[int]) -> pd.DataFrame:
    """A `table` of an open loop whose `rungs` have a steady state: there, what comes goes."""
    found = found.copy()
    here = found["rung"].isin(rungs).to_numpy()
    offered = found["load"].to_numpy(dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(here, offered / found["ended"].to_numpy(dtype=np.float64), 1.0)
    for name in RATES:
        found[name] = found[name].to_numpy(dtype=np.float64) * np.where(np.isfinite(times), times, np.nan)
    found.loc[here & ~np.isfinite(times), "rps"] = offered[here & ~np.isfinite(times)]
    return found


class _Ends:
    """The requests of a run that ended by themselves: when (an answer with its last token), and how long before that
    their user's last one had."""

    def __init__(self, run: Run, keeps: Bools):
        requests = run.requests
        status = requests["status"].to_numpy()
        ended, last = (requests[name].to_numpy(dtype=np.float64) for name in ("ended", "last_token"))
        self.ok = status == Status.OK
        self.good = self.ok & keeps
        self.at: Floats = np.where(self.ok & ~np.isnan(last), last, ended)
        self.by_itself = (status != Status.ABORTED) & ~np.isnan(self.at)
        self.sent = requests["scheduled"].to_numpy(dtype=np.float64)
        self.user = requests["user"].to_numpy()
        self.prompts, self.output = (requests[name].to_numpy() for name in ("prompt_tokens", "output_tokens"))
        self.starts = np.array([start for start, _ in run.stretches])
        self.stretch = np.searchsorted(self.starts, self.sent, side="right")
        order = np.lexsort((self.sent, self.user, self.stretch))
        before, after = order[:-1], order[1:]
        same = (self.user[before] == self.user[after]) & (self.stretch[before] == self.stretch[after])
        same &= self.user[after] >= 0
        # from the end of the same user's request before, s; NaN where there was none
        self.pause = np.full(len(self.sent), np.nan)
        self.pause[after[same]] = np.maximum(0.0, self.sent[after[same]] - self.at[before[same]])
        firsts = np.concatenate([order[:1], after[~same]])
        self.came = firsts[self.user[firsts] >= 0]  # every user's first request

    def _within(self, rung: Rung) -> Bools:
        return np.asarray(self.by_itself & (self.at >= rung.settled) & (self.at < rung.end))

    def closed(self, rung: Rung, tokens: float) -> dict[str, float]:
        """N / (R + Z) for each of the rates; nothing where the window saw neither an end nor one of its `tokens`."""
        assert rung.users is not None
        here = np.flatnonzero(self._within(rung))
        if not len(here) and tokens > 0:  # a window shorter than an answer: every user's last one before it
            begun = np.flatnonzero(self.by_itself & (self.sent >= rung.ramped) & (self.at < rung.end))
            latest = dict(zip(self.user[begun].tolist(), begun.tolist(), strict=True))  # in the order of `sent`
            here = np.array(sorted(latest.values()), dtype=np.int64)
        pauses = self.pause[here]
        known = pauses[~np.isnan(pauses)]
        cycles = float((self.at - self.sent)[here].sum()) + (float(known.mean()) * len(here) if len(known) else 0.0)
        if not cycles > 0:
            return {}
        stretch = np.searchsorted(self.starts, rung.settled, side="right")
        there = int(np.count_nonzero((self.stretch[self.came] == stretch) & (self.sent[self.came] < rung.end)))
        return self._rates(here, (min(rung.users, there) or rung.users) / cycles)

    def open(self, rung: Rung, tokens: float) -> dict[str, float]:
        """Of a window in which the server made so many `tokens`."""
        here = np.flatnonzero(self._within(rung))
        whole = float(self.output[here].sum())
        return self._rates(here, (tokens / whole if whole > 0 else 1.0) / rung.seconds)

    def _rates(self, here: NDArray[np.int64], each: float) -> dict[str, float]:
        """The rates where each of these requests stands for `each` requests/s."""
        ok = here[self.ok[here]]
        return {
            "rps": each * len(ok),
            "input_tokens_per_s": each * float(self.prompts[ok].sum()),
            "output_tokens_per_s": each * float(self.output[here].sum()),
            "goodput": each * float(self.good[here].sum()),
            "ended": each * len(here),
        }
