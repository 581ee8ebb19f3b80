"""inference-perf's `per_request_lifecycle_metrics.json`: every request with the times of its chunks.

| run | inference-perf |
|---|---|
| sent, ended | `start_time`, `end_time`, s of the client's monotonic clock |
| token times | `chunk_times` of `info.response_metrics`; in older versions `output_token_times`, one a line |
| lengths | `server_usage` where the server gave it, else the client's tokenizer: `input_tokens`, `output_tokens` |
| window | first to last instant |

Neither stages nor loads are in the file, so the load is what the requests show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from scenarios.importers.failures import status_of_text
from scenarios.importers.results import INSTANT, Floats, LoadLevel, RequestRecord, assemble, decoded_as, has
from sim.model.status import Status
from sim.model.warning import notice
from sim.run import Run


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Response(msgspec.Struct):
    output_tokens: int | None = None
    output_token_times: list[float] = []
    chunk_times: list[float] = []
    server_usage: _Usage | None = None


class _Text(msgspec.Struct):
    input_tokens: int | None = None


class _Asked(msgspec.Struct):
    text: _Text | None = None


class _Info(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    output_token_times: list[float] = []
    request_metrics: _Asked | None = None
    response_metrics: _Response | None = None


class _Error(msgspec.Struct):
    error_type: str = ""
    error_msg: str = ""


class _Request(msgspec.Struct):
    start_time: float
    end_time: float | None = None
    request: Any = None
    info: _Info | None = None
    error: _Error | None = None


def recognises(document: Any) -> bool:
    """Whether a JSON document is one of inference-perf's requests."""
    return has(document, "start_time", "end_time", "info") and has(document, "request")


def read(documents: list[Any], path: Path) -> Run:
    """The run of a list of requests."""
    requests = [decoded_as(d, _Request, path, i) for i, d in enumerate(documents, 1)]
    read = [_answer(r) for r in requests]
    doubled = sum(twice for _, twice in read)
    answers = [answer for answer, _ in read]
    warnings = []
    if doubled:
        warnings.append(
            notice(
                "blank-lines",
                f"in {doubled} of {len(answers)} answers every line of the stream has its time, blank ones, too: every "
                "second one is taken",
            )
        )
    level = LoadLevel(
        settled=min(a.sent for a in answers), end=max(a.ended for a in answers) + INSTANT, answers=answers
    )
    return assemble(path, "inference-perf", [level], warnings=warnings)


def _answer(request: _Request) -> tuple[RequestRecord, bool]:
    info = request.info or _Info()
    response = info.response_metrics or _Response()
    usage = response.server_usage or _Usage()
    asked = info.request_metrics.text if info.request_metrics is not None else None
    prompt = usage.prompt_tokens or (asked.input_tokens if asked is not None else None) or info.input_tokens or 0
    output = usage.completion_tokens or response.output_tokens or info.output_tokens or 0
    times = np.array(response.chunk_times or response.output_token_times or info.output_token_times, dtype=np.float64)
    chunks, twice = _chunks(times, output)
    error = request.error
    words = f"{error.error_type} {error.error_msg}".strip() if error is not None else None
    known = request.end_time is not None and request.end_time >= request.start_time
    return (
        RequestRecord(
            sent=request.start_time,
            ended=request.end_time if known and request.end_time is not None else request.start_time,
            end_known=known,
            prompt_tokens=prompt,
            output_tokens=output,
            max_new_tokens=_limit(request.request),
            last=float(chunks[-1]) if len(chunks) else (request.end_time if error is None else None),
            chunks=chunks,
            status=Status.OK if error is None else status_of_text(words or ""),
            error=words,
        ),
        twice,
    )


def _chunks(times: Floats, tokens: int) -> tuple[Floats, bool]:
    """The times of the chunks with tokens, and whether every line between them was timed as well."""
    twice = bool(tokens) and len(times) >= 2 * tokens
    if twice:
        times = times[::2]
    # behind the tokens come the reason why the answer ended, the usage, and [DONE]
    return (times[:tokens] if tokens < len(times) <= tokens + 3 else times), twice


def _limit(request: Any) -> int | None:
    try:
        body = msgspec.json.decode(request) if isinstance(request, str) else request
    except (msgspec.DecodeError, RecursionError):
        return None
    limit = (body.get("max_tokens") or body.get("max_completion_tokens")) if isinstance(body, dict) else None
    return limit if isinstance(limit, int) and not isinstance(limit, bool) else None
