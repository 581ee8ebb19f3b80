"""aiperf's records, `profile_export.jsonl`, of versions up to 0.13.0; one rung for every file.

A folder of them (a sweep over `--concurrency`) is one run. What load was asked for only the summary beside the records
says (`profile_export_aiperf.json`); without it, the requests tell. Metrics have had other names (`NAMES`), and
summaries another shape: `input_config.loadgen` where there are `phases` now.

| run | aiperf (`metadata`, `metrics` of a record) |
|---|---|
| sent, ended | `request_start_ns`, `request_end_ns`, unix ns |
| scheduled | rates: `credit_issued_ns`, when the request was due; users: sent |
| token times | sent + `time_to_first_token`, then the sums of `inter_chunk_latency`, ms: chunks with content |
| lengths | the server's `usage_prompt_tokens`, `usage_completion_tokens`, else the client's `…_sequence_length` |
| window | first to last instant of the phase `profiling`; requests of other phases are left out: it begins anew |

The window is aiperf's `benchmark_duration`. Its `request_throughput` divides by the whole phase instead, which begins
with the wait for the first request.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from measure.apis.failure import status_of
from measure.server.detection import vllm_told
from scenarios.importers.failures import status_of_text
from scenarios.importers.results import INSTANT, NOTHING, Floats, LoadLevel, RequestRecord, assemble, decoded_as, has
from sim.engines.catalog import identity
from sim.model.errors import BadInput
from sim.model.files.atomic import read_file
from sim.model.status import Status
from sim.model.warning import notice
from sim.model.workload import MOST_TOKENS
from sim.run import Run

SUMMARY = "profile_export_aiperf.json"
RECORDS = "profile_export.jsonl"
METRICS = "server_metrics_export.json"
ARRIVALS = {"poisson": "poisson", "constant": "constant"}
CANCELLED = 499  # nginx's code for a client that left, which aiperf gives a request that it cancelled
LONGEST = 10**15  # ns, eleven days: an end further from its start is a time of another clock
PER_SECOND = {"ns": 1e9, "us": 1e6, "µs": 1e6, "ms": 1e3, "s": 1.0, "sec": 1.0, "seconds": 1.0}
NAMES = {
    "ttft": ("time_to_first_token", "ttft"),
    "gaps": ("inter_chunk_latency", "icl"),
    "latency": ("request_latency",),
    "prompt": ("usage_prompt_tokens", "input_sequence_length", "isl", "input_token_count", "error_isl"),
    "output": ("usage_completion_tokens", "output_sequence_length", "osl", "output_token_count"),
}


class _Metadata(msgspec.Struct):
    request_start_ns: int
    request_end_ns: int
    credit_issued_ns: int | None = None
    benchmark_phase: str = "profiling"
    was_cancelled: bool = False
    cancellation_time_ns: int | None = None


class _Metric(msgspec.Struct):
    value: Any = None
    unit: str = "ms"


class _Error(msgspec.Struct):
    code: int | None = None
    type: str | None = None
    message: str = ""


class _Record(msgspec.Struct):
    metadata: _Metadata
    metrics: dict[str, _Metric]
    error: _Error | None = None


class _Phase(msgspec.Struct):
    name: str = ""
    type: str = ""
    concurrency: int | None = None
    rate: float | None = None


class _Loadgen(msgspec.Struct):
    concurrency: int | None = None
    request_rate: float | None = None
    request_rate_mode: str | None = None
    arrival_pattern: str | None = None


class _Input(msgspec.Struct):
    phases: list[_Phase] = []
    loadgen: _Loadgen | None = None


class _Summary(msgspec.Struct):
    aiperf_version: str | None = None
    input_config: _Input = msgspec.field(default_factory=_Input)

    def asked(self) -> _Phase | None:
        """The phase that was measured."""
        if self.input_config.loadgen is not None:
            old = self.input_config.loadgen
            return _Phase(
                type=old.arrival_pattern or old.request_rate_mode or "",
                concurrency=old.concurrency,
                rate=old.request_rate,
            )
        return next((p for p in self.input_config.phases if p.name == "profiling"), None)


def recognises(document: Any) -> bool:
    """Whether a JSON document is one of aiperf's records."""
    return isinstance(document, dict) and has(document.get("metadata"), "request_start_ns")


def is_summary(document: Any) -> bool:
    """Whether a JSON document is aiperf's summary."""
    asked = document.get("input_config") if isinstance(document, dict) else None
    return has(document, "aiperf_version") or has(asked, "loadgen")


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
    versions, levels = set(), []
    for file, documents in files.items():
        summary = _summary(file)
        if summary is not None:
            versions.add(summary.aiperf_version or "")
        levels.append(_level(documents, file, origin, summary))
    tool = " ".join(["aiperf", *sorted(versions - {""})])
    labels = [found for file in files if (found := _cache_labels(file)) is not None]
    engine = identity("vllm", "file") if labels else None
    info = vllm_told(labels[0]) if labels else None
    return assemble(path, tool, levels, epoch=origin / 1e9, engine=engine, info=info)


