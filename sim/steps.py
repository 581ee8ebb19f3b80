"""What a server did: the columns of a simulated run's steps, one row per run of equal steps, and its single calls."""

from __future__ import annotations

from typing import NamedTuple

from sim.request import Request

PREFILL, DECODE = 0, 1

STEP_COLUMNS = (
    "kind",  # PREFILL or DECODE
    "start",
    "end",  # of the last step, s
    "count",  # equal steps in the row
    "sequences",
    "tokens",  # prefill: Σ prompt; decode: summed context before the first step
    "prompt_sq",  # prefill: Σ prompt²
    "longest",  # prefill: longest prompt; decode: longest context before the first step
    "joined",  # decode: requests that a prefill just added to a running batch (the first step pays for it)
    "ended",  # requests that ended with the last step
    "kept",  # of `sequences`, those that go on
    "used",  # tokens the shard reports after the row
    "first",  # decode: the form's first step and growth, s; `extra` is the cost of joining
    "growth",
    "extra",
)


class Call(NamedTuple):
    """What the router asked of its shard: `op` (prefill, decode, filter) over `members`, `ends` of its steps in s.

    `used` is what the shard reports for the batch it keeps: after a prefill, of old and new together.
    """

    op: str
    start: float
    ends: list[float]
    members: list[Request]
    used: int
