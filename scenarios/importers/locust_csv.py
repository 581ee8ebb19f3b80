"""What locust leaves as CSV: its history of sums (`--csv`), or a row per request (locust-plugins' `JmeterListener`).

Locust itself writes no file with a row per request, so its history becomes a run *without* requests: the rungs (numbers
of users), and the figures their sums determine, under the scenario's `published`. Such a run has no window and no
metric, and says so. `JmeterListener` writes `timeStamp` (when the answer had come, by the local clock), `elapsed` (ms),
`success`, `responseCode` and `allThreads` (users at that moment): a run of answers without tokens.

Of the history these are used: `Timestamp` (unix, whole s), `User Count`, and of the rows `Aggregated` the running
`Total Request Count`, `Total Failure Count` and `Total Average Response Time` (ms). The difference of two such rows is
exact; the percentiles, of locust's last ten seconds and rounded to two digits, are not used.
"""

from __future__ import annotations

import csv
import io
from datetime import datetime
from itertools import groupby, pairwise, zip_longest
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from measure.apis.failure import status_of
from scenarios.importers.failures import status_of_text
from scenarios.importers.results import INSTANT, LoadLevel, RequestRecord, assemble, moment, named, software
from sim.engines.catalog import DEFAULT, flags_of
from sim.model.errors import BadInput
from sim.model.files.rows import delimiter_of
from sim.model.requests import REQUEST_COLUMNS
from sim.model.scenario import Figure, Load, Scenario
from sim.model.warning import notice
from sim.run import Run, Rung

HISTORY = (
    *("Timestamp", "User Count", "Name"),
    *("Total Request Count", "Total Failure Count", "Total Average Response Time"),
)
ROWS = ("timeStamp", "elapsed", "success", "responseCode", "allThreads")
SUMS = ("Type", "Name", "Request Count", "Failure Count")
STREAMED = notice("headers-only", "of an answer that was streamed, locust's response time ends at the headers")


class _Snapshot(NamedTuple):
    time: float
    users: float
    requests: float
    failures: float
    mean: float  # ms

    @property
    def seconds(self) -> float:
        """What all requests so far took, together."""
        return self.mean / 1e3 * self.requests


Row = dict[str, str]


def recognises(text: str) -> bool:
    """Whether a text begins like one of these files."""
    header = _columns(text.partition("\n")[0])
    return any(set(columns) <= set(header) for columns in (HISTORY, ROWS, SUMS))


def read(text: str, path: Path) -> Run:
    """The run of a history or of rows."""
    header, *lines = text.splitlines()
    columns = _columns(header)
    if set(ROWS) <= set(columns):
        delimiter = delimiter_of(header)
        return _requests([_row(line, columns, delimiter) for line in lines if line.strip()], path)
    if set(HISTORY) <= set(columns):
        return _history(list(csv.DictReader(io.StringIO(text), columns, delimiter=delimiter_of(header)))[1:], path)
    raise BadInput(
        "holds sums over the whole test; expected ..._stats_history.csv, or rows as JmeterListener of locust-plugins "
        "writes them (locust itself has no option for one row per request)",
        path=path,
    )


def _columns(header: str) -> list[str]:
    """The names of a header, with or without quotes."""
    try:
        return [name.strip() for name in next(csv.reader([header.strip()], delimiter=delimiter_of(header)), [])]
    except csv.Error:  # no CSV at all
        return []


def _row(line: str, columns: list[str], delimiter: str) -> Row:
    """A row of JmeterListener's, which quotes nothing: commas too many are those of the failure's message.

    What has gone through a spreadsheet is quoted.
    """
    quoted = next(csv.reader([line], delimiter=delimiter))
    values = quoted if len(quoted) == len(columns) else line.split(delimiter)
    extra = len(values) - len(columns)
    if extra > 0 and "failureMessage" in columns:
        at = columns.index("failureMessage")
        values[at : at + extra + 1] = [delimiter.join(values[at : at + extra + 1])]
    return dict(zip_longest(columns, values[: len(columns)], fillvalue=""))


def _number(row: Row, key: str, path: Path, line: int) -> float:
    try:
        value = float(row[key])
    except (TypeError, ValueError):
        value = float("nan")
    if not isfinite(value):
        raise BadInput(f"expected a number, found {row[key]!r}", path=path, line=line, key=key)
    return value


