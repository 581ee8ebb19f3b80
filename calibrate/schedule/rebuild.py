"""The server's schedule, rebuilt from what clients saw.

A running request gets exactly one token from every decode step, so the k-th token of one stream and the tokens that
other streams received at about the same time are one step. A stream is placed as a whole: its tokens 1, 2, … are
consecutive decode steps, and only the first of them is unknown. That makes the placement insensitive to jitter, since
one late token cannot move a stream. Token 0 comes from a prefill just before the stream's first decode step.

Streams show the *ends* of steps. The time between two ends also includes the dropping of finished requests and the
joining of batches; where the server was idle before a step, its start is not seen. Every row says so.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from calibrate.arrays import Floats, Ints
from calibrate.schedule.checks import absent, coalesced, hidden, lost, unstreamed
from calibrate.schedule.step_table import build_step_table, medians
from sim.model.errors import NotEnoughData
from sim.model.warning import Notice, notice
from sim.results.events import merged
from sim.run import Run

_PROBE = 24  # tokens compared to place a stream: more do not change the median
_APART = 0.45  # of a step: a token nearer than this to a step's end belongs to it
_MERGED = 0.05  # share of tokens that come with others: each hides up to three steps, so a seventh of all
_BURST = 0.005  # s: users whose answers ended together and who come back no further apart are one burst


@dataclass(frozen=True)
class Schedule:
    """Steps in order of time, one row each, and the step of every token.

    `steps` has the columns of `StepWork` for the pass of each step, those of joining batches under `once_`, and those
    of the filter before it under `before_` (`step_table.works`). Also: `kind` (prefill, decode), `sequences` in the
    pass, `start`, `end` and `seconds` (end − start), `seen` (whether the start was seen: the server was busy just
    before), `members` (row numbers of the run's requests), `rung`, `live` (requests running after the step), `ended`
    (with it), `since` (decode steps since the last prefill, this one included), `used` (whether it is to be fitted).
    `request`, `token`, `step`, `time` are parallel arrays, one element per token received. Per request: `first` and
    `last`, the steps of its first and last tokens (-1: none came), `after`, the step that ended the same user's answer
    before it (-1: none), and `written`, when the client had dealt with all the answers that ended in that step and
    wrote its requests (`sent` for all others).
    """

    steps: pd.DataFrame
    request: Ints
    token: Ints
    step: Ints
    time: Floats
    first: Ints
    last: Ints
    after: Ints
    written: Floats
    jitter: float
    warnings: list[Notice] = field(default_factory=list)


def shows_steps(run: Run) -> bool:
    """Whether a run's streams show single steps: it has token times, and nearly all events carry one token."""
    return run.token_times is not None and _merged_share(run) <= _MERGED


def _merged_share(run: Run) -> float:
    """The share of a run's tokens that came in an event with others."""
    tokens = sum(map(len, run.token_times or []))
    return sum(map(merged, run.event_tokens or [])) / max(1, tokens)


def merged_events(run: Run) -> list[Notice]:
    """A warning where some events carry several tokens: of the steps around those only the sum was seen."""
    if not (share := _merged_share(run)):
        return []
    return [
        notice(
            "bundled-tokens",
            f"{run.name}: {share:.2%} of the tokens came several to an event: the steps beside those are not timed",
        )
    ]


def rebuild(run: Run, rungs: Collection[int] | None = None) -> Schedule:
    """The schedule behind a measured run's token times.

    All of it is rebuilt, since a request of one rung may continue into the next, but only steps that end in one of
    `rungs` (default: all) are marked as `used`. Raises `NotEnoughData` where the run has no token times, or events of
    several tokens.
    """
    if run.token_times is None or not any(len(t) > 1 for t in run.token_times):
        raise NotEnoughData(f"{run.name}: no token times, or none beyond the first: such answers show no steps")
    if not shows_steps(run):
        raise NotEnoughData(f"{run.name}: its events carry several tokens each: such answers show no single steps")
    warnings = merged_events(run)
    streams = [r for r, t in enumerate(run.token_times) if len(t)]
    first, misfits = _place(run.token_times, sorted(streams, key=lambda r: float(run.token_times[r][0])))  # type: ignore[index]
    if misfits > 0.01 * len(streams):
        warnings.append(
            notice(
                "several-servers",
                f"{misfits} of {len(streams)} streams do not share the steps of others at the same time: several "
                "servers behind one address, or a proxy that buffers tokens",
            )
        )
    counts = np.array([len(t) for t in run.token_times])
    request = np.repeat(np.arange(len(counts)), counts)
    token = np.concatenate([np.arange(n) for n in counts])
    time = np.concatenate(run.token_times)
    decode = np.where(token > 0, first[request] + token - 1, -1)
    ends = medians(time[token > 0], decode[token > 0])
    jitter = _jitter(time[token > 0], decode[token > 0], ends)
    prefill_of, prefill_before = _prefills(run.token_times, streams, first, ends, jitter)

    # Number the steps in order: the prefills that precede decode step d, then d itself.
    groups = len(prefill_before)
    key = np.concatenate([prefill_before, np.arange(len(ends))]).astype(np.float64)
    is_decode = np.concatenate([np.zeros(groups, bool), np.ones(len(ends), bool)])
    tie = np.concatenate([np.arange(groups), np.full(len(ends), groups)])
    order = np.lexsort((tie, key))
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order))
    step = np.where(token > 0, number[groups + np.maximum(decode, 0)], number[prefill_of[request]])
    first_step, last_step = (np.full(len(counts), -1) for _ in range(2))
    first_step[request[token == 0]] = step[token == 0]
    last_step[request] = step  # tokens are in order, so the last one's stays
    after, written = _bursts(run, last_step)
    steps = build_step_table(run, request, token, step, time, written, is_decode[order])
    steps["used"] = True if rungs is None else steps["rung"].isin(list(rungs))
    warnings += coalesced(run.token_times) + hidden(steps) + absent(run) + unstreamed(run) + lost(run)
    return Schedule(steps, request, token, step, time, first_step, last_step, after, written, jitter, warnings)


