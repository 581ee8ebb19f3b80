"""What a server did: the columns of a simulated run's steps, one row per run of equal steps, and its single calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.model.files.format import upgraded_step
from sim.model.files.records import StepLine, kept_time, read_lines
from sim.model.request import Request
from sim.model.warning import Notice

STEP_COLUMNS = (
    "start",
    "end",  # of the last step, s
    "count",  # equal steps in the row
    "replica",
    "passes",  # of `StepWork`, of the first step
    "prefill_tokens",
    "prefill_sequences",
    "prefill_attention",
    "prefill_longest",
    "decode_sequences",
    "decode_context",
    "decode_longest",
    "joined",  # requests that a prefill just added to a running batch (the first step pays for it)
    "dropped",  # requests that ended with the last step, where others go on
    "ended",  # requests that ended with the last step
    "kept",  # of the row's sequences, those that go on
    "used",  # tokens of the KV cache after the row
    "first",  # decode: the form's first step and growth, s; `extra` is the cost of joining
    "growth",
    "extra",
    "chunk_share",  # decode: the share of each step's time that chunks of prompts take, by the form
    "begun",  # sequences whose first token, or first after a preemption, came with the last step
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


def held_before(steps: pd.DataFrame) -> NDArray[np.int64]:
    """The tokens of its replica's KV cache before each row; the rows of a replica stand together."""
    used, replica = steps["used"].to_numpy(), steps["replica"].to_numpy()
    before = np.concatenate([[0], used[:-1]])  # a row's own `used` is what it leaves behind
    before[np.flatnonzero(np.diff(replica)) + 1] = 0
    return before


def step_records(steps: pd.DataFrame, step_ends: list[NDArray[np.float64]] | None) -> Iterator[dict[str, Any]]:
    """The lines of `steps.jsonl`: `STEP_COLUMNS`, and `members` and `ends` where known."""
    ends = iter(step_ends or [])
    columns = [name for name in (*STEP_COLUMNS, "members") if name in steps]
    for row in steps[columns].to_dict("records"):
        record = {str(name): value for name, value in row.items()}
        record |= {name: kept_time(record[name]) for name in ("start", "end")}
        if record["decode_sequences"] and step_ends:
            record["ends"] = [kept_time(t) for t in next(ends)]
        yield record


def read_steps(path: Path, warnings: list[Notice]) -> tuple[pd.DataFrame | None, list[NDArray[np.float64]] | None]:
    """The steps of a run directory with `STEP_COLUMNS`, and the ends of every decode row's steps, s; None where a file
    has none, or not all a simulated run has. `BadInput` names file, line and key."""
    file = next((path / n for n in ("steps.jsonl", "steps.jsonl.gz") if (path / n).exists()), None)
    if file is None:
        return None, None
    records = [upgraded_step(record) for record in read_lines(file, warnings, StepLine)]
    ends = [np.asarray(r.pop("ends"), dtype=np.float64) for r in records if "ends" in r]
    steps = pd.DataFrame(records)
    return (steps if set(STEP_COLUMNS) <= set(steps) else None), ends or None
