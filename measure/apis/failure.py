"""Failed requests: the status of a request from an error object, an error event or an HTTP status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from measure.apis.api import ParsedEvent
from measure.apis.http_error import clean, explain
from sim.model.status import Status

ERROR_TYPES = {
    "overloaded": Status.OVERLOADED,
    "validation": Status.VALIDATION,
    "generation": Status.GENERATION,
    "incomplete_generation": Status.INCOMPLETE,
}


def from_error(error: Any, error_type: str | None) -> ParsedEvent:
    """The failure that an error object describes: TGI's (`error`, `error_type`) or OpenAI's (`error.message`,
    `error.type`, `error.code`)."""
    if isinstance(error, dict):
        code = str(error.get("code"))
        known = ERROR_TYPES.get(str(error.get("type")))
        status = known or (status_of(int(code)) if code.isdecimal() and len(code) == 3 else Status.GENERATION)
        return ParsedEvent(status=status, error=clean(str(error.get("message") or error.get("detail") or error)))
    return ParsedEvent(status=ERROR_TYPES.get(error_type or "", Status.GENERATION), error=clean(str(error)))


def from_body(body: bytes, otherwise: ParsedEvent | None = None) -> ParsedEvent:
    """The failure that a body or an event without an answer describes: under `error`, or at the top level, as vLLM and
    FastAPI write it (`message`, `detail`). `otherwise` is returned if it describes none."""
    found = msgspec.json.decode(body)
    if isinstance(found, dict):
        if found.get("error"):
            error_type = found.get("error_type")
            return from_error(found["error"], error_type if isinstance(error_type, str) else None)
        if found.get("object") == "error" or found.get("message") or found.get("detail"):
            return from_error(found, None)
    text = clean(body[:1000].decode("utf-8", "replace"))
    return otherwise or ParsedEvent(status=Status.INCOMPLETE, error=f"an answer without a choice: {text}")


def from_event(data: bytes) -> ParsedEvent:
    """The failure that an event of type `error` describes, whatever its data."""
    text = clean(data[:1000].decode("utf-8", "replace"))
    otherwise = ParsedEvent(status=Status.GENERATION, error=text or "an error without a message")
    try:
        return from_body(data, otherwise)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return otherwise


def from_response(code: int, body: bytes, headers: Mapping[str, str] = {}, url: str = "") -> ParsedEvent:
    """The failure of a request that was answered with an HTTP status other than 200; see `http_error.explain`."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = None
    known = ERROR_TYPES.get(str(found.get("error_type"))) if isinstance(found, dict) and found.get("error") else None
    return ParsedEvent(status=known or status_of(code), error=explain(code, headers, body, url))


def status_of(code: int) -> Status:
    """The status of a request for an HTTP status other than 200 (TGI: router/src/server.rs:797-825)."""
    if code in (429, 503):
        return Status.OVERLOADED
    return Status.GENERATION if code == 424 or code >= 500 else Status.VALIDATION
