"""Step ends from token times: which tokens of different streams came from the same step.

The tokens that one step gives are sent together and are seen within the client's jitter; the next step's follow after a
step. A stream gets at most one token from a step. So tokens in order of time form one group until a stream would occur
twice, or until nearly half a step has passed. A step is as long as the gaps between the tokens of the streams that
take part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calibrate.arrays import Bools, Floats, Ints

_APART = 0.45  # of a step: a token nearer than this to the first of a step's tokens belongs to the step
_LATE = 0.9  # of a step: what comes sooner than this after a step, and only from streams that it lacks, is of that step
_TOGETHER = 0.1  # of a step: no step is shorter, so tokens of a stream that came so close together were read at once
_REACH = (-2, -1, 0, 1, 2, 3)  # gaps of a stream, around a token, that tell how long a step is there


class Alignment(NamedTuple):
    """The step of every token: `request`, `token`, `step` and `time` are parallel, one element per token.

    `ends` are the step ends in order, s, the medians of their tokens' times, and `earliest` their earliest. `jitter` is
    the 99.5 % quantile of |time − end| over steps with several tokens, s. `timed` are the tokens with a time of their
    own: others came in one event, or one read, with later ones of their stream.
    """

    request: Ints
    token: Ints
    step: Ints
    time: Floats
    ends: Floats
    earliest: Floats
    jitter: float
    timed: Bools


def align(times: Sequence[Floats], events: Sequence[Ints | None] | None = None) -> Alignment:
    """Place the tokens of all streams, given as one array of times each, in s, on common step ends.

    `events` are the tokens of each event of a stream, where some carried several: of these only the last has a time of
    its own. So it is where a client read several at once. The others belong to the steps before.
    """
    counts = np.array([len(t) for t in times], dtype=np.int64)
    request = np.repeat(np.arange(len(counts)), counts)
    token = np.concatenate([np.arange(n) for n in counts.tolist()]) if len(counts) else np.zeros(0, np.int64)
    time = np.concatenate([*times, np.zeros(0)])
    length, gaps = _step_lengths(time, request)
    timed = _last_of_event(times, events)
    apart = timed & (gaps[1:] >= _TOGETHER * length)
    step = _placed(time, request, token, length, apart)
    crowded = np.zeros(len(counts), dtype=bool)  # streams that have more tokens than there are steps for them
    crowded[request[1:][(np.diff(step) <= 0) & (request[1:] == request[:-1])]] = True
    if crowded.any():
        apart |= timed & crowded[request]
        step = _placed(time, request, token, length, apart)
    at = np.flatnonzero(apart)
    ends = np.maximum.accumulate(medians(time[at], step[at]))
    earliest = np.full(len(ends), np.inf)
    np.minimum.at(earliest, step[at], time[at])
    late = np.abs(time[at] - ends[step[at]])[np.bincount(step[at])[step[at]] > 1]
    jitter = float(np.quantile(late, 0.995)) if len(late) else 0.0
    return Alignment(request, token, step, time, ends, np.maximum.accumulate(earliest), jitter, apart)


def _last_of_event(times: Sequence[Floats], events: Sequence[Ints | None] | None) -> Bools:
    """Which tokens are the last of their event."""
    parts = [np.ones(0, dtype=bool)]
    for t, carried in zip(times, events or [None] * len(times), strict=True):
        last = np.full(len(t), carried is None)
        if carried is not None:
            last[np.cumsum(carried)[carried > 0] - 1] = True
        parts.append(last)
    return np.concatenate(parts)


def _step_lengths(time: Floats, request: Ints) -> tuple[Floats, Floats]:
    """How long a step is around every token, (tokens,) in s, and the gaps before and after each in its stream, (tokens
    + 1,), inf at its ends.

    It is the shortest of the gaps around the token, but for those between tokens that were read at once: a stream waits
    for the prompts of others now and then, and hardly ever gets two tokens sooner than a step.
    """
    gaps = np.diff(time, prepend=-np.inf, append=np.inf)
    gaps[1:-1][request[1:] != request[:-1]] = np.inf
    around = np.full((len(_REACH), len(time)), np.inf)
    for row, reach in zip(around, _REACH, strict=True):
        index = np.arange(len(time)) + reach
        inside = (index >= 0) & (index <= len(time))
        owner = np.clip(index, 0, len(time) - 1)
        inside &= (request[owner] == request) | (request[np.maximum(owner - 1, 0)] == request)
        row[inside] = gaps[index[inside]]
    finite = gaps[np.isfinite(gaps) & (gaps > 0)]
    around[around < _TOGETHER * (np.median(finite) if len(finite) else 0.0)] = np.inf
    lengths = around.min(axis=0, initial=np.inf)
    known = np.isfinite(lengths)
    return np.where(known, lengths, np.median(lengths[known]) if known.any() else np.inf), gaps


def _placed(time: Floats, request: Ints, token: Ints, length: Floats, apart: Bools) -> Ints:
    """The step of every token: of those `apart` by their times, of the others by counting back from these."""
    at = np.flatnonzero(apart)
    order = np.argsort(time[at], kind="stable")
    grouped = np.empty(len(at), dtype=np.int64)
    grouped[order] = _grouped(time[at][order], request[at][order], length[at][order])
    step = np.full(len(time), -1)
    step[at] = _late_tokens_moved(grouped, request[at], token[at], time[at], length[at])
    of_running = np.zeros(int(step.max(initial=-1)) + 2, dtype=bool)  # steps that gave somebody a further token
    of_running[step[at][token[at] > 0] + 1] = True
    before = np.maximum.accumulate(np.where(of_running, np.arange(len(of_running)) - 1, -1))
    for i in np.flatnonzero(~apart)[::-1].tolist():  # the last of them first
        step[i] = max(int(before[step[i + 1]]) if token[i] else step[i + 1] - 1, 0)
    return step


def _grouped(time: Floats, request: Ints, length: Floats) -> Ints:
    """The number of the group of every token, in order of time."""
    last: dict[int, int] = {}  # the group of each stream's last token
    group, begun, until, groups = -1, -np.inf, -np.inf, []
    for t, r, seconds in zip(time.tolist(), request.tolist(), length.tolist(), strict=True):
        if t > until or last.get(r) == group:
            group, begun, until = group + 1, t, np.inf
        until = min(until, begun + _APART * seconds)
        last[r] = group
        groups.append(group)
    return np.array(groups, dtype=np.int64)


def _late_tokens_moved(step: Ints, request: Ints, token: Ints, time: Floats, length: Floats) -> Ints:
    """Groups renumbered after each that consists of late tokens has joined the one before it.

    It has no stream's first token and none of a stream of the group before it, and comes soon after that, or all its
    streams had their last token in the group before that: a running request misses no step that others take part in.
    """
    groups = int(step.max(initial=-1)) + 1
    if groups < 2:
        return step
    first = token == 0
    of_same = np.concatenate([[-9], np.where(request[1:] == request[:-1], step[:-1], -9)])
    continued = np.bincount(step, weights=of_same == step - 1, minlength=groups) > 0
    begins = np.bincount(step, weights=first, minlength=groups) > 0
    runs_on = np.bincount(step, weights=~first, minlength=groups) > 0
    start, shortest = np.full(groups, np.inf), np.full(groups, np.inf)
    np.minimum.at(start, step, time)
    np.minimum.at(shortest, step, length)
    soon = np.diff(start) < _LATE * np.maximum(shortest[1:], shortest[:-1])
    lacking = np.bincount(step, weights=of_same == step - 2, minlength=groups) == np.bincount(step)
    late = (soon | lacking[1:]) & ~continued[1:] & ~begins[1:] & runs_on[:-1]
    late[1:] &= ~late[:-1]
    return np.asarray(step - np.concatenate([[0], np.cumsum(late)])[step], dtype=np.int64)


def medians(values: Floats, group: Ints) -> Floats:
    """The lower median of the values of every group 0, 1, …; every group has some."""
    order = np.lexsort((values, group))
    counts = np.bincount(group)
    starts = np.cumsum(counts) - counts
    middle: NDArray[np.float64] = values[order][starts + (counts - 1) // 2]
    return middle
