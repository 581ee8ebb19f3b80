"""One row per rebuilt step: its duration, its work as columns of `StepWork`, and who joined and left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from calibrate.arrays import Bools, Floats, Ints
from sim.run import Run
from sim.steptime.basis import COLUMNS

ONCE, BEFORE = "once_", "before_"  # prefixes of columns of `StepWork`: joining batches; the filter before the step
UNCERTAIN_ARRIVAL = 0.02  # s: a request sent less than this before a step's end may or may not have been queued


class _ByStep:
    """Aggregates one value per token to one value per step; every step has tokens."""

    def __init__(self, step: Ints):
        self._step, self._order = step, np.argsort(step, kind="stable")
        self.size = np.bincount(step)
        self._first = np.cumsum(self.size) - self.size

    def count(self, which: Bools) -> Ints:
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
    run: Run, request: Ints, token: Ints, step: Ints, time: Floats, written: Floats, is_decode: Bools
) -> pd.DataFrame:
    """The table that `Schedule.steps` describes, but for `used`.

    `request`, `token`, `step` and `time` have one element per token; `written` one per request; `is_decode` one per
    step.
    """
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
    joining = is_decode & (old > 0) & (new > 0)
    filtered = (_before(finished) > 0) & (_before(kept) > 0)
    tokens, longest, prefill = by_step.sum(size).astype(np.int64), by_step.most(size), ~is_decode
    grown = by_step.most(np.where(token < length[request] - 1, size + 1, 0))
    edges = [g.start for g in run.rungs] or [0.0]
    number = np.arange(len(is_decode))
    return pd.DataFrame(
        {
            "start": start,
            "end": ends,
            "kind": np.where(is_decode, "decode", "prefill"),
            "passes": 1,
            "prefill_tokens": prefill * tokens,
            "prefill_sequences": prefill * by_step.size,
            "prefill_attention": prefill * by_step.sum(size * (size + 1) / 2),
            "prefill_longest": prefill * longest,
            "decode_sequences": is_decode * by_step.size,
            "decode_context": is_decode * tokens,
            "decode_longest": is_decode * longest,
            f"{ONCE}joined": joining * new,
            f"{ONCE}kept": joining * old,
            f"{ONCE}decode_longest": joining * longest,
            f"{BEFORE}dropped": filtered * _before(finished),
            f"{BEFORE}kept": filtered * _before(kept),
            f"{BEFORE}decode_longest": filtered * _before(grown),
            "sequences": by_step.size,
            "members": by_step.each(request),
            "seconds": ends - start,
            "seen": seen,
            "rung": np.maximum(np.searchsorted(edges, ends, side="right") - 1, 0),
            "live": live,
            "ended": finished,
            "since": number - np.maximum.accumulate(np.where(is_decode, -1, number)),
        }
    )


def works(steps: pd.DataFrame) -> list[dict[str, Any]]:
    """What the time of each row holds, as columns of `StepWork`: the pass, joining batches, the filter before it."""
    return [
        {name: steps[prefix + name].to_numpy(np.float64) for name in COLUMNS if prefix + name in steps}
        for prefix in ("", ONCE, BEFORE)
    ]


def _before(values: Ints) -> Ints:
    """The values of the step before, 0 for the first."""
    return np.concatenate([[0], values[:-1]])


def _running(kept: Ints, is_decode: Bools) -> Ints:
    """How many requests ran when each step began: those that the last decode step kept, and the prefills since."""
    running, live = np.zeros(len(kept), dtype=np.int64), 0
    for s, (k, decode) in enumerate(zip(kept.tolist(), is_decode.tolist(), strict=True)):
        running[s] = live
        live = k if decode else live + k
    return running


def _joins(joined: Ints, sequences: Ints, kept: Ints, running: Ints, is_decode: Bools) -> tuple[Ints, Ints]:
    """How many requests ran before each step and how many joined them; of a prefill, how many are about to."""
    new = np.where(is_decode, joined, sequences)
    old = np.where(is_decode, sequences - joined, running)
    # Two prefills in a row on an idle server: the second one's requests join the first one's.
    twice = is_decode.copy()
    twice[:2] = False
    twice[2:] &= ~is_decode[:-2] & ~is_decode[1:-1]
    last = _before(kept)
    old = np.where(twice & (old == 0), joined - last, old)
    return old, np.where(twice, last, new)


def _starts(run: Run, ends: Floats, running: Ints, earliest: Floats) -> tuple[Floats, Bools]:
    """When each step began, as far as streams show it, and whether they do: the server was busy, or a request was
    waiting."""
    previous = np.concatenate([[-np.inf], ends[:-1]])
    seen = (running > 0) | (earliest + UNCERTAIN_ARRIVAL < previous)
    for begun, _ in run.stretches:
        seen &= ~((previous < begun) & (ends >= begun))
    return np.where(seen, previous, np.maximum(earliest, previous)), seen


def medians(values: Floats, group: Ints) -> Floats:
    """The lower median of the values of every group 0, 1, …; every group has some."""
    order = np.lexsort((values, group))
    counts = np.bincount(group)
    starts = np.cumsum(counts) - counts
    middle: Floats = values[order][starts + (counts - 1) // 2]
    return middle
