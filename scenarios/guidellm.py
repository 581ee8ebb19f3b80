"""guidellm's JSON report (`--output kind=json`), as version 0.8.1 writes it; one rung for every benchmark in it.

| run | guidellm (`requests.successful`, `.incomplete`, `.errored`) |
|---|---|
| sent, ended | `info.timings.request_start`, `request_end` (else `resolve_end`), unix s |
| scheduled | rates: `info.timings.targeted_start`; streams: sent |
| first and last token | `info.timings.first_token_iteration`, `last_token_iteration` |
| lengths | `prompt_tokens`, `output_tokens`: the server's count if it gave one; `max_tokens` of `request_args` |
| window | the benchmark's `start_time` to `end_time`: what guidellm's warm-up and cool-down leave |

There is no time for every token, so no ITL and nothing to rebuild steps from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from scenarios.failures import status_of_text
from scenarios.results import Answer, Stretch, assemble, has, understood
from sim.errors import BadInput
from sim.request import ABORTED, OK
from sim.run import Run

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


class _Body(msgspec.Struct, frozen=True):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class _Arguments(msgspec.Struct):
    body: _Body = _Body()


class _Requests(msgspec.Struct):
    successful: list[_Request]
    incomplete: list[_Request]
    errored: list[_Request]


class _Strategy(msgspec.Struct):
    type_: str
    streams: int | None = None
    rate: float | None = None
    max_concurrency: int | None = None


class _Config(msgspec.Struct):
    strategy: _Strategy


class _Totals(msgspec.Struct):
    total: int


class _Metrics(msgspec.Struct):
    request_totals: _Totals


class _Benchmark(msgspec.Struct):
    config: _Config
    start_time: float
    end_time: float
    requests: _Requests
    metrics: _Metrics


class _Metadata(msgspec.Struct):
    guidellm_version: str


class _Report(msgspec.Struct):
    metadata: _Metadata
    benchmarks: list[_Benchmark]


def speaks(document: Any) -> bool:
    """Whether a JSON document is guidellm's."""
    return isinstance(document, dict) and has(document.get("metadata"), "guidellm_version")


def read(document: Any, path: Path) -> Run:
    """The run of a guidellm report."""
    report = understood(document, _Report, path)
    if not report.benchmarks:
        raise BadInput("empty; expected at least one benchmark", path=path, key="benchmarks")
    doubts = ["guidellm keeps the first and the last token of an answer: no ITL, and no steps to calibrate from"]
    stretches = [_stretch(benchmark, path) for benchmark in report.benchmarks]
    return assemble(path, f"guidellm {report.metadata.guidellm_version}", stretches, epoch=0.0, doubts=doubts)


def _stretch(benchmark: _Benchmark, path: Path) -> Stretch:
    strategy, requests = benchmark.config.strategy, benchmark.requests
    doubts = []
    users, rate = strategy.streams, strategy.rate
    if strategy.type_ == "synchronous":
        users = 1
    elif strategy.type_ == "throughput":
        users = strategy.max_concurrency or len(requests.successful)
        doubts.append("all requests were sent as fast as the server would take them")
    if users is None and rate is None:
        raise BadInput(
            f"{strategy.type_!r} has neither streams nor a rate; expected synchronous, concurrent, throughput, "
            "constant, async or poisson",
            path=path,
            key="benchmarks[].config.strategy",
        )
    open_loop = users is None
    kept = [(OK, r) for r in requests.successful] + [(ABORTED, r) for r in requests.incomplete]
    kept += [(status_of_text(r.info.error or ""), r) for r in requests.errored]
    sent = [(status, r) for status, r in kept if r.info.timings.request_start is not None]
    if len(sent) < len(kept):
        doubts.append(f"{len(kept) - len(sent)} requests that were never sent are left out")
    undated = sum((r.info.timings.targeted_start or 0.0) < CLOCK for _, r in sent) if open_loop else 0
    if undated:
        doubts.append(
            f"{undated} of {len(sent)} requests have a due time that is none, and guidellm sent them without waiting "
            f"for it; when they were sent stands in for it, and the rate was not {rate:g}/s"
        )
    missing = benchmark.metrics.request_totals.total - len(kept)
    if missing > 0:  # more are kept than counted when a warm-up was left out of the count
        doubts.append(f"{missing} requests are not in the file (guidellm's sample_size): rates are too low")
    return Stretch(
        users=users,
        rate=rate if open_loop else None,
        settled=benchmark.start_time,
        end=benchmark.end_time,
        answers=[_answer(status, r, open_loop) for status, r in sent],
        doubts=doubts,
    )


def _answer(status: str, request: _Request, open_loop: bool) -> Answer:
    timings = request.info.timings
    sent, due = timings.request_start or 0.0, timings.targeted_start
    output = request.output_tokens if request.output_tokens is not None else timings.token_iterations
    return Answer(
        sent=sent,
        ended=timings.request_end or timings.resolve_end or sent,
        due=due if open_loop and due is not None and due > CLOCK else None,
        prompt_tokens=request.prompt_tokens or 0,
        output_tokens=output,
        max_new_tokens=_asked(request.request_args),
        first=timings.first_token_iteration,
        last=timings.last_token_iteration,
        status=status,
        error=request.info.error,
    )


def _asked(arguments: str | None) -> int | None:
    try:
        body = msgspec.json.decode(arguments or "{}", type=_Arguments).body
    except msgspec.DecodeError:
        return None
    return body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
