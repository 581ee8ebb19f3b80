"""The server's schedule, as far as clients saw it: which step made each token, what it computed, and how long it took.

Streams show the *ends* of steps (`align`); an engine driven by them (`follow`) says what was computed in between. The
time between two ends also includes the dropping of finished requests and the joining of batches, and passes that gave
no token; where the server was idle before a step, its start is not seen. Every row says so.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from calibrate.arrays import Floats, Ints
from calibrate.schedule.align import Alignment, align
from calibrate.schedule.checks import absent, coalesced, hidden, lost, unstreamed
from calibrate.schedule.follow import Followed, follow
from sim.engines.catalog import scheduler
from sim.model.errors import NotEnoughData
from sim.model.request import Request
from sim.model.status import Status
from sim.model.warning import Notice, notice
from sim.results.events import merged
from sim.run import Run
from sim.steptime.basis import COLUMNS
from sim.steptime.work import NOTHING

ONCE, BEFORE = "once_", "before_"  # prefixes of columns of `StepWork`: joining batches; the filter before the step
_MERGED = 0.05  # share of tokens that come with others: each hides up to three steps, so a seventh of all
_BURST = 0.005  # s: users whose answers ended together and who come back no further apart are one burst
_MISPLACED = 0.05  # share of the tokens beside the steps of the others: in recorded runs it is below 0.001
_ROOM = 1e8  # tokens of a KV cache of unknown size
AGREEING = 0.98  # share of the decisions below which something is not as the flags say
_BETWEEN = ((ONCE, "joined"), (BEFORE, "dropped"))  # what each prefix stands for


@dataclass(frozen=True)
class Schedule:
    """Steps in order of time, one row each, and the step of every token.

    `steps` has the columns of `StepWork` for the pass of each step, those of joining batches under `once_`, and those
    of the filter before it under `before_` (`works`). Also: `kind` (prefill, decode), `sequences` in the
    pass, `start`, `end` and `seconds` (end − start), `seen` (whether the start was seen: the server was busy just
    before), `members` (row numbers of the run's requests), `rung`, `live` (requests running after the step), `ended`
    (with it), `since` (decode steps since the last prefill, this one included), `used` (whether it is to be fitted).
    `extra` are the passes of each step's time that ended without a token, a row each with the number of its `step`;
    `followed` is what following the engine told besides.
    `request`, `token`, `step`, `time` are parallel arrays, one element per token received. Per request: `first` and
    `last`, the steps of its first and last tokens (-1: none came, or the first came with the second), `after`, the step
    that ended the same user's answer before it (-1: none), and `written`, when the client had dealt with all the
    answers that ended in that step and wrote its requests (`sent` for all others).
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
    extra: pd.DataFrame
    followed: Followed
    warnings: list[Notice]


def shows_steps(run: Run) -> bool:
    """Whether a run's streams show single steps: it has token times, and nearly all events carry one token."""
    return run.token_times is not None and _merged_share(run) <= _MERGED


def _merged_share(run: Run) -> float:
    """The share of a run's tokens that came in an event with others."""
    tokens = sum(map(len, run.token_times or []))
    return sum(map(merged, run.event_tokens or [])) / max(1, tokens)


def _merged_events(run: Run) -> list[Notice]:
    """A warning where some events carry several tokens: of the steps around those only the sum was seen."""
    if not (share := _merged_share(run)):
        return []
    return [
        notice(
            "bundled-tokens",
            f"{run.name}: {share:.2%} of the tokens came several to an event: the steps beside those are not timed",
        )
    ]


def _token_times(run: Run) -> list[Floats]:
    """The token times of a run; `NotEnoughData` where it has none, or they show no single steps."""
    if run.token_times is None or not any(len(t) > 1 for t in run.token_times):
        raise NotEnoughData(f"{run.name}: no token times, or none beyond the first: such answers show no steps")
    if not shows_steps(run):
        raise NotEnoughData(f"{run.name}: its events carry several tokens each: such answers show no single steps")
    return run.token_times


def schedule_of(run: Run, rungs: Collection[int] | None = None) -> Schedule:
    """The schedule behind a measured run's token times.

    All of it is found, since a request of one rung may continue into the next, but only steps that end in one of
    `rungs` (default: all) are marked as `used`. Raises `NotEnoughData` where the run has no token times, or events of
    several tokens.
    """
    times = _token_times(run)
    alignment = align(times, run.event_tokens)
    requests, left = _requests(run)
    server = run.server.settled(_ROOM, lambda low, high: high, run.scenario.machine)
    followed = follow(scheduler(server), requests, alignment, left)
    first, last = (np.full(len(times), -1) for _ in range(2))
    begun = (alignment.token == 0) & alignment.timed
    first[alignment.request[begun]] = alignment.step[begun]
    last[alignment.request] = alignment.step
    after, written = _answers_before(run, last)
    steps, extra = _steps(run, alignment, followed, written)
    steps["used"] = True if rungs is None else steps["rung"].isin(list(rungs))
    warnings = [*_merged_events(run), *_disagreement(run, followed), *coalesced(times), *hidden(steps)]
    warnings += [*absent(run), *unstreamed(run), *lost(run)]
    request, token, step, time, _, _, jitter, _ = alignment
    return Schedule(steps, request, token, step, time, first, last, after, written, jitter, extra, followed, warnings)


def _requests(run: Run) -> tuple[list[Request], Floats]:
    """The requests by row number, and when the client of each that did not end left, s."""
    table, times = run.requests, run.token_times or []
    ok = (table["status"] == Status.OK).to_numpy()
    rows = zip(table["prompt_tokens"].tolist(), table["max_new_tokens"].tolist(), table["sent"].tolist(), strict=True)
    requests = [
        Request(i, prompt, max(1, len(times[i])) if ok[i] else most, most, sent=sent)
        for i, (prompt, most, sent) in enumerate(rows)
    ]
    return requests, np.where(ok, np.inf, table["ended"].to_numpy(np.float64))


def _steps(run: Run, alignment: Alignment, followed: Followed, written: Floats) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per observed step end, with the columns that `Schedule` describes for the pass that ended there; and the
    other work of each interval, one row each, with the number of its `step`."""
    count = len(alignment.ends)
    passes = [[w for w in works if w.passes] for works in followed.works]
    final = [(works[-1] if works else NOTHING) for works in passes]
    others = [(i, w) for i, works in enumerate(passes) for w in works[:-1]]
    extra = pd.DataFrame([msgspec.structs.astuple(w) for _, w in others], columns=list(COLUMNS))
    extra["step"] = np.array([i for i, _ in others], dtype=np.int64)
    steps = pd.DataFrame([msgspec.structs.astuple(w) for w in final], columns=list(COLUMNS))
    for prefix, kind in _BETWEEN:
        between = [next((w for w in works if getattr(w, kind)), NOTHING) for works in followed.works]
        for name in (kind, "kept", "decode_longest"):
            steps[prefix + name] = np.array([getattr(work, name) for work in between], dtype=np.int64)
    size = np.bincount(alignment.step, minlength=count)
    last = np.flatnonzero(np.diff(alignment.request, append=-1))
    ended = np.bincount(alignment.step[last], minlength=count)
    begun = np.bincount(alignment.step[alignment.token == 0], minlength=count)
    decode = (steps["decode_sequences"] > 0).to_numpy()
    sent = np.full(count, np.inf)
    np.minimum.at(sent, alignment.step, written[alignment.request])
    previous = np.concatenate([[-np.inf], alignment.ends[:-1]])
    doubtful = np.array(followed.doubtful, dtype=bool)
    doubtful[1:] |= doubtful[:-1]
    seen = ~np.array(followed.idle, dtype=bool) & np.array([bool(works) for works in followed.works]) & ~doubtful
    for start, _ in run.stretches:
        seen &= ~((previous < start) & (alignment.ends >= start))
    edges = [rung.start for rung in run.rungs] or [0.0]
    number = np.arange(count)
    begin = np.where(seen, previous, np.maximum(sent, previous))
    order = np.argsort(alignment.step, kind="stable")
    members = np.split(alignment.request[order], np.cumsum(size)[:-1])
    prefills = (steps["prefill_tokens"] > 0).to_numpy()
    return steps.assign(
        start=begin,
        end=alignment.ends,
        kind=np.where(decode, "decode", "prefill"),
        sequences=np.where(decode, steps["decode_sequences"], steps["prefill_sequences"]),
        members=pd.Series(members),
        seconds=alignment.ends - begin,
        seen=seen,
        rung=np.maximum(np.searchsorted(edges, alignment.ends, side="right") - 1, 0),
        live=np.cumsum(begun - ended),
        ended=ended,
        since=number - np.maximum.accumulate(np.where(prefills, number, -1)),
    ), extra


def _disagreement(run: Run, followed: Followed) -> list[Notice]:
    """A warning where the server decided otherwise than the rules of its engine, or gave tokens in other steps."""
    told = run.server.kv_tokens is not None  # else who had to wait for room could not be foreseen
    if told and followed.agreement < AGREEING:
        against = ", ".join(f"{count} {what} by the rules" for what, count in followed.disagreements.most_common())
        return [
            notice(
                "flags-contradicted",
                f"{run.name}: {1 - followed.agreement:.1%} of {followed.decisions} scheduling decisions are not those "
                f"of {run.server.engine} ({against}, and not on the server): other flags or another version, requests "
                "of other clients, or several servers behind one address",
            )
        ]
    if followed.misplaced > _MISPLACED * followed.tokens:
        return [
            notice(
                "several-servers",
                f"{run.name}: {followed.misplaced / followed.tokens:.0%} of the tokens came in no step of those who "
                "ran at the same time: several servers behind one address, or a proxy that buffers tokens",
            )
        ]
    return []


def _answers_before(run: Run, last: Ints) -> tuple[Ints, Floats]:
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


def works(steps: pd.DataFrame) -> list[dict[str, Any]]:
    """What the time of each row holds, as columns of `StepWork`: the pass, joining batches, the filter before it."""
    return [
        {name: steps[prefix + name].to_numpy(np.float64) for name in COLUMNS if prefix + name in steps}
        for prefix in ("", ONCE, BEFORE)
    ]
