"""aiperf's records, `profile_export.jsonl`, as version 0.13.0 writes them; one rung for every file.

A folder of them (a sweep over `--concurrency`) is one run. Which load it was only the summary beside the records says
(`profile_export_aiperf.json`); without it, the users are counted.

| run | aiperf (`metadata`, `metrics` of a record) |
|---|---|
| sent, ended | `request_start_ns`, `request_end_ns`, unix ns |
| scheduled | rates: `credit_issued_ns`, when the request was due; users: sent |
| token times | sent + `time_to_first_token`, then the sums of `inter_chunk_latency`, ms: chunks with content |
| lengths | the server's `usage_prompt_tokens`, `usage_completion_tokens`, else the client's `…_sequence_length` |
| window | first to last instant of the phase `profiling`; requests of other phases are kept, before it |

The window is aiperf's `benchmark_duration`. Its `request_throughput` divides by the whole phase instead, which begins
with the wait for the first request.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from measure.dialect import status_of
from scenarios.failures import status_of_text
from scenarios.results import INSTANT, NOTHING, Answer, Stretch, assemble, has, understood
from sim.errors import BadInput
from sim.request import ABORTED, OK
from sim.run import Run

SUMMARY = "profile_export_aiperf.json"
RECORDS = "profile_export.jsonl"


class _Metadata(msgspec.Struct):
    request_start_ns: int
    request_end_ns: int
    credit_issued_ns: int | None = None
    benchmark_phase: str = "profiling"
    was_cancelled: bool = False


class _Metric(msgspec.Struct):
    value: float | list[float]


class _Error(msgspec.Struct):
    code: int | None = None
    type: str | None = None
    message: str = ""


class _Record(msgspec.Struct):
    metadata: _Metadata
    metrics: dict[str, _Metric]
    error: _Error | None = None


class _Phase(msgspec.Struct):
    name: str
    type: str = ""
    concurrency: int | None = None
    rate: float | None = None


class _Input(msgspec.Struct):
    phases: list[_Phase]


class _Summary(msgspec.Struct):
    aiperf_version: str
    input_config: _Input


def speaks(document: Any) -> bool:
    """Whether a JSON document is one of aiperf's records."""
    return isinstance(document, dict) and has(document.get("metadata"), "request_start_ns")


def summarises(document: Any) -> bool:
    """Whether a JSON document is aiperf's summary."""
    return has(document, "aiperf_version")


def records_in(folder: Path) -> list[Path]:
    """The files of records in an artifact folder and those below it."""
    return sorted(folder.rglob(RECORDS))


def records_of(summary: Path) -> Path:
    """The file of records beside a summary; the second name is that of `--profile-export-prefix`."""
    default = summary.with_name(RECORDS)
    return default if summary.name == SUMMARY else summary.with_suffix(".jsonl")


def read(files: dict[Path, list[Any]], path: Path) -> Run:
    """The run of some files of records, each given as its JSON documents."""
    origin = min(_started(documents, file) for file, documents in files.items())
    versions, stretches = set(), []
    for file, documents in files.items():
        summary = _summary(file)
        if summary is not None:
            versions.add(summary.aiperf_version)
        stretches.append(_stretch(documents, file, origin, summary))
    tool = " ".join(["aiperf", *sorted(versions)])
    return assemble(path, tool, stretches, epoch=origin / 1e9)


def _started(documents: list[Any], file: Path) -> int:
    return min(understood(d, _Record, file, i + 1).metadata.request_start_ns for i, d in enumerate(documents))


def _summary(records: Path) -> _Summary | None:
    beside = records.with_name(SUMMARY) if records.name == RECORDS else records.with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        raw = msgspec.json.decode(beside.read_bytes())
    except msgspec.DecodeError as e:
        raise BadInput(f"not JSON ({e}); expected aiperf's summary", path=beside) from e
    return understood(raw, _Summary, beside)


def _stretch(documents: list[Any], file: Path, origin: int, summary: _Summary | None) -> Stretch:
    records = [understood(d, _Record, file, i + 1) for i, d in enumerate(documents)]
    profiling = [r.metadata for r in records if r.metadata.benchmark_phase == "profiling"]
    if not profiling:
        raise BadInput("no request of the phase profiling; expected aiperf's records", path=file)
    phase = next((p for p in summary.input_config.phases if p.name == "profiling"), None) if summary else None
    doubts = []
    users, rate = (phase.concurrency, phase.rate) if phase is not None else (None, None)
    if users is None and rate is None:
        users = _most_at_once(profiling)
        doubts.append(f"{SUMMARY} is not there to say the load; {users} requests were in flight at most")
    elif rate is not None and users is not None:
        doubts.append(f"at most {users} requests were let in at once: not all of an open loop's load")
        users = None
    return Stretch(
        users=users,
        rate=rate,
        settled=(min(m.request_start_ns for m in profiling) - origin) / 1e9,
        end=(max(m.request_end_ns for m in profiling) - origin) / 1e9 + INSTANT,
        answers=[_answer(r, origin, rate is not None) for r in records],
        doubts=doubts,
    )


def _most_at_once(requests: list[_Metadata]) -> int:
    edges = sorted([(m.request_start_ns, 1) for m in requests] + [(m.request_end_ns, -1) for m in requests])
    return int(np.cumsum([change for _, change in edges]).max())


def _answer(record: _Record, origin: int, open_loop: bool) -> Answer:
    metadata, error = record.metadata, record.error
    sent, ended = (metadata.request_start_ns - origin) / 1e9, (metadata.request_end_ns - origin) / 1e9
    due = metadata.credit_issued_ns
    ttft = _number(record, "time_to_first_token")
    gaps = record.metrics.get("inter_chunk_latency")
    chunks = NOTHING
    if ttft is not None:
        chunks = sent + np.cumsum([ttft, *(gaps.value if gaps and isinstance(gaps.value, list) else [])]) / 1e3
    latency = _number(record, "request_latency")
    status = OK
    if metadata.was_cancelled:
        status = ABORTED
    elif error is not None:
        status = status_of(error.code) if error.code else status_of_text(f"{error.type} {error.message}")
    return Answer(
        sent=sent,
        ended=ended,
        due=(due - origin) / 1e9 if open_loop and due is not None else None,
        prompt_tokens=_count(record, "usage_prompt_tokens", "input_sequence_length", "error_isl"),
        output_tokens=_count(record, "usage_completion_tokens", "output_sequence_length"),
        last=sent + latency / 1e3 if latency is not None else None,
        chunks=chunks,
        status=status,
        error=None if error is None else error.message or error.type,
    )


def _number(record: _Record, name: str) -> float | None:
    metric = record.metrics.get(name)
    return metric.value if metric is not None and isinstance(metric.value, float) else None


def _count(record: _Record, *names: str) -> int:
    found = (_number(record, name) for name in names)
    return int(next((n for n in found if n is not None), 0))
