"""Requests read from a file, for a workload's `empirical` or `trace`: a CSV or JSON lines of lengths, or a run.

The columns are those that `columns:` names, or else found by the names that public traces give them (`COLUMNS`; case
and blanks do not matter). Rows without an answer are failures: left out, with a warning. Of a run every request
*begun* counts: those that finished inside a window are biased towards short ones, and what one that failed would have
got is unknown, so that it stands with its `max_new_tokens`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.model.errors import BadInput
from sim.model.files.records import RequestLine, read_lines
from sim.model.files.rows import Rows, read_rows, under
from sim.model.files.shape import nearest
from sim.model.files.timestamps import has_zone, nanoseconds, number, unix_unit
from sim.model.status import Status
from sim.model.warning import Notice, notice
from sim.model.workload import MOST_TOKENS, UNITS, RequestFile, RequestLengths, Workload

EXPECTED = "a CSV or JSON lines of lengths, or a run"
COLUMNS = {
    "prompt_tokens": (
        *("prompt_tokens", "contexttokens", "input_tokens", "num_prefill_tokens", "request_tokens", "input_length"),
        *("num_prompt_tokens", "prompt_length", "prompt_len", "input_len", "isl"),
    ),
    "output_tokens": (
        *("output_tokens", "generatedtokens", "num_decode_tokens", "response_tokens", "output_length"),
        *("completion_tokens", "generated_tokens", "num_output_tokens", "output_len", "osl"),
    ),
    "max_new_tokens": ("max_new_tokens", "max_tokens"),
    "time": (
        *("scheduled", "sent", "time", "timestamp_ms", "timestamp", "arrived_at", "arrival_time"),
        *("arrival_timestamp", "arrival", "request_time", "datetime"),
    ),
}
OF_A_RUN = {"id", "sent", "prompt_tokens", "status"}
SECONDS = ("scheduled", "sent", "time", "arrived_at")  # a run's, our own CSVs' and Vidur's, which are documented
MOST_ROWS = 50_000_000  # requests after `scale`: more do not fit into the memory of one machine
HOUR = 3600.0  # s
MOST_A_SECOND = 1000.0  # requests: more on average than any public trace holds, so that the unit is another
LONGEST = 1e9  # s, thirty years: a longer trace has its times in another unit
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, lie evenly spread however many there are
_SEED = 20231116  # which requests `scale` leaves out is part of what the file says, not of a replicate's luck


@dataclass
class _Requests:
    """What was read, one element a request; times are raw, in `unit` per second."""

    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    charged: list[int] = field(default_factory=list)
    times: list[int | float] = field(default_factory=list)
    unit: float = 1.0
    warnings: list[Notice] = field(default_factory=list)


def read_lengths(workload: Workload) -> RequestLengths | None:
    """The requests of the workload's file, or None if it names none; `max_new_tokens` of the workload is what all ask.
    Those of a mix are those of its `classes`.

    Lengths in tokens, times in s from the first. Raises `BadInput` with the file's line.
    """
    if workload.classes:
        parts = tuple(map(read_lengths, workload.classes))
        none = np.empty(0, dtype=np.int64)
        said = tuple(warning for part in parts if part is not None for warning in part.warnings)
        return RequestLengths(none, none, none, None, said, parts) if any(part is not None for part in parts) else None
    source = workload.source
    if source is None:
        return None
    path = Path(source.file)
    found = _read(path, source)
    if not found.prompt:
        left_out = f" ({'; '.join(said.text for said in found.warnings)})" if found.warnings else ""
        raise BadInput(f"expected at least one request, found none{left_out}", path=path)
    prompt, output, charged = (
        np.array(column, dtype=np.int64) for column in (found.prompt, found.output, found.charged)
    )
    if workload.max_new_tokens is not None:
        if not isinstance(workload.max_new_tokens, int):
            raise BadInput("expected a whole number beside a file of lengths", key="workload.max_new_tokens")
        charged = np.full(len(prompt), workload.max_new_tokens, dtype=np.int64)
    if workload.ignore_eos:
        charged = output
    longer = int((output > charged).sum())
    if longer:
        found.warnings.append(
            notice("answers-cut", f"{path.name}: {longer} answers are longer than max_new_tokens, and are cut to it")
        )
    times = _seconds(found)
    if workload.trace is not None and times is not None:
        if (np.diff(times) < 0).any() and not path.is_dir() and "requests" not in path.name:
            found.warnings.append(
                notice("times-unordered", f"{path.name}: times are not in order; requests are sorted by them")
            )
        order = np.argsort(times, kind="stable")
        span = float(times.max() - times.min())
        if span > 0 and len(times) > MOST_A_SECOND * span:
            found.warnings.append(
                notice(
                    "time-unit-odd",
                    f"{path.name}: {len(times)} requests within {span:.3g} s: are the times in another unit "
                    "(time_unit)?",
                )
            )
        order, times = _scaled(order, times[order] - times[order[0]], source, path)
        prompt, output, charged = (column[order] for column in (prompt, output, charged))
    return RequestLengths(prompt, np.minimum(output, charged), charged, times, tuple(found.warnings))


def arrivals(workload: Workload, lengths: RequestLengths | None) -> NDArray[np.float64]:
    """When a trace's requests arrive, s from its beginning, in order; `BadInput` where its file does not say."""
    source = workload.source
    path = source.file if source is not None else None
    if lengths is None or lengths.times is None:
        names = ", ".join(COLUMNS["time"])
        message = (
            f"expected a workload.trace with arrival times: a column {names}, or what workload.trace.columns.time names"
        )
        raise BadInput(message, path=path, key="load.trace")
    if not lengths.times[-1] > 0:
        raise BadInput("expected requests at several times", path=path, key="load.trace")
    return lengths.times


