"""The table of requests of a simulated run, as it grows: twelve numbers a request, no objects kept."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

import numpy as np
import pandas as pd

from sim.model.request import Request
from sim.model.requests import REQUEST_COLUMNS
from sim.model.status import Status

_STATUS = tuple(Status)
_CODE: dict[Status | None, int] = {status: code for code, status in enumerate(_STATUS)}
_KEPT = (
    "id",
    "user",
    "replica",
    "scheduled",
    "sent",
    "ended",
    "prompt_tokens",
    "max_new_tokens",
    "output_tokens",
    "first_token",
    "last_token",
    "status",
    "of",
)
_ROW = Struct(f"{len(_KEPT)}d")  # to pack a row takes half the time of an array


class RequestLog:
    """Requests that have ended, by the client's clock, in the order in which they ended."""

    def __init__(self, classes: Sequence[str] = ()):
        """In a mix of `classes` the table has a column `class`."""
        self._rows, self._classes = bytearray(), classes

    def __len__(self) -> int:
        return len(self._rows) // _ROW.size

    def append(self, r: Request, ended: float, first_token: float, last_token: float) -> None:
        """Keep a request; times in s on the client's clock, NaN for a token that never came."""
        asked = r.prompt_tokens, r.max_new_tokens, r.received
        self._rows += _ROW.pack(
            r.id, r.user, r.replica, r.scheduled, r.sent, ended, *asked, first_token, last_token, _CODE[r.status], r.of
        )

    def table(self, rung_starts: list[float]) -> pd.DataFrame:
        """The table of `table.REQUEST_COLUMNS`, by `sent`; a request belongs to the rung in which it began."""
        rows = np.frombuffer(self._rows, dtype=np.float64).reshape(-1, len(_KEPT)).copy()
        rows = rows[np.argsort(rows[:, _KEPT.index("sent")], kind="stable")]
        column = dict(zip(_KEPT, rows.T, strict=True))
        status = column["status"].astype(np.int64)
        made: dict[str, np.ndarray] = dict(column)
        made["rung"] = np.searchsorted(np.asarray(rung_starts), column["scheduled"], side="right") - 1
        made["status"] = np.array(_STATUS, dtype=object)[status]
        reason = np.full(len(rows), None, dtype=object)
        whole = column["output_tokens"] >= column["max_new_tokens"]
        for said, of in (("length", whole), ("eos_token", ~whole)):
            reason[of & (status == _CODE[Status.OK])] = said
        made["finish_reason"] = reason
        made["error"] = np.full(len(rows), None, dtype=object)
        for name, kind in REQUEST_COLUMNS.items():
            if kind == "int64":
                made[name] = made[name].astype(np.int64)  # `DataFrame.astype` takes five times as long
        table = pd.DataFrame({name: made[name] for name in REQUEST_COLUMNS})
        if self._classes:
            table["class"] = np.array(self._classes, dtype=object)[column["of"].astype(np.int64)]
        return table
