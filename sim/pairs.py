"""Requests read from a file, for a workload's `empirical` or `trace`: a CSV of lengths, or the requests of a run.

A CSV may name its columns as the public traces do; `#` lines are comments. Of a run every request *begun* counts: those
that finished inside a window are biased towards short ones, and what one that failed would have got is unknown, so that
it stands with its `max_new_tokens`.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np

from sim.errors import BadInput
from sim.records import RequestLine, read_lines
from sim.workload import Pairs, Workload

COLUMNS = {
    "prompt_tokens": ("prompt_tokens", "ContextTokens", "input_tokens", "num_prefill_tokens"),
    "output_tokens": ("output_tokens", "GeneratedTokens", "num_decode_tokens"),
    "max_new_tokens": ("max_new_tokens",),
    "time": ("scheduled", "sent", "time", "timestamp_ms", "TIMESTAMP"),
}


def read_pairs(workload: Workload) -> Pairs | None:
    """The requests of the workload's file, or None if it names none; `max_new_tokens` of the workload is what all ask.

    Lengths in tokens, times in s from the first request. Raises `BadInput` with the file's line.
    """
    name = workload.trace or workload.empirical
    if name is None:
        return None
    path = Path(name)
    files = sorted(path.glob("requests*.jsonl*")) or [path / "requests.jsonl"] if path.is_dir() else [path]
    rows = [row for file in files for row in (_run(file) if ".jsonl" in file.suffixes else _table(file))]
    if not rows:
        raise BadInput("expected at least one request, found none", path=path)
    prompt, output, charged, times = (np.array(column) for column in zip(*rows, strict=True))
    if workload.max_new_tokens is not None:
        if not isinstance(workload.max_new_tokens, int):
            raise BadInput("expected a whole number beside a file of lengths", key="workload.max_new_tokens")
        charged = np.full(len(rows), workload.max_new_tokens, dtype=np.int64)
    order = np.argsort(times, kind="stable")
    timed = not np.isnan(times).any()
    if workload.trace is not None and timed:
        prompt, output, charged, times = (column[order] for column in (prompt, output, charged, times))
    return Pairs(prompt, np.minimum(output, charged), charged, times - times[0] if timed else None)


def _table(path: Path) -> Iterator[tuple[int, int, int, float]]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as e:
        raise BadInput(f"cannot be read ({e}); expected a CSV of lengths, or a run", path=path) from e
    text = raw.decode("utf-8", errors="replace")
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line and not line.startswith("#")]
    reader = csv.DictReader(line for _, line in lines)
    header = reader.fieldnames or []
    names = {what: next((name for name in known if name in header), None) for what, known in COLUMNS.items()}
    for what in ("prompt_tokens", "output_tokens"):
        if names[what] is None:
            raise BadInput(
                f"expected a column {' or '.join(COLUMNS[what])}", path=path, line=lines[0][0] if lines else 1
            )
    for at, ((line, _), row) in enumerate(zip(lines[1:], reader, strict=False), 2):
        if reader.line_num != at:
            raise BadInput("expected a row to end with its line", path=path, line=line)
        output = _tokens(row, names["output_tokens"], path, line)
        charged = _tokens(row, names["max_new_tokens"], path, line) if names["max_new_tokens"] else output
        yield _tokens(row, names["prompt_tokens"], path, line), output, charged, _time(row, names["time"], path, line)


def _tokens(row: dict[str, str], name: str | None, path: Path, line: int) -> int:
    text = row[name or ""] or ""
    if not text.strip().isdecimal() or int(text) < 1:
        raise BadInput(f"expected a whole number of tokens, at least 1, found {text!r}", path=path, line=line, key=name)
    return int(text)


def _time(row: dict[str, str], name: str | None, path: Path, line: int) -> float:
    if name is None:
        return float("nan")
    try:
        if name == "TIMESTAMP":  # Azure's, to 100 ns: one digit more than datetime knows
            return datetime.fromisoformat(row[name][:26] + "+00:00").timestamp()
        return float(row[name]) / (1000 if name.endswith("_ms") else 1)
    except (TypeError, ValueError) as e:
        raise BadInput(f"expected a time, found {row[name]!r}", path=path, line=line, key=name) from e


def _run(path: Path) -> Iterator[tuple[int, int, int, float]]:
    for request in read_lines(path, [], RequestLine):
        charged = request.get("max_new_tokens") or request.get("output_tokens") or 0
        got = request.get("output_tokens") or 0 if request["status"] == "ok" else charged
        if charged < 1:
            raise BadInput(f"request {request['id']} does not say how many tokens it asked for", path=path)
        due = request.get("scheduled")
        yield request["prompt_tokens"], max(1, got), charged, float(request["sent"] if due is None else due)
