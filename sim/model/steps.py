"""What a server did: the columns of a simulated run's steps, one row per run of equal steps, and its single calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.model.files.records import StepLine, kept_time, read_lines
from sim.model.request import Request
from sim.model.warning import Notice

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
    "chunk_tokens",  # decode: prompt tokens that each step computes besides
    "chunk_share",  # and the share of its time that this takes, by the form
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


def step_records(steps: pd.DataFrame, step_ends: list[NDArray[np.float64]] | None) -> Iterator[dict[str, Any]]:
    """The lines of `steps.jsonl`, with what the statistics of a simulated run need besides; `members` where known."""
    ends = iter(step_ends or [])
    filtered = False
    for row in steps.to_dict("records"):
        decode = row["kind"] == DECODE
        record = {
            "start": kept_time(row["start"]),
            "end": kept_time(row["end"]),
            "kind": "decode" if decode else "prefill",
            "count": row["count"],
            "sequences": row["sequences"],
            "tokens": row["tokens"],
            "prompt_sq": row["prompt_sq"],
            "max_prompt": row["longest"],
            "concat": row["joined"] > 0,
            "filtered": filtered,
            "joined": row["joined"],
            "ended": row["ended"],
            "kept": row["kept"],
            "used": row["used"],
            "first": row["first"],
            "growth": row["growth"],
            "extra": row["extra"],
            "chunk_tokens": row["chunk_tokens"],
            "chunk_share": row["chunk_share"],
            "begun": row["begun"],
        }
        if "members" in row:
            record["members"] = row["members"]
        if decode and step_ends:
            record["ends"] = [kept_time(t) for t in next(ends)]
        filtered = row["ended"] > 0 and row["kept"] > 0
        yield record


def read_steps(path: Path, warnings: list[Notice]) -> tuple[pd.DataFrame | None, list[NDArray[np.float64]] | None]:
    """The steps of a run directory with `STEP_COLUMNS`, and the ends of every decode row's steps, s; None where a file
    has none, or not all a simulated run has. `BadInput` names file, line and key."""
    file = next((path / n for n in ("steps.jsonl", "steps.jsonl.gz") if (path / n).exists()), None)
    if file is None:
        return None, None
    records = read_lines(file, warnings, StepLine)
    ends = [np.asarray(r.pop("ends"), dtype=np.float64) for r in records if "ends" in r]
    if not records:
        return None, None
    steps = pd.DataFrame(records)
    steps["kind"] = (steps["kind"] == "decode").astype(np.int64)
    steps = steps.rename(columns={"max_prompt": "longest"})
    if "begun" not in steps and "sequences" in steps:  # of before several engines were simulated
        steps["begun"] = steps["sequences"].where(steps["kind"] == PREFILL, 0)
        steps["chunk_tokens"], steps["chunk_share"] = 0, 0.0
    return (steps if set(STEP_COLUMNS) <= set(steps) else None), ends or None
