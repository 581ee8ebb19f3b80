"""The server's schedule, rebuilt from what clients saw.

A running request gets exactly one token from every decode step, so the k-th token of one stream and the tokens that
other streams received at about the same time are one step. A stream is therefore placed as a whole: its tokens 1, 2, …
are consecutive decode steps, and the only unknown is where the first of them falls. That makes the placing deaf to
jitter: one late token cannot move a stream. Token 0 comes from a prefill, which lies just before the stream's first
decode step.

Streams show the *ends* of steps. What lies between two ends also holds the dropping of finished requests and the
joining of batches, and where the server was idle before a step its beginning is not seen at all; every row says which.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.errors import NotEnoughData
from sim.run import Run

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_PROBE = 24  # tokens compared when a stream is placed: more do not change the median
_APART = 0.45  # of a step: a token nearer than this to a step's end belongs to it
_BURST = 0.005  # s: users whose answers ended together and who come back no further apart than this are one burst
_ON_THE_WAY = 0.02  # s: a request sent less than this before a step's end may or may not have been in the queue by then


@dataclass(frozen=True)
class Schedule:
    """Steps in order of time, one row each, and the step of every token.

    `steps` has the columns of `steps.jsonl` (`formats.md`; `count` is 1, `members` are row numbers of the run's
    requests) and: `seconds` (end − start), `seen` (whether the start was seen: the server was busy just before),
    `rung`, `longest` (prefill: longest prompt; decode: longest context), `old` and `new` (requests that ran before and
    that join), `kept`, `kept_longest` and `finished` (what the filter after the step before kept, its longest context,
    and what it dropped), `live` (running after the step), `ended` (with it), `since` (decode steps since the last
    prefill, this one included).
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
    doubts: list[str] = field(default_factory=list)


def rebuild(run: Run, rungs: Collection[int] | None = None) -> Schedule:
    """The schedule behind a measured run's token times; `NotEnoughData` when the run has none.

    All of it is rebuilt (who began at one rung runs on into the next), but only steps that end in one of `rungs` are
    marked as `used`; all of them by default.
    """
    if run.token_times is None or not any(len(t) > 1 for t in run.token_times):
        raise NotEnoughData(f"{run.name}: no token times, or none beyond the first: such answers show no steps")
    doubts: list[str] = []
    streams = [r for r, t in enumerate(run.token_times) if len(t)]
    first, misfits = _place(run.token_times, sorted(streams, key=lambda r: float(run.token_times[r][0])))  # type: ignore[index]
    if misfits > 0.01 * len(streams):
        doubts.append(
            f"{misfits} of {len(streams)} streams do not share the steps of those they ran beside: several servers "
            "behind one address, or something on the way that gathers or holds up tokens"
        )
    counts = np.array([len(t) for t in run.token_times])
    request = np.repeat(np.arange(len(counts)), counts)
    token = np.concatenate([np.arange(n) for n in counts])
    time = np.concatenate(run.token_times)
    decode = np.where(token > 0, first[request] + token - 1, -1)
    ends = _medians(time[token > 0], decode[token > 0])
    jitter = _spread(time[token > 0], decode[token > 0], ends)
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
    steps = _table(run, request, token, step, time, written, is_decode[order])
    steps["used"] = True if rungs is None else steps["rung"].isin(list(rungs))
    doubts += _coalesced(run.token_times) + _hidden(steps) + _absent(run)
    return Schedule(steps, request, token, step, time, first_step, last_step, after, written, jitter, doubts)


def _place(times: list[Floats], streams: list[int]) -> tuple[Ints, int]:
    """For every stream the number of the decode step that made its second token, and how many streams fit nowhere."""
    clock = np.empty(sum(len(times[r]) for r in streams))  # when each decode step was first seen to end
    known, misfits = 0, 0
    first = np.zeros(len(times), dtype=np.int64)
    for r in streams:
        seen = times[r][1:]
        if not len(seen):
            continue  # one token: it never met a decode step; `_prefills` places it by its time
        step = float(np.median(np.diff(times[r][: _PROBE + 1])))
        near = int(np.searchsorted(clock[:known], seen[0]))
        best, at = np.inf, known
        for d in range(max(0, near - 2), min(near + 2, known)):
            n = min(known - d, len(seen), _PROBE)
            score = float(np.median(np.abs(seen[:n] - clock[d : d + n])))
            if score < best:
                best, at = score, d
        if best > _APART * step:
            if near < known - 1 and seen[0] < clock[known - 1] - _APART * step:
                misfits += 1  # it ran beside others, but not in step with them
            else:
                at = known
        first[r] = at
        new = seen[known - at :]
        clock[known : known + len(new)] = new
        known += len(new)
    return first, misfits


