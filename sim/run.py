"""A run: a table of requests, the rungs of its ladder, and (simulated) its steps. Measured and simulated alike.

On disk it is a directory: `run.json`, `requests.jsonl` (or `.gz`), and optionally `steps.jsonl` and `server.jsonl`.
Raw is kept here; every statistic is derived in `metrics`.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.errors import BadInput
from sim.scenario import Scenario, lenient

FORMAT = 1  # 1: first

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


@dataclass(frozen=True)
class Rung:
    """One load of the ladder; times in s since the run began. The steady window is [settled, end)."""

    start: float
    ramped: float
    settled: float
    end: float
    users: int | None = None
    rate: float | None = None
    status: str = "complete"
    doubts: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def load(self) -> float:
        """Users, or requests/s."""
        return float(self.users if self.users is not None else self.rate or 0.0)

    @property
    def seconds(self) -> float:
        """The length of the steady window."""
        return self.end - self.settled


@dataclass(frozen=True)
class Run:
    """Requests as a table with `REQUEST_COLUMNS` (times in s since the run began; NaN for what did not happen).

    `token_times` (measured) holds one array per row of `requests`; simulated runs have `steps` instead, and `step_ends`
    (the ends of every decode row's steps, s) if they had noise.
    """

    kind: str
    name: str
    scenario: Scenario
    rungs: list[Rung]
    requests: pd.DataFrame
    token_times: list[NDArray[np.float64]] | None = None
    steps: pd.DataFrame | None = None
    step_ends: list[NDArray[np.float64]] | None = None
    created: str | None = None
    software: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    doubts: list[str] = field(default_factory=list)
    path: Path | None = None


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file so that a reader sees the old one or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def read_run(path: Path) -> Run:
    """Read a run directory; unknown keys are ignored.

    A torn last line is dropped with a doubt; files of several workers (`requests*.jsonl`, plain or `.gz`) are merged
    and sorted by `sent`.
    """
    head = _read_head(path)
    doubts: list[str] = []
    records: list[dict[str, Any]] = []
    files = sorted(p for p in path.glob("requests*.jsonl*") if p.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        raise BadInput("missing; expected the run's requests, one JSON object a line", path=path / "requests.jsonl")
    for file in files:
        records += _read_lines(file, doubts)
    records.sort(key=lambda r: (r["sent"], r["id"]))
    times = [np.asarray(r.get("token_times") or [], dtype=np.float64) for r in records]
    rungs = [_rung(path, i, raw) for i, raw in enumerate(head.get("rungs", []))]
    try:
        scenario = lenient(head.get("scenario") or {"name": head.get("name", path.name)})
    except msgspec.ValidationError as e:
        message, _, key = str(e).partition(" - at `$.")
        raise BadInput(message, path=path / "run.json", key="scenario." + key.rstrip("`")) from e
    return Run(
        kind=head.get("kind", "measured"),
        name=head.get("name", path.name),
        scenario=scenario,
        rungs=rungs,
        requests=_table(records, times),
        token_times=times if any(len(t) for t in times) else None,
        steps=_read_steps(path, doubts),
        created=head.get("created"),
        software=head.get("software") or {},
        info=head.get("info"),
        segments=head.get("segments") or [],
        stopped=head.get("stopped") or "",
        doubts=doubts + list(head.get("doubts") or []),
        path=path,
    )


def _read_head(path: Path) -> dict[str, Any]:
    file = path / "run.json"
    try:
        head = msgspec.json.decode(file.read_bytes())
    except FileNotFoundError as e:
        raise BadInput("missing; expected a run directory with run.json", path=file) from e
    except (msgspec.DecodeError, OSError) as e:
        raise BadInput(f"not JSON ({e}); expected the head of a run", path=file) from e
    found = head.get("format") if isinstance(head, dict) else None
    if found != FORMAT:
        raise BadInput(f"expected {FORMAT}, found {found!r}", path=file, key="format")
    assert isinstance(head, dict)
    return head


def _read_lines(file: Path, doubts: list[str]) -> list[dict[str, Any]]:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as e:
        raise BadInput(f"cannot be read ({e})", path=file) from e
    records = []
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = msgspec.json.decode(line)
        except msgspec.DecodeError as e:
            if number == len(lines):
                doubts.append(f"{file.name}: the last line was torn and is left out")
                continue
            raise BadInput(f"not a JSON object ({e})", path=file, line=number) from e
        if not isinstance(record, dict):
            raise BadInput("expected a JSON object a line", path=file, line=number)
        for key in ("id", "sent", "prompt_tokens", "status"):
            if key not in record:
                raise BadInput("missing", path=file, line=number, key=key)
        records.append(record)
    return records


def _rung(path: Path, number: int, raw: dict[str, Any]) -> Rung:
    known = {"start", "ramped", "settled", "end", "users", "rate", "status", "doubts"}
    try:
        start = float(raw["start"])
    except (KeyError, TypeError, ValueError) as e:
        raise BadInput("expected a number of seconds", path=path / "run.json", key=f"rungs[{number}].start") from e

    def time(key: str) -> float:  # the last rung of a killed run has not got so far
        value = raw.get(key)
        return float("nan") if value is None else float(value)

    return Rung(
        start=start,
        ramped=time("ramped"),
        settled=time("settled"),
        end=time("end"),
        users=raw.get("users"),
        rate=raw.get("rate"),
        status=raw.get("status", "aborted"),
        doubts=list(raw.get("doubts") or []),
        extra={k: v for k, v in raw.items() if k not in known},
    )


def _table(records: list[dict[str, Any]], times: list[NDArray[np.float64]]) -> pd.DataFrame:
    nan = float("nan")
    defaults: dict[str, Any] = {"rung": 0, "user": -1, "max_new_tokens": 0, "finish_reason": None, "error": None}
    columns: dict[str, list[Any]] = {}
    for name, kind in REQUEST_COLUMNS.items():
        if name == "scheduled":
            columns[name] = [r.get("scheduled", r["sent"]) for r in records]
        elif name == "first_token":
            columns[name] = [t[0] if len(t) else r.get(name) for r, t in zip(records, times, strict=True)]
        elif name == "last_token":
            columns[name] = [t[-1] if len(t) else r.get(name) for r, t in zip(records, times, strict=True)]
        elif name == "output_tokens":
            columns[name] = [r.get(name, len(t)) for r, t in zip(records, times, strict=True)]
        else:
            columns[name] = [r.get(name, defaults.get(name)) for r in records]
        if kind == "float64":
            columns[name] = [nan if x is None else x for x in columns[name]]
    return pd.DataFrame({name: pd.Series(columns[name], dtype=kind) for name, kind in REQUEST_COLUMNS.items()})


def _read_steps(path: Path, doubts: list[str]) -> pd.DataFrame | None:
    for name in ("steps.jsonl", "steps.jsonl.gz"):
        if (path / name).exists():
            return pd.DataFrame(_read_lines_loose(path / name, doubts))
    return None


def _read_lines_loose(file: Path, doubts: list[str]) -> list[dict[str, Any]]:
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    rows = []
    for line in raw.split(b"\n"):
        if line.strip():
            try:
                rows.append(msgspec.json.decode(line))
            except msgspec.DecodeError:
                doubts.append(f"{file.name}: a torn line was left out")
    return rows