def _cache_labels(records: Path) -> dict[str, Any] | None:
    """The labels of vLLM's cache_config_info among the server's metrics that aiperf keeps beside its records; None if
    they are not vLLM's."""
    beside = records.with_name(METRICS)
    if not beside.is_file():
        return None
    try:
        metrics = msgspec.json.decode(read_file(beside))["metrics"]
        names = [name for name in metrics if name.startswith("vllm:")]
        series = metrics.get("vllm:cache_config_info", {}).get("series", [])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    labels = [one["labels"] for one in series if has(one, "labels") and isinstance(one["labels"], dict)]
    return (labels[0] if labels else {}) if names else None


def _started(documents: list[Any], file: Path) -> int:
    return min(decoded_as(d, _Record, file, i + 1).metadata.request_start_ns for i, d in enumerate(documents))


def _summary(records: Path) -> _Summary | None:
    beside = records.with_name(SUMMARY) if records.name == RECORDS else records.with_suffix(".json")
    if beside == records or not beside.is_file():
        return None
    try:
        raw = msgspec.json.decode(read_file(beside))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        if beside.name != SUMMARY:
            return None  # somebody else's
        raise BadInput(f"not JSON ({e}); expected aiperf's summary", path=beside) from e
    return decoded_as(raw, _Summary, beside) if is_summary(raw) else None


def _level(documents: list[Any], file: Path, origin: int, summary: _Summary | None) -> LoadLevel:
    every = [decoded_as(d, _Record, file, i + 1) for i, d in enumerate(documents)]
    records = [r for r in every if r.metadata.benchmark_phase == "profiling"]
    profiling = [r.metadata for r in records]
    if not profiling:
        raise BadInput("no request of the phase profiling; expected aiperf's records", path=file)
    asked = summary.asked() if summary is not None else None
    warnings = []
    if len(records) < len(every):
        warnings.append(notice("warm-up-left-out", f"{len(every) - len(records)} requests of a warm-up are left out"))
    users, rate = (asked.concurrency, asked.rate) if asked is not None else (None, None)
    if rate is not None and users is not None:
        warnings.append(
            notice("load-capped", f"at most {users} requests were let in at once: not all of an open loop's load")
        )
        users = None
    # a cancelled request's end was, in some versions, a time of another clock
    ends = [m.request_end_ns for m in profiling if _same_clock(m)]
    if not ends:
        raise BadInput("no request of it has an end on the clock of its start; expected unix ns", path=file)
    return LoadLevel(
        users=users,
        rate=rate,
        arrivals=ARRIVALS.get(asked.type) if asked is not None and rate is not None else None,
        settled=(min(m.request_start_ns for m in profiling) - origin) / 1e9,
        end=(max(ends) - origin) / 1e9 + INSTANT,
        answers=[_answer(r, origin, rate is not None) for r in records],
        warnings=warnings,
    )


def _same_clock(metadata: _Metadata) -> bool:
    return 0 <= metadata.request_end_ns - metadata.request_start_ns < LONGEST


def _answer(record: _Record, origin: int, open_loop: bool) -> RequestRecord:
    metadata, error = record.metadata, record.error
    known, end = _same_clock(metadata), metadata.request_end_ns
    if not known and (left := metadata.cancellation_time_ns) is not None and left >= metadata.request_start_ns:
        known, end = left - metadata.request_start_ns < LONGEST, left
    sent = (metadata.request_start_ns - origin) / 1e9
    ended = (end - origin) / 1e9 if known else sent
    due = metadata.credit_issued_ns
    ttft, latency = (_seconds(record, name) for name in ("ttft", "latency"))
    chunks = NOTHING
    if ttft is not None and ttft.ndim == 0:
        gaps = _seconds(record, "gaps")
        chunks = sent + np.cumsum(np.append(ttft, gaps if gaps is not None and gaps.ndim else NOTHING))
    status = Status.OK
    if metadata.was_cancelled or (error is not None and error.code == CANCELLED):
        status = Status.ABORTED
    elif error is not None:
        status = status_of(error.code) if error.code else status_of_text(f"{error.type} {error.message}")
    return RequestRecord(
        sent=sent,
        ended=ended,
        end_known=known,
        due=(due - origin) / 1e9 if open_loop and due is not None else None,
        prompt_tokens=_count(record, "prompt"),
        output_tokens=_count(record, "output"),
        last=sent + float(latency) if latency is not None and latency.ndim == 0 else None,
        chunks=chunks,
        status=status,
        error=None if error is None else error.message or error.type,
    )


def _metric(record: _Record, name: str) -> _Metric | None:
    return next((record.metrics[key] for key in NAMES[name] if key in record.metrics), None)


def _seconds(record: _Record, name: str) -> Floats | None:
    """A metric as s, one number or several; None if it is neither."""
    metric = _metric(record, name)
    if metric is None or metric.unit not in PER_SECOND:
        return None
    try:
        values = np.asarray(metric.value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return values / PER_SECOND[metric.unit] if values.ndim <= 1 and np.isfinite(values).all() else None


def _count(record: _Record, name: str) -> int:
    metric = _metric(record, name)
    value = metric.value if metric is not None else None
    return int(value) if isinstance(value, int | float) and 0 <= value <= MOST_TOKENS else 0