def _read(path: Path, source: RequestFile) -> _Requests:
    if path.is_dir():
        files = sorted(path.glob("requests*.jsonl*")) or [path / "requests.jsonl"]
        return _run(files, path)
    rows = read_rows(path, EXPECTED)
    if not rows.delimiter and set(rows.names) >= OF_A_RUN:
        return _run([path], path)
    return _table(rows, source)


def _run(files: list[Path], path: Path) -> _Requests:
    found = _Requests()
    silent: list[Any] = []
    for file in files:
        for request in read_lines(file, found.warnings, RequestLine):
            charged = request.get("max_new_tokens") or request.get("output_tokens") or 0
            got = request.get("output_tokens") or 0 if request["status"] == Status.OK else charged
            if charged < 1 or request["prompt_tokens"] < 1:
                silent.append(request["id"])
                continue
            due = request.get("scheduled")
            found.prompt.append(request["prompt_tokens"])
            found.output.append(max(1, got))
            found.charged.append(charged)
            found.times.append(float(request["sent"] if due is None else due))
    if silent and not found.prompt:
        raise BadInput(f"request {silent[0]} does not say how many tokens it asked for", path=files[0])
    if silent:
        found.warnings.append(
            notice(
                "lengths-missing",
                f"{path.name}: {len(silent)} requests do not say how long they were, and are left out",
            )
        )
    return found


def _table(rows: Rows, source: RequestFile) -> _Requests:
    found = _Requests()
    names = _columns(rows, source, found.warnings)
    decimals = _Decimals(rows.delimiter not in ("", ","))
    clock = _Clock(rows.path, names, source.time_unit, in_seconds="chat_id" in rows.names)
    failed = empty = total = 0
    for line, row in rows.rows:
        total += 1

        def tokens(what: str, row: dict[str, Any] = row, line: int = line) -> int:
            return _tokens(under(row, names[what] or ""), names[what], decimals, rows, line)

        prompt, output = tokens("prompt_tokens"), tokens("output_tokens")
        charged = tokens("max_new_tokens") if names["max_new_tokens"] is not None else output
        if output < 1 or prompt < 1:
            failed += output < 1
            empty += output >= 1
            continue
        if names["time"] is not None:
            found.times.append(clock.read(decimals(under(row, names["time"])), line))
        found.prompt.append(prompt)
        found.output.append(output)
        found.charged.append(charged or output)
    found.unit = clock.per_second
    for count, what in ((failed, "no answer (failed requests)"), (empty, "no prompt")):
        if count:
            found.warnings.append(
                notice("rows-left-out", f"{rows.path.name}: {count} of {total} rows have {what} and are left out")
            )
    if decimals.commas:
        found.warnings.append(notice("decimal-commas", f"{rows.path.name}: decimal commas are read as points"))
    found.warnings += [*rows.warnings, *clock.warnings]
    return found


