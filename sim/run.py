"""A run: a table of requests, the rungs of its ladder, and (simulated) its steps. Measured and simulated alike.

On disk it is a directory: `run.json`, `requests.jsonl` (or `.gz`), and optionally `steps.jsonl` and `server.jsonl`.
Raw is kept here; every statistic is derived in `metrics`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.document import Document
from sim.errors import BadInput
from sim.files import TEMPORARY, folder_of, in_the_name_of, target_of
from sim.records import HeadLine, RequestLine, RungLine, SegmentLine, check_known, kept_time, read_lines
from sim.scenario import Scenario, lenient, relocated
from sim.server import ServerConfig
from sim.shape import Key, found
from sim.steps import read_steps, step_records
from sim.table import once, request_records, request_table
from sim.text import shortened_name

FORMAT = 1  # 1: first
_WRITTEN = 1e-6  # s: files keep rungs and requests to the microsecond, and importers' segments exactly
_MOST = 2**53  # that a float counts exactly
_LATE = 1e6  # s: no ladder waits for days; a clock of the wall was taken for the run's

# what `GET /info` tells of a ServerConfig (tgi-0.9.4.md §1.1); not max_batch_prefill_tokens, not requires_padding
TOLD = (
    "max_batch_total_tokens",
    "max_input_length",
    "max_total_tokens",
    "waiting_served_ratio",
    "max_waiting_tokens",
    "max_concurrent_requests",
)


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
    def named(self) -> str:
        """The load with its unit."""
        return f"{self.load:g} {'requests/s' if self.users is None else 'users'}"

    @property
    def seconds(self) -> float:
        """The length of the steady window."""
        return self.end - self.settled


@dataclass(frozen=True)
class Run:
    """Requests as a table with `REQUEST_COLUMNS` (times in s since the run began; NaN for what did not happen).

    `token_times` (measured) holds one array per row of `requests`, one time per token; simulated runs have `steps`
    instead, and `step_ends` (the ends of every decode row's steps, s) if they had noise. `event_tokens` (one array per
    row, None for a stream of one token an event) says how many tokens came with each event, where some had several.
    """

    kind: str
    name: str
    scenario: Scenario
    rungs: list[Rung]
    requests: pd.DataFrame
    token_times: list[NDArray[np.float64]] | None = None
    event_tokens: list[NDArray[np.int64] | None] | None = None
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
        """The scenario's server, with what the real one said of itself at `/info` where it did, and it can be."""
        said = {name: (self.info or {}).get(name) for name in TOLD}
        numbers = {k: v for k, v in said.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        told = {k: v for k, v in numbers.items() if 0 < v < _MOST}
        whole = {k: int(v) for k, v in told.items() if v == int(v)}
        ratio = {k: float(v) for k, v in told.items() if k == "waiting_served_ratio"}
        return msgspec.structs.replace(self.scenario.server, **(whole | ratio))


def read_run(path: Path) -> Run:
    """Read a run directory; unknown keys are ignored.

    A torn last line is dropped with a doubt; files of several workers (`requests*.jsonl`, plain or `.gz`) are merged
    and sorted by `sent`, and a request that two of them tell of counts once, with a doubt. `BadInput` names file, line
    and key.
    """
    document = Document(path / "run.json", "the head of a run", FORMAT)
    head = document.values
    rungs = [_rung(document, i, raw) for i, raw in enumerate(_listed(document, "rungs"))]
    if rungs and not abs(rungs[0].start) < _LATE:
        raise document.fail(("rungs", 0, "start"), f"expected s since the run began, found {rungs[0].start:.15g}")
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
    records = once(records, doubts)
    records.sort(key=lambda r: (r["sent"], r["id"]))
    steps, ends = read_steps(path, doubts)
    times = [np.asarray(r.get("token_times") or [], dtype=np.float64) for r in records]
    carried = [np.asarray(r["event_tokens"], dtype=np.int64) if r.get("event_tokens") else None for r in records]
    try:
        scenario = relocated(lenient(head.get("scenario") or {"name": head.get("name", path.name)}), path, Path())
    except msgspec.ValidationError as e:
        message, _, key = str(e).partition(" - at `$.")
        raise BadInput(message, path=path / "run.json", key="scenario." + key.rstrip("`")) from e
    if (silent := _silent(head)) is not None:
        doubts.append(silent)
    try:
        requests = request_table(records, times)
    except OverflowError as e:
        raise BadInput("a whole number of a request is too large for 64 bits", path=path) from e
    return Run(
        kind=head.get("kind", "measured"),
        name=shortened_name(head.get("name", path.name)),
        scenario=scenario,
        rungs=rungs,
        requests=requests,
        token_times=times if any(len(t) for t in times) else None,
        event_tokens=carried if any(c is not None for c in carried) else None,
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


def _silent(head: dict[str, Any]) -> str | None:
    """A doubt where a measured run does not say its prefill budget, which `/info` does not tell either."""
    flag, scenario = "max_batch_prefill_tokens", head.get("scenario")
    server = scenario.get("server") if isinstance(scenario, dict) else None
    if head.get("kind") == "simulated" or (isinstance(server, dict) and flag in server):
        return None
    return f"run.json does not say server.{flag}: taken for {getattr(ServerConfig(), flag)}, which decides who waits"


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


def write_run(run: Run, path: Path, *, steps: bool = False, read_back: bool = False) -> Path:
    """Write a run into a new directory, `steps.jsonl` too if asked; what is there already is never overwritten.

    The directory appears complete or not at all; with `read_back` only if it can be read again. Times are kept to the
    microsecond.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput("exists already; expected a new directory (a run is never overwritten)", path=path)
    target = target_of(path)
    with (
        in_the_name_of(path),
        folder_of(target),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=TEMPORARY) as temporary,
    ):
        inside = Path(temporary) / "run"
        inside.mkdir()
        here = replace(run, scenario=relocated(run.scenario, Path(), target))
        (inside / "run.json").write_bytes(msgspec.json.format(_encode(_head(here)), indent=1) + b"\n")
        (inside / "requests.jsonl").write_bytes(
            _lines(request_records(run.requests, run.token_times, run.event_tokens))
        )
        if steps and run.steps is not None:
            (inside / "steps.jsonl").write_bytes(_lines(step_records(run.steps, run.step_ends)))
        if read_back:
            try:
                read_run(inside)
            except BadInput as e:
                name = None if e.path is None else path / Path(e.path).name
                raise BadInput(f"not written: {e.message}", path=name, line=e.line, key=e.key) from e
        inside.replace(target)
    return path


def _encode(value: object) -> bytes:
    return msgspec.json.encode(value)


def _lines(records: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(_encode(record) + b"\n" for record in records)


def _head(run: Run) -> dict[str, Any]:
    head: dict[str, Any] = {"format": FORMAT, "kind": run.kind, "name": run.name}
    if run.created is not None:
        head["created"] = run.created
    rungs = []
    for rung in run.rungs:
        load = {"users": rung.users} if rung.users is not None else {"rate": rung.rate}
        times = {name: kept_time(getattr(rung, name)) for name in ("start", "ramped", "settled", "end")}
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
