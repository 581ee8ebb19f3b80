"""A run: a table of requests, the rungs of its ladder, and (simulated) its steps. Measured and simulated alike.

On disk it is a directory: `run.json`, `requests.jsonl` (or `.gz`), and optionally `steps.jsonl` and `server.jsonl`.
Raw is kept here; every statistic is derived in `metrics`.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.document import Document
from sim.errors import BadInput
from sim.records import HeadLine, RequestLine, RungLine, SegmentLine, StepLine, check_known, read_lines
from sim.scenario import Scenario, lenient, relocated
from sim.server import ServerConfig
from sim.shape import Key, found
from sim.steps import DECODE, STEP_COLUMNS

FORMAT = 1  # 1: first
_WRITTEN = 1e-6  # s: files keep rungs and requests to the microsecond, and importers' segments exactly

# what `GET /info` tells of a ServerConfig (tgi-0.9.4.md §1.1); not max_batch_prefill_tokens, not requires_padding
TOLD = (
    "max_batch_total_tokens",
    "max_input_length",
    "max_total_tokens",
    "waiting_served_ratio",
    "max_waiting_tokens",
    "max_concurrent_requests",
)

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

    @property
    def stretches(self) -> list[tuple[float, float]]:
        """From when to when the users ran without a break, s; a run that was resumed has several.

        The first begins with the run, whatever `segments` lists, and the last has no end.
        """
        starts = (float(segment["start"]) - _WRITTEN for segment in self.segments if "start" in segment)
        edges = sorted({0.0, *(max(0.0, start) for start in starts)})
        return list(zip(edges, [*edges[1:], math.inf], strict=True))

    @property
    def server(self) -> ServerConfig:
        """The scenario's server, with what the real one said of itself at `/info` where it did."""
        told = {k: v for k, v in (self.info or {}).items() if k in TOLD and isinstance(v, int | float)}
        return msgspec.structs.replace(self.scenario.server, **told)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file so that a reader sees the old one or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as e:  # in the name of what was asked for
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(e.errno, e.strerror, str(path)) from e


