"""The table of a run's requests: one row each, from the records of its files and back to them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.model.errors import BadInput
from sim.model.files.records import RequestLine, kept_time
from sim.model.status import Status
from sim.model.warning import Notice, notice

REQUEST_COLUMNS = {
    "id": "int64",
    "rung": "int64",
    "user": "int64",
    "replica": "int64",  # -1: reached none, or unknown
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


_FLAGGED = 3  # requests that a warning names
_TOO_MANY = 0.1  # share of the requests from which on it is not single ones that are wrong


class Requests:
    """The requests of a run, added one by one: a number a column each, and the times of their tokens in one array.

    A million requests of which nothing but their lengths and times is kept take some hundred bytes each, and eight more
    for every token.
    """

    def __init__(self, latest: float, rungs: int):
        """No time is later than `latest`, s; the run has so many `rungs`."""
        self._latest, self._rungs = latest, rungs
        self._columns: dict[str, array[Any]] = {
            name: array("q" if kind == "int64" else "d") for name, kind in REQUEST_COLUMNS.items() if kind != "object"
        }
        self._texts: dict[str, list[Any]] = {name: [] for name, kind in REQUEST_COLUMNS.items() if kind == "object"}
        self._same: dict[str, str] = {}  # texts repeat: each is held once
        self._times, self._counts = array("d"), array("q")
        self._carried: dict[int, NDArray[np.int64]] = {}
        self._wrong: dict[str, list[int]] = {}
        self._first_wrong: tuple[Path, str] | None = None
        self._strange: dict[str, list[int]] = {}
        self._seen = 0

    def add(self, r: RequestLine, file: Path) -> None:
        """One more. What cannot be is left out, and counted; `BadInput` where a whole number has over 64 bits."""
        self._seen += 1
        if (why := r.wrong(self._latest)) is not None:
            self._wrong.setdefault(why, []).append(r.id)
            self._first_wrong = self._first_wrong or (file, why)
            return
        times = r.token_times or []
        ok = r.status == Status.OK
        if self._rungs and not 0 <= r.rung < self._rungs:
            self._strange.setdefault("name a rung that run.json does not list; they count by their times", []).append(
                r.id
            )
        if ok and times and r.output_tokens and r.output_tokens != len(times):
            said = "have another number of output tokens than of token times; rates count the times"
            self._strange.setdefault(said, []).append(r.id)
        first, last = (times[0], times[-1]) if times else (r.first_token, r.last_token)
        if last is None and ok:  # who was not streamed has the last token with the answer
            last = r.ended
        values = {
            "id": r.id,
            "rung": r.rung,
            "user": r.user,
            "replica": r.replica,
            "scheduled": r.sent if r.scheduled is None else r.scheduled,
            "sent": r.sent,
            "ended": r.ended,
            "prompt_tokens": r.prompt_tokens,
            "max_new_tokens": r.max_new_tokens,
            "output_tokens": r.output_tokens if r.output_tokens or not times else len(times),
            "first_token": first,
            "last_token": last,
        }
        try:
            for name, column in self._columns.items():
                value = values[name]
                column.append(math.nan if value is None else value)
        except OverflowError as e:
            raise BadInput("a whole number of a request is too large for 64 bits", path=file) from e
        for name, texts in self._texts.items():
            text = getattr(r, name)
            texts.append(self._same.setdefault(text, text) if isinstance(text, str) else text)
        if r.event_tokens:
            self._carried[len(self._counts)] = np.asarray(r.event_tokens, dtype=np.int64)
        self._times.extend(times)
        self._counts.append(len(times))

    def table(
        self, warnings: list[Notice]
    ) -> tuple[pd.DataFrame, list[NDArray[np.float64]] | None, list[NDArray[np.int64] | None] | None]:
        """All of them in order of `sent`, each once; the token times and the tokens of events of each where there are
        any. `BadInput` where too many were wrong."""
        self._say(warnings)
        columns: dict[str, Any] = {
            name: np.frombuffer(column, dtype=np.int64 if column.typecode == "q" else np.float64)
            if len(column)
            else np.empty(0, dtype=np.int64 if column.typecode == "q" else np.float64)
            for name, column in self._columns.items()
        }
        columns |= {name: pd.Series(texts, dtype="object") for name, texts in self._texts.items()}
        table = pd.DataFrame({name: columns[name] for name in REQUEST_COLUMNS})
        again = table.duplicated(["id", "user", "sent"])
        if again.any():  # a file that was compressed and kept tells of all of them again
            warnings.append(
                notice(
                    "duplicate-requests",
                    f"{int(again.sum())} of {len(table)} requests occur twice (the same id, user and time sent) "
                    "and are counted once",
                )
            )
        order = np.lexsort((table["id"], table["sent"]))
        order = order[~again.to_numpy()[order]]
        shared = int(table[~again].duplicated(["id", "user"]).sum())  # workers number their own users' requests
        if shared:
            warnings.append(
                notice(
                    "shared-ids",
                    f"{shared} of {len(order)} requests have the id of another one; they count as they are",
                )
            )
        return table.iloc[order].reset_index(drop=True), self._streams(order), self._events(order)

    def _streams(self, order: NDArray[np.int64]) -> list[NDArray[np.float64]] | None:
        if not len(self._times):
            return None
        times = np.frombuffer(self._times, dtype=np.float64)
        ends = np.cumsum(np.frombuffer(self._counts, dtype=np.int64))
        starts = ends - np.frombuffer(self._counts, dtype=np.int64)
        return [times[a:b] for a, b in zip(starts[order].tolist(), ends[order].tolist(), strict=True)]

    def _events(self, order: NDArray[np.int64]) -> list[NDArray[np.int64] | None] | None:
        return [self._carried.get(i) for i in order.tolist()] if self._carried else None

    def _say(self, warnings: list[Notice]) -> None:
        wrong = sum(map(len, self._wrong.values()))
        if wrong > _TOO_MANY * self._seen and wrong > 1:
            assert self._first_wrong is not None
            file, why = self._first_wrong
            raise BadInput(
                f"expected possible requests: {wrong} of {self._seen} are impossible ({why}: "
                f"{_named(self._wrong[why])})",
                path=file,
            )
        for why, ids in self._wrong.items():
            warnings.append(
                notice(
                    "impossible-requests", f"{len(ids)} of {self._seen} requests are left out: {why} ({_named(ids)})"
                )
            )
        for what, ids in self._strange.items():
            warnings.append(notice("odd-requests", f"{len(ids)} of {self._seen} requests {what} ({_named(ids)})"))


def _named(ids: list[int]) -> str:
    more = f" and {len(ids) - _FLAGGED} more" if len(ids) > _FLAGGED else ""
    return f"id{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids[:_FLAGGED]))}{more}"


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
        if row.get("replica", -1) < 0:
            record.pop("replica", None)
        if times is not None:
            record["token_times"] = [kept_time(t) for t in times[i]]
            del record["first_token"], record["last_token"]
        if event_tokens is not None and (carried := event_tokens[i]) is not None:
            record["event_tokens"] = carried.tolist()
        yield record