def _columns(rows: Rows, source: RequestFile, warnings: list[Notice]) -> dict[str, str | None]:
    """The name of each column in this file; None for one that is not there and need not be."""
    plain = {each.strip().lower().replace(" ", "_"): each for each in reversed(rows.names)}
    names: dict[str, str | None] = {}
    for what, known in COLUMNS.items():
        wanted = getattr(source.columns, what)
        there = wanted in rows.names or (not rows.delimiter and str(wanted).partition(".")[0] in rows.names)
        if wanted is not None and not there:
            hint = nearest(wanted, rows.names)
            meant = f"did you mean {hint}?" if hint else f"found {_listed(rows.names)}"
            raise BadInput(
                f"no column {wanted!r} in it; {meant}", path=rows.path, line=rows.line, key=f"columns.{what}"
            )
        fitting = [plain[each] for each in known if each in plain]
        name: str | None = wanted if wanted is not None else next(iter(fitting), None)
        if name is None and what in ("prompt_tokens", "output_tokens"):
            raise BadInput(
                f"expected a column {' or '.join(known)}, or what `columns: {{{what}: NAME}}` names; "
                f"found {_listed(rows.names)}",
                path=rows.path,
                line=rows.line,
            )
        if name in rows.repeated:
            raise BadInput(f"expected one column {name!r}, found several", path=rows.path, line=rows.line)
        if wanted is None and len(fitting) > 1:
            warnings.append(
                notice(
                    "column-chosen",
                    f"{rows.path.name}: {what} is taken from {fitting[0]!r}, not from {_listed(fitting[1:])}",
                )
            )
        names[what] = name
    return names


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "no columns"


class _Decimals:
    """Decimal commas, which spreadsheets of many countries write, as points."""

    def __init__(self, possible: bool):
        self._possible, self.commas = possible, 0

    def __call__(self, value: Any) -> Any:
        """The value with a point; a time of the day is left alone."""
        if not self._possible or not isinstance(value, str) or value.count(",") != 1 or ":" in value:
            return value
        self.commas += 1
        return value.replace(",", ".")


def _tokens(value: Any, name: str | None, decimals: _Decimals, rows: Rows, line: int) -> int:
    """A number of tokens; 0 for one that was left blank, as rows of failed requests have it."""
    blank = isinstance(value, str) and value.strip().lower() in ("", "nan", "null", "none")
    if (blank and len(rows.names) > 1) or (value is None and not rows.delimiter):
        return 0
    count = number(decimals(value))
    if count is None or count < 0 or count != int(count) or (isinstance(value, str) and not value.isascii()):
        found = "nothing" if value is None else repr(value)[:60]
        message = f"expected a whole number of tokens, found {found}"
        raise BadInput(message, path=rows.path, line=line, key=name)
    if count > MOST_TOKENS:
        raise BadInput(f"expected at most {MOST_TOKENS:,} tokens, found more", path=rows.path, line=line, key=name)
    return int(count)


