"""Requests read from a file, for a workload's `empirical` or `trace`: a CSV of lengths, or the requests of a run.

A CSV may name its columns as the public traces do; `#` lines are comments. Of a run every request *begun* counts: those
that finished inside a window are biased towards short ones, and what one that failed would have got is unknown, so that
it stands with its `max_new_tokens`.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sim.errors import BadInput
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
    if path.is_dir():
        path = next(iter(sorted(path.glob("requests*.jsonl*"))), path / "requests.jsonl")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as e:
        raise BadInput(f"cannot be read ({e}); expected a CSV of lengths, or a run", path=path) from e
    text = raw.decode("utf-8", errors="replace")
    rows = list(_run(text, path) if ".jsonl" in path.suffixes else _table(text, path))
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


def _table(text: str, path: Path) -> Iterator[tuple[int, int, int, float]]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line and not line.startswith("#")]
    reader = csv.DictReader(line for _, line in lines)
    header = reader.fieldnames or []
    names = {what: next((name for name in known if name in header), None) for what, known in COLUMNS.items()}
    for what in ("prompt_tokens", "output_tokens"):
        if names[what] is None:
            raise BadInput(
                f"expected a column {' or '.join(COLUMNS[what])}", path=path, line=lines[0][0] if lines else 1
            )
    for (line, _), row in zip(lines[1:], reader, strict=True):
        output = _tokens(row, names["output_tokens"], path, line)
        charged = _tokens(row, names["max_new_tokens"], path, line) if names["max_new_tokens"] else output
        yield _tokens(row, names["prompt_tokens"], path, line), output, charged, _time(row, names["time"], path, line)


def _tokens(row: dict[str, str], name: str | None, path: Path, line: int) -> int:
    text = row[name or ""] or ""
    if not text.strip().isdigit() or int(text) < 1:
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


def _run(text: str, path: Path) -> Iterator[tuple[int, int, int, float]]:
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            request: dict[str, Any] = msgspec.json.decode(line)
            charged = int(request.get("max_new_tokens") or request["output_tokens"])
            got = int(request["output_tokens"]) if request["status"] == "ok" else charged
            yield int(request["prompt_tokens"]), max(1, got), charged, float(request.get("scheduled", request["sent"]))
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError) as e:
            if number == len(lines):  # torn when the run was killed
                return
            raise BadInput("expected a request of a run", path=path, line=number) from e
