"""guidellm's JSON report (`--output kind=json`), of versions 0.2 to 0.8; one rung for every benchmark in it.

| run | guidellm (`requests.successful`, `.incomplete`, `.errored`) |
|---|---|
| sent, ended | `info.timings.request_start`, `request_end` (else `resolve_end`), unix s |
| scheduled | rates: `info.timings.targeted_start`; streams: sent |
| first and last token | `info.timings.first_token_iteration`, `last_token_iteration` |
| lengths | `prompt_tokens`, `output_tokens`: the server's count if it gave one; `max_tokens` of `request_args` |
| window | the benchmark's `start_time` to `end_time`: what guidellm's warm-up and cool-down leave |

There is no time for every token, so no ITL and nothing to rebuild steps from. Before 0.4, a request's times stood in it
(`start_time`, `first_token_time`, …) and the strategy under `args`; before 0.5 the file did not name its version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from scenarios.importers.failures import status_of_text
from scenarios.importers.results import INSTANT, LoadLevel, RequestRecord, assemble, decoded_as, has
from sim.engines.catalog import identity
from sim.model.errors import BadInput
from sim.model.identity import Identity
from sim.model.status import Status
from sim.model.warning import notice
from sim.run import Run

ARRIVALS = {"constant": "constant", "async": "constant", "poisson": "poisson"}
CLOCK = 1e9  # s: what is less is no unix time (2001 and later), but an offset that 0.8.1 forgot to add a start to


class _Timings(msgspec.Struct):
    targeted_start: float | None = None
    request_start: float | None = None
    first_token_iteration: float | None = None
    last_token_iteration: float | None = None
    token_iterations: int = 0
    request_end: float | None = None
    resolve_end: float | None = None


class _Info(msgspec.Struct):
    timings: _Timings
    error: str | None = None


class _Request(msgspec.Struct):
    info: _Info
    request_args: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    time_to_first_token_ms: float | None = None


class _Body(msgspec.Struct, frozen=True):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class _Arguments(msgspec.Struct):
    body: _Body = _Body()


class _Requests(msgspec.Struct):
    successful: list[_Request] | None = None
    incomplete: list[_Request] | None = None
    errored: list[_Request] | None = None


class _Strategy(msgspec.Struct):
    type_: str
    streams: int | None = None
    rate: float | None = None
    max_concurrency: int | None = None


class _Config(msgspec.Struct):
    strategy: _Strategy


class _Totals(msgspec.Struct):
    total: int | None = None


class _Metrics(msgspec.Struct):
    request_totals: _Totals | None = None


class _Benchmark(msgspec.Struct):
    config: _Config
    start_time: float
    end_time: float
    requests: _Requests
    metrics: _Metrics = msgspec.field(default_factory=_Metrics)


class _Metadata(msgspec.Struct):
    guidellm_version: str | None = None


class _Report(msgspec.Struct):
    benchmarks: list[_Benchmark]
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)


def recognises(document: Any) -> bool:
    """Whether a JSON document is guidellm's."""
    if not isinstance(document, dict):
        return False
    if has(document.get("metadata"), "guidellm_version"):
        return True
    first = _first(document.get("benchmarks"))
    return has(first, "type_") or (has(first, "benchmarks") and "args" in document)


def read(document: Any, path: Path) -> Run:
    """The run of a guidellm report."""
    listed = document.get("benchmarks")
    if has(_first(listed), "benchmarks"):
        message = "written by guidellm before 0.2, which is too old; expected the report of a later one"
        raise BadInput(message, path=path, key="benchmarks[0]")
    raw = document | {"benchmarks": [_modern(b) for b in listed]} if isinstance(listed, list) else document
    report = decoded_as(raw, _Report, path)
    if not report.benchmarks:
        raise BadInput("empty; expected at least one benchmark", path=path, key="benchmarks")
    warnings = [
        notice(
            "no-token-times",
            "guidellm keeps the first and the last token of an answer: no ITL, and no steps to calibrate from",
        )
    ]
    levels = [_level(benchmark) for benchmark in report.benchmarks]
    known = report.metadata.guidellm_version
    tool = f"guidellm {known or 'before 0.5'}"
    return assemble(path, tool, levels, epoch=0.0, warnings=warnings, engine=_engine(document))


def _engine(document: dict[str, Any]) -> Identity | None:
    """The server's engine: by the labels `engine` and `version` that a user gave the benchmark, or vLLM where guidellm
    ran it itself."""
    config: Any = document.get("config")
    metadata, spec = (config.get(key) if isinstance(config, dict) else None for key in ("metadata", "spec"))
    labels = metadata.get("labels") if isinstance(metadata, dict) else None
    if isinstance(labels, dict) and isinstance(labels.get("engine"), str):
        return identity(labels["engine"], "file", labels.get("version"))
    backend = spec.get("backend") if isinstance(spec, dict) else None
    kind = backend.get("kind") if isinstance(backend, dict) else None
    return identity("vllm", "file") if kind == "vllm_python" else None


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, list) and values else None