def read_run(path: Path) -> Run:
    """Read a run directory; unknown keys are ignored.

    A torn last line is dropped with a doubt; files of several workers (`requests*.jsonl`, plain or `.gz`) are merged
    and sorted by `sent`, and a request that two of them tell of counts once, with a doubt. `BadInput` names file, line
    and key.
    """
    document = Document(path / "run.json", "the head of a run", FORMAT)
    head = document.values
    rungs = [_rung(document, i, raw) for i, raw in enumerate(_listed(document, "rungs"))]
    segments = _listed(document, "segments") if head.get("segments") is not None else []
    for i, raw in enumerate(segments):
        _check_map(document, ("segments", i), raw, SegmentLine)
    _check_map(document, (), head, HeadLine)
    doubts: list[str] = []
    records: list[dict[str, Any]] = []
    files = sorted(p for p in path.glob("requests*.jsonl*") if p.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        raise BadInput("missing; expected the run's requests, one JSON object a line", path=path / "requests.jsonl")
    for file in files:
        records += read_lines(file, doubts, RequestLine)
    records = _once(records, doubts)
    records.sort(key=lambda r: (r["sent"], r["id"]))
    steps, ends = _read_steps(path, doubts)
    times = [np.asarray(r.get("token_times") or [], dtype=np.float64) for r in records]
    try:
        scenario = relocated(lenient(head.get("scenario") or {"name": head.get("name", path.name)}), path, Path())
    except msgspec.ValidationError as e:
        message, _, key = str(e).partition(" - at `$.")
        raise BadInput(message, path=path / "run.json", key="scenario." + key.rstrip("`")) from e
    try:
        requests = _table(records, times)
    except OverflowError as e:
        raise BadInput("a whole number of a request is too large for 64 bits", path=path) from e
    return Run(
        kind=head.get("kind", "measured"),
        name=head.get("name", path.name),
        scenario=scenario,
        rungs=rungs,
        requests=requests,
        token_times=times if any(len(t) for t in times) else None,
        steps=steps,
        step_ends=ends,
        created=head.get("created"),
        software=head.get("software") or {},
        info=head.get("info"),
        segments=segments,
        stopped=head.get("stopped") or "",
        doubts=doubts + list(head.get("doubts") or []),
        path=path,
    )


def _check_map(document: Document, key: Key, raw: Any, shape: type[msgspec.Struct]) -> None:
    if not isinstance(raw, dict):
        raise document.fail(key, f"expected a map, found {found(raw)}")
    check_known(raw, shape, document.fail, key)


def _listed(document: Document, name: str) -> list[Any]:
    """The list under a key of the head; empty where the key is absent."""
    raw = document.values.get(name, [])
    if not isinstance(raw, list):
        raise document.fail((name,), f"expected a list, found {found(raw)}")
    return raw


def _once(records: list[dict[str, Any]], doubts: list[str]) -> list[dict[str, Any]]:
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


def _rung(document: Document, number: int, raw: Any) -> Rung:
    _check_map(document, ("rungs", number), raw, RungLine)
    known = msgspec.convert({k: v for k, v in raw.items() if v is not None}, RungLine)

    def time(t: float | None) -> float:
        return float("nan") if t is None else t

    return Rung(
        start=known.start,
        ramped=time(known.ramped),
        settled=time(known.settled),
        end=time(known.end),
        users=known.users,
        rate=known.rate,
        status=known.status,
        doubts=known.doubts,
        extra={k: v for k, v in raw.items() if k not in RungLine.__struct_fields__},
    )


def _table(records: list[dict[str, Any]], times: list[NDArray[np.float64]]) -> pd.DataFrame:
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


def write_run(run: Run, path: Path, *, steps: bool = False) -> Path:
    """Write a run into a new directory, `steps.jsonl` too if asked; what is there already is never overwritten.

    The directory appears complete or not at all. Times are kept to the microsecond.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput("exists already; expected a new directory (a run is never overwritten)", path=path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        inside = Path(temporary) / "run"
        inside.mkdir()
        here = replace(run, scenario=relocated(run.scenario, Path(), path))
        (inside / "run.json").write_bytes(msgspec.json.format(_encode(_head(here)), indent=1) + b"\n")
        (inside / "requests.jsonl").write_bytes(_lines(_request_records(run)))
        if steps and run.steps is not None:
            (inside / "steps.jsonl").write_bytes(_lines(_step_records(run)))
        inside.replace(path)
    return path


def _encode(value: object) -> bytes:
    return msgspec.json.encode(value)


def _lines(records: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(_encode(record) + b"\n" for record in records)


def _time(t: float) -> float | None:
    return None if t != t else round(float(t), 6)


def _head(run: Run) -> dict[str, Any]:
    head: dict[str, Any] = {"format": FORMAT, "kind": run.kind, "name": run.name}
    if run.created is not None:
        head["created"] = run.created
    rungs = []
    for rung in run.rungs:
        load = {"users": rung.users} if rung.users is not None else {"rate": rung.rate}
        times = {name: _time(getattr(rung, name)) for name in ("start", "ramped", "settled", "end")}
        rungs.append({**load, **times, "status": rung.status, "doubts": rung.doubts, **rung.extra})
    return head | {
        "scenario": msgspec.to_builtins(run.scenario),
        "software": run.software,
        "info": run.info,
        "rungs": rungs,
        "segments": run.segments,
        "stopped": run.stopped,
        "doubts": run.doubts,
    }


def _request_records(run: Run) -> Iterator[dict[str, Any]]:
    floats = {name for name, kind in REQUEST_COLUMNS.items() if kind == "float64"}
    for i, row in enumerate(run.requests.to_dict("records")):
        record = {str(k): _time(v) if k in floats else v for k, v in row.items()}
        if run.token_times is not None:
            record["token_times"] = [_time(t) for t in run.token_times[i]]
            del record["first_token"], record["last_token"]
        yield record


def _step_records(run: Run) -> Iterator[dict[str, Any]]:
    """Rows of `formats.md`'s steps, with what the statistics of a simulated run need besides."""
    assert run.steps is not None
    ends = iter(run.step_ends or [])
    filtered = False
    for row in run.steps.to_dict("records"):
        decode = row["kind"] == DECODE
        record = {
            "start": _time(row["start"]),
            "end": _time(row["end"]),
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
        }
        if decode and run.step_ends:
            record["ends"] = [_time(t) for t in next(ends)]
        filtered = row["ended"] > 0 and row["kept"] > 0
        yield record


def _read_steps(path: Path, doubts: list[str]) -> tuple[pd.DataFrame | None, list[NDArray[np.float64]] | None]:
    file = next((path / n for n in ("steps.jsonl", "steps.jsonl.gz") if (path / n).exists()), None)
    if file is None:
        return None, None
    records = read_lines(file, doubts, StepLine)
    ends = [np.asarray(r.pop("ends"), dtype=np.float64) for r in records if "ends" in r]
    if not records:
        return None, None
    steps = pd.DataFrame(records)
    steps["kind"] = (steps["kind"] == "decode").astype(np.int64)
    steps = steps.rename(columns={"max_prompt": "longest"})
    return (steps if set(STEP_COLUMNS) <= set(steps) else None), ends or None
