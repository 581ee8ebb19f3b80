"""The table of a run's requests: one row each, from the records of its files and back to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.records import kept_time

REQUEST_COLUMNS = {
    "id": "int64",
    "rung": "int64",
    "user": "int64",
    "scheduled": "float64",
    "sent": "float64",
    "ended": "float64",
    "prompt_tokens": "int64",
    "max_new_tokens": "int64",
    "output_tokens": "int64",
    "first_token": "float64",
    "last_token": "float64",
    "finish_reason": "object",
    "status": "object",
    "error": "object",
}


def once(records: list[dict[str, Any]], doubts: list[str]) -> list[dict[str, Any]]:
    """Each request once: a file that was compressed and kept tells of all of them again."""
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        first.setdefault((record["id"], record.get("user"), record["sent"]), record)
    if len(first) < len(records):
        doubts.append(
            f"{len(records) - len(first)} of {len(records)} requests are there twice (the same id, user and time sent) "
            "and are counted once"
        )
    return list(first.values())


def request_table(records: list[dict[str, Any]], times: list[NDArray[np.float64]]) -> pd.DataFrame:
    """A row with `REQUEST_COLUMNS` for every record, and what its `times` (one array each, s) say where it is silent.

    `OverflowError` where a whole number is too large for 64 bits.
    """
    nan = float("nan")
    defaults: dict[str, Any] = {"rung": 0, "user": -1, "max_new_tokens": 0, "finish_reason": None, "error": None}
    columns: dict[str, list[Any]] = {}
    for name, kind in REQUEST_COLUMNS.items():
        said = [record.get(name) for record in records]
        if name == "scheduled":
            said = [r["sent"] if at is None else at for at, r in zip(said, records, strict=True)]
        elif name == "first_token":
            said = [t[0] if len(t) else at for at, t in zip(said, times, strict=True)]
        elif name == "last_token":  # who was not streamed has the last token with the answer
            whole = [
                r.get("ended") if at is None and r["status"] == "ok" else at
                for at, r in zip(said, records, strict=True)
            ]
            said = [t[-1] if len(t) else at for at, t in zip(whole, times, strict=True)]
        elif name == "output_tokens":
            said = [len(t) if n is None else n for n, t in zip(said, times, strict=True)]
        default = nan if kind == "float64" else defaults.get(name)
        columns[name] = [default if x is None else x for x in said]
    return pd.DataFrame({name: pd.Series(columns[name], dtype=kind) for name, kind in REQUEST_COLUMNS.items()})


def request_records(
    table: pd.DataFrame,
    times: list[NDArray[np.float64]] | None,
    event_tokens: list[NDArray[np.int64] | None] | None = None,
) -> Iterator[dict[str, Any]]:
    """The lines of `requests.jsonl`: with all token times (one array a row, s) where there are some.

    `event_tokens` (one array a row) is the tokens of every event, where some events carried several.
    """
    floats = {name for name, kind in REQUEST_COLUMNS.items() if kind == "float64"}
    for i, row in enumerate(table.to_dict("records")):
        record = {str(k): kept_time(v) if k in floats else v for k, v in row.items()}
        if times is not None:
            record["token_times"] = [kept_time(t) for t in times[i]]
            del record["first_token"], record["last_token"]
        if event_tokens is not None and (carried := event_tokens[i]) is not None:
            record["event_tokens"] = carried.tolist()
        yield record