def _medians(values: Floats, group: Ints) -> Floats:
    """The (lower) median of the values of every group 0, 1, …; every group has some."""
    order = np.lexsort((values, group))
    counts = np.bincount(group)
    starts = np.cumsum(counts) - counts
    middle: Floats = values[order][starts + (counts - 1) // 2]
    return middle


def _spread(time: Floats, decode: Ints, ends: Floats) -> float:
    """How far tokens of one step are seen from its median: the 99.5 % quantile, s (0 when no two ran together)."""
    together = np.bincount(decode)[decode] > 1
    if not together.any():
        return 0.0
    return float(np.quantile(np.abs(time[together] - ends[decode[together]]), 0.995))


def _prefills(times: list[Floats], streams: list[int], first: Ints, ends: Floats, jitter: float) -> tuple[Ints, Ints]:
    """The prefill of every stream, numbered in order, and for every prefill the decode step that follows it.

    Beside running requests there is exactly one prefill between two decode steps; on an idle server the first request
    is often prefilled alone and what came meanwhile right after it (`tgi-0.9.4.md` §3.2).
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


class _ByStep:
    """The tokens of every step, to be summed up: arrays go in with one value per token, and come out with one per step.
    Every step has some."""

    def __init__(self, step: Ints):
        self._step, self._order = step, np.argsort(step, kind="stable")
        self.size = np.bincount(step)
        self._first = np.cumsum(self.size) - self.size

    def count(self, which: NDArray[np.bool_]) -> Ints:
        return np.bincount(self._step[which], minlength=len(self.size))

    def sum(self, values: NDArray[Any]) -> Floats:
        return np.asarray(np.bincount(self._step, weights=values), dtype=np.float64)

    def most(self, values: NDArray[Any]) -> NDArray[Any]:
        return np.maximum.reduceat(values[self._order], self._first)

    def least(self, values: NDArray[Any]) -> NDArray[Any]:
        return np.minimum.reduceat(values[self._order], self._first)

    def each(self, values: Ints) -> list[Ints]:
        return np.split(values[self._order], self._first[1:])


def _table(
    run: Run, request: Ints, token: Ints, step: Ints, time: Floats, written: Floats, is_decode: NDArray[np.bool_]
) -> pd.DataFrame:
    """One row per step, from the step of every token."""
    by_step = _ByStep(step)
    prompt = run.requests["prompt_tokens"].to_numpy()
    length = np.bincount(request, minlength=len(prompt))
    size = prompt[request] + token  # context before the step
    ends = np.maximum.accumulate(_medians(time, step))
    finished = by_step.count(token == length[request] - 1)
    kept = by_step.size - finished
    running = _running(kept, is_decode)
    live = np.where(is_decode, kept, running + kept)
    old, new = _joins(by_step.count(token == 1), by_step.size, kept, running, is_decode)
    start, seen = _starts(run, ends, running, by_step.least(written[request]))
    filtered = (_before(finished) > 0) & (_before(kept) > 0)
    grown = by_step.most(np.where(token < length[request] - 1, size + 1, 0))
    edges = [g.start for g in run.rungs] or [0.0]
    number = np.arange(len(is_decode))
    return pd.DataFrame(
        {
            "start": start,
            "end": ends,
            "kind": np.where(is_decode, "decode", "prefill"),
            "count": 1,
            "sequences": by_step.size,
            "tokens": by_step.sum(size).astype(np.int64),
            "prompt_sq": by_step.sum(np.where(token == 0, size.astype(float) ** 2, 0.0)),
            "max_prompt": by_step.most(prompt[request]),
            "concat": is_decode & (old > 0) & (new > 0),
            "filtered": filtered,
            "members": by_step.each(request),
            "seconds": ends - start,
            "seen": seen,
            "rung": np.maximum(np.searchsorted(edges, ends, side="right") - 1, 0),
            "longest": by_step.most(size),
            "old": old,
            "new": new,
            "kept": np.where(filtered, _before(kept), 0),
            "kept_longest": np.where(filtered, _before(grown), 0),
            "finished": np.where(filtered, _before(finished), 0),
            "live": live,
            "ended": finished,
            "since": number - np.maximum.accumulate(np.where(is_decode, -1, number)),
        }
    )


def _before(values: Ints) -> Ints:
    """What the step before had; nothing before the first."""
    return np.concatenate([[0], values[:-1]])


def _running(kept: Ints, is_decode: NDArray[np.bool_]) -> Ints:
    """How many requests ran when each step began: all that the last decode step kept, and the prefills since."""
    running, live = np.zeros(len(kept), dtype=np.int64), 0
    for s, (k, decode) in enumerate(zip(kept.tolist(), is_decode.tolist(), strict=True)):
        running[s] = live
        live = k if decode else live + k
    return running


def _joins(joined: Ints, sequences: Ints, kept: Ints, running: Ints, is_decode: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """How many ran before each step and how many joined them; of a prefill, how many are about to."""
    new = np.where(is_decode, joined, sequences)
    old = np.where(is_decode, sequences - joined, running)
    # Two prefills in a row on an idle server: the second one's requests join the first one's.
    twice = is_decode.copy()
    twice[:2] = False
    twice[2:] &= ~is_decode[:-2] & ~is_decode[1:-1]
    last = _before(kept)
    old = np.where(twice & (old == 0), joined - last, old)
    return old, np.where(twice, last, new)


def _starts(run: Run, ends: Floats, running: Ints, earliest: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """When each step began, as far as streams show it, and whether they do: the server was busy, or somebody waited."""
    previous = np.concatenate([[-np.inf], ends[:-1]])
    seen = (running > 0) | (earliest + _ON_THE_WAY < previous)
    for begun, _ in run.stretches:
        seen &= ~((previous < begun) & (ends >= begun))
    return np.where(seen, previous, np.maximum(earliest, previous)), seen


def _coalesced(times: list[Floats]) -> list[str]:
    """A doubt when streams arrive in lumps: then single steps were not seen, only their sums."""
    gaps = [np.diff(t) for t in times if len(t) > 8]
    if not gaps:
        return []
    lumps = float(np.mean(np.concatenate([g < 0.1 * np.median(g[g > 0]) if (g > 0).any() else g >= 0 for g in gaps])))
    if lumps <= 0.02:
        return []
    return [f"{lumps:.0%} of the tokens came together with the one before: something on the way gathers them"]


def _hidden(steps: pd.DataFrame) -> list[str]:
    """A doubt when decode steps look as if other people's prefills lay between them."""
    plain = steps[(steps["kind"] == "decode") & steps["seen"] & ~steps["concat"]]
    prefills = int((steps["kind"] == "prefill").sum())
    if len(plain) < 50:
        return []
    typical = plain.groupby("sequences")["seconds"].transform("median")
    # a long step with nothing after it is two or more that were seen at once
    followed = steps["seconds"].shift(-1, fill_value=np.inf)[plain.index] > 0.1 * typical
    long = int(((plain["seconds"] > 3.0 * typical) & followed).sum())
    if long <= max(2, 0.01 * prefills):  # on the recorded runs, which hide nobody, it was one at the most
        return []
    return [
        f"{long} of {len(plain)} decode steps took over three times the usual time with no prefill of this client's: "
        "other clients' requests run on this server, and batch sizes are larger than they look"
    ]


def _absent(run: Run) -> list[str]:
    """A doubt when some of a load's users are not in the run: their requests lengthened the batches all the same."""
    requests, missing = run.requests, []
    for rung in run.rungs:
        if rung.users is None or rung.end <= rung.settled:
            continue
        here = (requests["sent"] < rung.end) & (requests["ended"].fillna(np.inf) > rung.settled)
        there = int(requests.loc[here & (requests["user"] >= 0), "user"].nunique())
        if 0 < there < rung.users:
            missing.append(f"{there} of {rung.users}")
    if not missing:
        return []
    return [f"{run.name} shows only {', '.join(missing)} users: batches were larger than they look"]
