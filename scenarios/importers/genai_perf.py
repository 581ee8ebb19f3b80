"""genai-perf's (and perf_analyzer's) `profile_export.json`: every request with the times of its responses.

| run | genai-perf (`experiments[].requests[]`) |
|---|---|
| sent | `timestamp`, ns of the client's clock |
| token times | `response_timestamps` of the responses that carry output |
| ended | the last of `response_timestamps` |
| lengths | `usage` of a response where the server sent it; else responses with output stand in for tokens |
| window | first to last instant of the requests inside `window_boundaries` |

The tool counts tokens afterwards, with a tokenizer, and writes only sums of that (`profile_export_genai_perf.json`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from scenarios.importers.failures import status_of_text
from scenarios.importers.results import INSTANT, LoadLevel, RequestRecord, assemble, decoded_as, has
from sim.model.errors import BadInput
from sim.model.status import Status
from sim.model.warning import notice
from sim.run import Run


class _Request(msgspec.Struct):
    timestamp: int
    response_timestamps: list[int] = []
    request_inputs: dict[str, Any] = {}
    response_outputs: list[dict[str, Any]] = []
    error: str | None = None


class _Experiment(msgspec.Struct):
    mode: str
    value: float


class _Measured(msgspec.Struct):
    experiment: _Experiment
    requests: list[_Request]


class _Profile(msgspec.Struct):
    experiments: list[_Measured]
    version: str | None = None


class _Said(msgspec.Struct):
    """What one response says: whether it carries output, how it ended, and the server's own counts."""

    output: bool = False
    prompt_tokens: int | None = None
    output_tokens: int | None = None


def recognises(document: Any) -> bool:
    """Whether a JSON document is genai-perf's profile of every request."""
    if not has(document, "experiments") or not isinstance(document["experiments"], list):
        return False
    return all(has(each, "experiment", "requests") for each in document["experiments"])


def read(document: Any, path: Path) -> Run:
    """The run of a profile, one rung for every experiment in it."""
    profile = decoded_as(document, _Profile, path)
    measured = [each for each in profile.experiments if each.requests]
    if not measured:
        raise BadInput("empty; expected at least one experiment with requests", path=path, key="experiments")
    levels = [_level(each) for each in measured]
    warnings = []
    if not any(_said(r.response_outputs).output_tokens for each in measured for r in each.requests):
        warnings.append(
            notice("tokens-guessed", "tokens are not counted in the file: every response with output stands in for one")
        )
    return assemble(path, "genai-perf", levels, warnings=warnings)


def _level(measured: _Measured) -> LoadLevel:
    mode, value = measured.experiment.mode, measured.experiment.value
    answers = [_answer(r) for r in measured.requests]
    return LoadLevel(
        users=int(value) if mode == "concurrency" and value >= 1 else None,
        rate=value if mode == "request_rate" and value > 0 else None,
        settled=min(a.sent for a in answers),
        end=max(a.ended for a in answers) + INSTANT,
        answers=answers,
    )


def _answer(request: _Request) -> RequestRecord:
    sent = request.timestamp / 1e9
    times = np.array(request.response_timestamps, dtype=np.float64) / 1e9
    each = [_said([output]) for output in request.response_outputs[: len(times)]]
    carrying = np.array([said.output for said in each], dtype=np.bool_)
    whole = _said(request.response_outputs)
    chunks = times[: len(carrying)][carrying]
    asked = request.request_inputs.get("max_tokens")
    payload = _decoded(request.request_inputs.get("payload"))
    if isinstance(payload, dict):
        asked = payload.get("max_completion_tokens") or payload.get("max_tokens") or asked
    failed = request.error is not None or not len(times)
    return RequestRecord(
        sent=sent,
        ended=float(times[-1]) if len(times) else sent,
        end_known=bool(len(times)),
        prompt_tokens=whole.prompt_tokens or 0,
        output_tokens=whole.output_tokens if whole.output_tokens is not None else len(chunks),
        max_new_tokens=asked if isinstance(asked, int) and not isinstance(asked, bool) else None,
        last=float(chunks[-1]) if len(chunks) else None,
        chunks=chunks,
        status=status_of_text(request.error or "") if failed else Status.OK,
        error=request.error,
    )


def _said(outputs: list[dict[str, Any]]) -> _Said:
    """What some responses say together: OpenAI-style events (`response`), or Triton's (`text_output`)."""
    said = _Said()
    for output in outputs:
        said.output |= bool(output.get("text_output"))
        for line in str(output.get("response") or "").splitlines():
            event = _decoded(line.removeprefix("data:"))
            if isinstance(event, dict):
                _hear(event, said)
    return said


def _hear(event: dict[str, Any], said: _Said) -> None:
    for choice in event.get("choices") or []:
        if not isinstance(choice, dict):
            continue
        part = choice.get("delta") or choice.get("message") or choice
        if isinstance(part, dict):
            kinds = ("content", "text", "reasoning", "reasoning_content", "tool_calls")
            said.output |= any(part.get(kind) for kind in kinds)
    said.output |= bool(event.get("text_output"))
    usage = event.get("usage")
    if isinstance(usage, dict):
        for key, name in (("prompt_tokens", "prompt_tokens"), ("completion_tokens", "output_tokens")):
            if isinstance(usage.get(key), int):
                setattr(said, name, usage[key])


def _decoded(text: Any) -> Any:
    try:
        return msgspec.json.decode(text.strip()) if isinstance(text, str) else None
    except (msgspec.DecodeError, RecursionError):
        return None