def _place(times: list[Floats], streams: list[int]) -> tuple[Ints, int]:
    """For every stream the number of the decode step of its second token, and how many streams fit nowhere."""
    clock = np.empty(sum(len(times[r]) for r in streams))  # when each decode step was first seen to end
    known, misfits = 0, 0
    first = np.zeros(len(times), dtype=np.int64)
    for r in streams:
        seen = times[r][1:]
        if not len(seen):
            continue  # one token and no decode step: `_prefills` places it by its time
        step = _upper_median(np.diff(times[r][: _PROBE + 1]))
        near = int(np.searchsorted(clock[:known], seen[0]))
        best, at = np.inf, known
        for d in range(max(0, near - 2), min(near + 2, known)):
            n = min(known - d, len(seen), _PROBE)
            score = _upper_median(np.abs(seen[:n] - clock[d : d + n]))
            if score < best:
                best, at = score, d
        if best > _APART * step:
            if near < known - 1 and seen[0] < clock[known - 1] - _APART * step:
                misfits += 1  # it ran at the same time as others, but not in their steps
            else:
                at = known
        first[r] = at
        new = seen[known - at :]
        clock[known : known + len(new)] = new
        known += len(new)
    return first, misfits


def _upper_median(values: Floats) -> float:
    """The upper median of a few values; NumPy's takes ten times as long, a fifth of a fit."""
    return float(np.sort(values)[len(values) // 2])


def _jitter(time: Floats, decode: Ints, ends: Floats) -> float:
    """The 99.5 % quantile of |time − median of the step| over tokens, s; 0 where no two requests ran together."""
    together = np.bincount(decode)[decode] > 1
    if not together.any():
        return 0.0
    return float(np.quantile(np.abs(time[together] - ends[decode[together]]), 0.995))


def _prefills(times: list[Floats], streams: list[int], first: Ints, ends: Floats, jitter: float) -> tuple[Ints, Ints]:
    """The prefill of every stream, numbered in order, and for every prefill the decode step that follows it.

    While requests run there is exactly one prefill between two decode steps. On an idle server the first request is
    often prefilled alone, and those that came meanwhile right after it (`docs/engines.md`).
    """
    r = np.array(streams)
    at = np.array([times[i][0] for i in streams])
    single = np.array([len(times[i]) == 1 for i in streams])
    before = np.where(single, np.searchsorted(ends, at), first[r])
    busy = np.zeros(len(ends) + 1, dtype=bool)  # decode steps that had a member of the step before
    for i in streams:  # a stream's steps are consecutive, so this marks slices
        if len(times[i]) > 2:
            busy[first[i] + 1 : first[i] + len(times[i]) - 1] = True
    order = np.lexsort((at, before))
    r, at, before = r[order], at[order], before[order]
    apart = np.diff(at) > max(2.0 * jitter, 1e-3)
    new = np.concatenate([[True], (np.diff(before) > 0) | (apart & ~busy[before[1:]])])
    of = np.zeros(len(times), dtype=np.int64)
    of[r] = np.cumsum(new) - 1
    return of, before[new]


def _bursts(run: Run, last: Ints) -> tuple[Ints, Floats]:
    """`Schedule.after` and `Schedule.written`."""
    requests = run.requests
    sent = requests["sent"].to_numpy()
    table = pd.DataFrame({"user": requests["user"], "sent": sent, "last": last})
    table = table[table["user"] >= 0].sort_values(["user", "sent"], kind="stable")
    table["after"] = table.groupby("user")["last"].shift(1, fill_value=-1)
    after, written = np.full(len(requests), -1), sent.copy()
    after[table.index] = table["after"]
    if run.scenario.load.think > 0:
        return after, written
    back = table[table["after"] >= 0].sort_values(["after", "sent"], kind="stable")
    apart = (back["after"].diff() != 0) | (back["sent"].diff() > _BURST)
    written[back.index] = back.groupby(apart.cumsum())["sent"].transform("max")
    return after, written