class _Clock:
    """How a column of times is read: decided by its first value, and what was not stated is said."""

    def __init__(self, path: Path, names: dict[str, str | None], unit: str | None, *, in_seconds: bool = False):
        self._path, self._names, self._unit, self._in_seconds = path, names, unit, in_seconds
        self.per_second, self.warnings = 1.0, list[Notice]()
        self._written: bool | None = None  # as times of the day, not as numbers
        self._zoned: bool | None = None

    def read(self, value: Any, line: int) -> int | float:
        """One time, in units of `1 / per_second` s."""
        time = number(value)
        if self._written is None:
            self._written = time is None
            self.per_second = 1e9 if time is None else UNITS[self._unit_of(time)]
        found = nanoseconds(value) if self._written else time
        if found is None:
            form = "an ISO time such as 2024-05-12 00:00:01.5+00:00" if self._written else "a number"
            message = f"expected a time ({form}), found {str(value)[:60]!r}"
            raise BadInput(message, path=self._path, line=line, key=self._names["time"])
        if self._written:
            zoned = has_zone(value)
            if self._zoned not in (None, zoned):
                message = "expected times all with a zone or all without, found both"
                raise BadInput(message, path=self._path, line=line, key=self._names["time"])
            self._zoned = zoned
        return found

    def _unit_of(self, first: int | float) -> str:
        name = str(self._names["time"]).strip().lower()
        if self._unit is not None:
            return self._unit
        if (suffix := name.rpartition("_")[2]) in UNITS and "_" in name:
            return suffix
        plain = {what: str(given).strip().lower() for what, given in self._names.items()}
        if (unit := unix_unit(first)) is not None:
            self.warnings.append(
                notice(
                    "time-unit-assumed",
                    f"{self._path.name}: times are taken for unix times in {unit} (time_unit says otherwise)",
                )
            )
            return unit
        # Mooncake's traces are whole ms; those of Alibaba's Bailian, which has chats, are seconds by the same names
        mooncake = (name, plain["prompt_tokens"], plain["output_tokens"]) == (
            "timestamp",
            "input_length",
            "output_length",
        )
        if mooncake and isinstance(first, int) and not self._in_seconds:
            return "ms"
        if (name, plain["prompt_tokens"]) == ("timestamp", "request tokens"):
            return "s"  # BurstGPT
        if name not in SECONDS:
            self.warnings.append(
                notice(
                    "time-unit-assumed", f"{self._path.name}: times are taken for seconds (time_unit says otherwise)"
                )
            )
        return "s"


def _seconds(found: _Requests) -> NDArray[np.float64] | None:
    """Times in s from the earliest; exact ones are subtracted before they become floats."""
    if len(found.times) != len(found.prompt):
        return None
    first = min(found.times)
    return np.array([time - first for time in found.times], dtype=np.float64) / found.unit


def _scaled(
    order: NDArray[np.intp], times: NDArray[np.float64], source: RequestFile, path: Path
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Rows and their times, with `window`, `scale` and `compress` applied.

    Copies are turned round within the trace by less than an hour, so that what came together in one does not come
    together in all of them while the load of every hour of the day stays what it is. Requests of a part of a copy are
    drawn independently, which leaves Poisson arrivals Poisson.
    """
    if source.window is not None:
        low, high = source.window
        inside = (times >= low) & (times < high)
        if not inside.any():
            raise BadInput(f"expected requests from {low:g} to {high:g} s (window), found none", path=path)
        order, times = order[inside], times[inside] - low
    if source.scale != 1.0:
        if len(order) * source.scale > MOST_ROWS:
            raise BadInput(f"expected at most {MOST_ROWS:,} requests, found more after scale", path=path)
        whole, part = int(source.scale), source.scale - int(source.scale)
        lasts = float(times[-1])
        rng = np.random.default_rng(_SEED)
        rows, moments = [], []
        for copy in range(whole + (part > 0)):
            kept = np.ones(len(order), bool) if copy < whole else rng.random(len(order)) < part
            turn = (copy * _GOLDEN % 1.0) * min(HOUR, lasts)
            moved = times[kept] + turn
            rows.append(order[kept])
            moments.append(np.where(moved > lasts, moved - lasts, moved))
        order, times = np.concatenate(rows), np.concatenate(moments)
        if not len(order):
            raise BadInput(f"expected a scale that leaves at least one request, found {source.scale:g}", path=path)
        sorting = np.argsort(times, kind="stable")
        order, times = order[sorting], times[sorting]
    if not float(times[-1]) <= LONGEST * min(1.0, source.compress):
        lasts = float(times[-1] / source.compress) if source.compress > 1e-9 else float("inf")
        message = f"expected arrivals within {LONGEST:g} s of each other, found {lasts:.3g} s: is time_unit right?"
        raise BadInput(message, path=path)
    return order, times / source.compress
