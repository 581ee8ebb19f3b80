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
    "prefill_sequences",  # of `StepWork`, of the first step
    "prefill_attention",
    "prefill_longest",
    "replica",
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
    for row in steps.to_dict("records"):
        decode = row["kind"] == DECODE
        record = {
            "start": kept_time(row["start"]),
            "end": kept_time(row["end"]),
            "count": row["count"],
            "replica": row["replica"],
            "passes": 1,
            "prefill_tokens": row["chunk_tokens"] if decode else row["tokens"],
            "prefill_sequences": row["prefill_sequences"],
            "prefill_attention": row["prefill_attention"],
            "prefill_longest": row["prefill_longest"],
            "decode_sequences": row["sequences"] if decode else 0,
            "decode_context": row["tokens"] if decode else 0,
            "decode_longest": row["longest"] if decode else 0,
            "joined": row["joined"],
            "dropped": row["ended"] if row["kept"] else 0,
            "ended": row["ended"],
            "kept": row["kept"],
            "used": row["used"],
            "first": row["first"],
            "growth": row["growth"],
            "extra": row["extra"],
            "chunk_share": row["chunk_share"],
            "begun": row["begun"],
        }
        if "members" in row:
            record["members"] = row["members"]
        if decode and step_ends:
            record["ends"] = [kept_time(t) for t in next(ends)]
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
    steps = _of_format_1(pd.DataFrame(records)) if "kind" in records[0] else _of_format_2(pd.DataFrame(records))
    return (steps if set(STEP_COLUMNS) <= set(steps) else None), ends or None


def _of_format_1(steps: pd.DataFrame) -> pd.DataFrame:
    steps = steps.rename(columns={"max_prompt": "longest"})
    steps["kind"] = (steps["kind"] == "decode").astype(np.int64)
    prefill = steps["kind"] == PREFILL
    if "begun" not in steps:
        steps["begun"] = steps["sequences"].where(prefill, 0)
        steps["chunk_tokens"], steps["chunk_share"] = 0, 0.0
    if {"tokens", "prompt_sq", "longest"} <= set(steps):
        steps["prefill_sequences"] = steps["sequences"].where(prefill, 0)
        steps["prefill_attention"] = ((steps["prompt_sq"] + steps["tokens"]) // 2).where(prefill, 0)
        steps["prefill_longest"], steps["replica"] = steps["longest"].where(prefill, 0), 0
    return steps


def _of_format_2(steps: pd.DataFrame) -> pd.DataFrame:
    decode = steps["decode_sequences"] > 0
    steps["kind"] = decode.astype(np.int64)
    for name, ours, theirs in (
        ("sequences", "decode_sequences", "prefill_sequences"),
        ("tokens", "decode_context", "prefill_tokens"),
        ("longest", "decode_longest", "prefill_longest"),
    ):
        steps[name] = steps[ours].where(decode, steps[theirs])
    steps["prompt_sq"] = (2 * steps["prefill_attention"] - steps["prefill_tokens"]).where(~decode, 0)
    steps["chunk_tokens"] = steps["prefill_tokens"].where(decode, 0)
    return steps