def _history(rows: list[Row], path: Path) -> Run:
    snapshots = [
        _Snapshot(*(_number(row, key, path, line) for key in HISTORY[:2] + HISTORY[3:]))
        for line, row in enumerate(rows, 2)
        if row["Name"] == "Aggregated"
    ]
    levels = [list(level) for users, level in groupby(snapshots, lambda s: s.users) if users > 0]
    if not levels:
        raise BadInput("no row Aggregated with users; expected locust's history", path=path, key="User Count")
    zero = levels[0][0].time
    rungs, figures = [], []
    for level in levels:
        first, last = level[0], level[-1]
        users, seconds, done = int(first.users), last.time - first.time, last.requests - first.requests
        warnings = [
            notice(
                "only-sums",
                "locust kept sums, not requests: there is no window, and nothing to compare or to calibrate from",
            )
        ]
        if seconds > 0 and done > 0:
            source = f"locust, {path.name}: {done:g} requests in {seconds:g} s"
            mean = (last.seconds - first.seconds) / done
            figures.append(_figure("rps", done / seconds, done / seconds**2, users, source))
            figures.append(_figure("e2e_mean", mean, 1e-6, users, source))
            warnings.append(
                notice("sums", f"{done:g} requests in {seconds:g} s (whole seconds), {mean:.4g} s each on average")
            )
        if last.failures > first.failures:
            warnings.append(
                notice(
                    "failures-in-sums", f"failed requests, which are in the sums: {last.failures - first.failures:g}"
                )
            )
        nan, start, end = float("nan"), first.time - zero, last.time - zero
        rungs.append(Rung(start, nan, nan, end, users, status="limited", warnings=warnings))
    name = named(path)
    return Run(
        kind="measured",
        name=name,
        scenario=Scenario(
            name=name,
            description=f"imported from {path.name}, written by locust",
            server=flags_of(DEFAULT)(),
            load=Load(users=[rung.users or 0 for rung in rungs]),
            published=figures,
        ),
        rungs=rungs,
        requests=pd.DataFrame({name: pd.Series([], dtype=kind) for name, kind in REQUEST_COLUMNS.items()}),
        created=moment(zero),
        software=software("locust"),
        stopped="locust had done what it was asked",
        warnings=[
            notice(
                "only-sums",
                "a history of locust's holds no requests: this run has rungs and no metrics; what its sums determine "
                "is under the scenario's `published`, and lacks only lengths to be calibrated from",
            ),
            STREAMED,
        ],
    )


def _figure(metric: str, value: float, rounding: float, users: int, source: str) -> Figure:
    return Figure(metric=metric, value=round(value, 6), rounding=round(rounding, 6), source=source, users=users)


def _requests(rows: list[Row], path: Path) -> Run:
    answers, users = [], []
    for line, row in enumerate(rows, 2):
        ended = _instant(row, path, line)
        sent = ended - _number(row, "elapsed", path, line) / 1e3
        code, text = int(_number(row, "responseCode", path, line)), row.get("failureMessage", "")
        users.append(int(_number(row, "allThreads", path, line)))
        if row["success"] == "true":
            answers.append(RequestRecord(sent, ended, 0, 0, last=ended))
        else:
            answers.append(
                RequestRecord(sent, ended, 0, 0, status_of(code) if code >= 400 else status_of_text(text), text)
            )
    if not answers or min(users) < 1:
        raise BadInput("expected a row for every request, with the users of the moment", path=path, key="allThreads")
    warnings = [
        notice(
            "no-token-count",
            "locust counts no tokens: lengths are 0, and there is no TTFT; give the scenario its lengths to simulate "
            "it",
        ),
        STREAMED,
    ]
    if all("." not in row["timeStamp"] for row in rows):
        warnings.append(notice("whole-seconds", "times are whole seconds"))
    if len({row.get("label") for row in rows}) > 1:
        warnings.append(notice("labels-merged", "requests of several labels are taken together"))
    return assemble(path, "locust", _levels(answers, users), warnings=warnings, anew=False)


def _instant(row: Row, path: Path, line: int) -> float:
    """Seconds since some midnight; rows give the wall clock of a place they do not name."""
    try:
        return (datetime.fromisoformat(row["timeStamp"]).replace(tzinfo=None) - datetime(2000, 1, 1)).total_seconds()
    except ValueError:
        message = f"expected a time such as 2024-05-01 12:00:00.123456, found {row['timeStamp']!r}"
        raise BadInput(message, path=path, line=line, key="timeStamp") from None


def _levels(answers: list[RequestRecord], users: list[int]) -> list[LoadLevel]:
    """A level for every number of users, with the requests begun at it; settled as a ladder's rung is."""
    order = sorted(range(len(answers)), key=lambda i: answers[i].ended)
    groups = [list(group) for _, group in groupby(order, key=users.__getitem__)]
    # users were added after the last answer of the level before
    edges = [float("-inf"), *(answers[group[-1]].ended for group in groups[:-1]), answers[order[-1]].ended + INSTANT]
    levels = []
    for group, (low, high) in zip(groups, pairwise(edges), strict=True):
        count = users[group[0]]
        begun = [a for a in answers if low <= a.sent < high]
        ended = sorted(a.ended for a in begun)
        start = max(low, min(a.sent for a in answers))
        steady = len(ended) > count and ended[count - 1] < high
        warnings = (
            []
            if steady
            else [
                notice("not-settled", f"not every one of {count} users finished a request here, so there is no window")
            ]
        )
        settled = ended[count - 1] if steady else high
        levels.append(
            LoadLevel(
                users=count, counted=True, settled=settled, end=high, answers=begun, warnings=warnings, start=start
            )
        )
    return levels
