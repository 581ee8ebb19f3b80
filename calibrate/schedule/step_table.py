"""One row per step, summed up from the step of every token: how long it took, who was in it, who joined, who was
dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.run import Run

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

UNCERTAIN_ARRIVAL = (
    0.02  # s: a request sent less than this before a step's end may or may not have been in the queue by then
)


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


def build_step_table(
    run: Run, request: Ints, token: Ints, step: Ints, time: Floats, written: Floats, is_decode: NDArray[np.bool_]
) -> pd.DataFrame:
    """One row per step, from the step of every token."""
    by_step = _ByStep(step)
    prompt = run.requests["prompt_tokens"].to_numpy()
    length = np.bincount(request, minlength=len(prompt))
    size = prompt[request] + token  # context before the step
    ends = np.maximum.accumulate(medians(time, step))
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
    seen = (running > 0) | (earliest + UNCERTAIN_ARRIVAL < previous)
    for begun, _ in run.stretches:
        seen &= ~((previous < begun) & (ends >= begun))
    return np.where(seen, previous, np.maximum(earliest, previous)), seen


def medians(values: Floats, group: Ints) -> Floats:
    """The (lower) median of the values of every group 0, 1, …; every group has some."""
    order = np.lexsort((values, group))
    counts = np.bincount(group)
    starts = np.cumsum(counts) - counts
    middle: Floats = values[order][starts + (counts - 1) // 2]
    return middle