def _modern(benchmark: Any) -> Any:
    """A benchmark of 0.2 or 0.3 in the shape of later ones; others as they are."""
    if not isinstance(benchmark, dict) or "config" in benchmark or not has(benchmark.get("args"), "strategy"):
        return benchmark
    stats, requests = benchmark.get("run_stats"), benchmark.get("requests")
    times = {k: stats[k] for k in ("start_time", "end_time") if k in stats} if isinstance(stats, dict) else {}
    if isinstance(requests, dict):
        requests = {kind: [_modern_request(r) for r in some or []] for kind, some in requests.items()}
    return benchmark | times | {"config": {"strategy": benchmark["args"]["strategy"]}, "requests": requests}


def _modern_request(request: Any) -> Any:
    if not isinstance(request, dict) or "info" in request:
        return request
    scheduled = request.get("scheduler_info")
    due = scheduled.get("targeted_start_time") if isinstance(scheduled, dict) else None
    timings = {
        "targeted_start": due,
        "request_start": request.get("start_time"),
        "first_token_iteration": request.get("first_token_time"),
        "last_token_iteration": request.get("last_token_time"),
        "request_end": request.get("end_time"),
    }
    asked = scheduled.get("requested_tokens") if isinstance(scheduled, dict) else None
    return request | {
        "info": {"timings": timings, "error": request.get("error")},
        "request_args": None if asked is None else msgspec.json.encode({"body": {"max_tokens": asked}}).decode(),
    }


def _level(benchmark: _Benchmark) -> LoadLevel:
    strategy, requests = benchmark.config.strategy, benchmark.requests
    warnings = []
    users, rate = strategy.streams, strategy.rate
    if strategy.type_ == "synchronous":
        users = 1
    elif strategy.type_ == "throughput":
        users = strategy.max_concurrency
        warnings.append(notice("burst", "all requests were sent as fast as the server would take them"))
    open_loop = users is None and strategy.type_ != "throughput"
    kept = [(Status.OK, r) for r in requests.successful or []] + [
        (Status.ABORTED, r) for r in requests.incomplete or []
    ]
    kept += [(status_of_text(r.info.error or ""), r) for r in requests.errored or []]
    sent = [(status, r) for status, r in kept if r.info.timings.request_start is not None]
    if len(sent) < len(kept):
        warnings.append(
            notice("unsent-left-out", f"{len(kept) - len(sent)} requests that were never sent are left out")
        )
    undated = sum((r.info.timings.targeted_start or 0.0) < CLOCK for _, r in sent) if open_loop else 0
    if undated:
        warnings.append(
            notice(
                "due-times-missing",
                f"{undated} of {len(sent)} requests have a due time that is none, and guidellm sent them without "
                "waiting for it; when they were sent stands in for it",
            )
        )
    total = benchmark.metrics.request_totals.total if benchmark.metrics.request_totals is not None else None
    missing = (total or 0) - len(kept)
    if missing > 0:  # more are kept than counted when a warm-up was left out of the count
        warnings.append(
            notice(
                "requests-sampled",
                f"{missing} requests are not in the file (guidellm's sample_size): rates are too low",
            )
        )
    cached = sum(r.cached_tokens or 0 for _, r in sent)
    prompts = sum(r.prompt_tokens or 0 for _, r in sent)
    if cached:
        warnings.append(
            notice(
                "prefix-cached",
                f"{cached} of {prompts} prompt tokens ({cached / max(1, prompts):.0%}) were in the server's cache: "
                "their prefills were shorter than the prompts",
            )
        )
    return LoadLevel(
        users=users,
        rate=rate if open_loop else None,
        open_loop=open_loop,
        arrivals=ARRIVALS.get(strategy.type_) if open_loop else None,
        settled=benchmark.start_time,
        end=benchmark.end_time + INSTANT,
        answers=[_answer(status, r, open_loop) for status, r in sent],
        warnings=warnings,
    )


def _answer(status: Status, request: _Request, open_loop: bool) -> RequestRecord:
    timings = request.info.timings
    sent, due = timings.request_start or 0.0, timings.targeted_start
    first, ttft = timings.first_token_iteration, request.time_to_first_token_ms
    if first is None and ttft is not None:
        first = sent + ttft / 1e3
    ended = timings.request_end or timings.resolve_end
    output = request.output_tokens if request.output_tokens is not None else timings.token_iterations
    return RequestRecord(
        sent=sent,
        ended=ended or sent,
        end_known=ended is not None,
        due=due if open_loop and due is not None and due > CLOCK else None,
        prompt_tokens=request.prompt_tokens or 0,
        output_tokens=output,
        max_new_tokens=_asked(request.request_args),
        first=first,
        last=timings.last_token_iteration or (ended if status == Status.OK else None),
        status=status,
        error=request.info.error,
    )


def _asked(arguments: str | None) -> int | None:
    try:
        body = msgspec.json.decode(arguments or "{}", type=_Arguments).body
    except msgspec.DecodeError:
        return None
    return body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
