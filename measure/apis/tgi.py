"""The API of text-generation-inference: `/generate_stream`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from measure.apis import failure
from measure.apis.api import NOTHING, TOKEN, ParsedEvent, Prompt
from measure.apis.sse import Event
from measure.apis.tokens import NONE, OUTPUT

ABSENT = msgspec.Raw()


class _Details(msgspec.Struct):
    finish_reason: str | None = None
    generated_tokens: int | None = None


class _Answer(msgspec.Struct):
    generated_text: str | None = None
    details: _Details | None = None


class _Event(msgspec.Struct):
    token: msgspec.Raw = ABSENT
    details: _Details | None = None
    error: Any = None
    error_type: str | None = None


class Tgi:
    """One event is one token, whatever its text; errors come in HTTP 200 (router/src/server.rs)."""

    path = "/generate_stream"

    def __init__(self, model: str | None = None, extras: Collection[str] = ()):
        self._decoder = msgspec.json.Decoder(_Event)

    def request_body(self, prompt: Prompt, prompt_tokens: int, max_new_tokens: int) -> bytes:
        """See `Api.request_body`; `truncate` makes the server cut the text to `prompt_tokens` with any tokenizer."""
        parameters = {"max_new_tokens": max_new_tokens, "truncate": prompt_tokens, "details": True}
        return msgspec.json.encode({"inputs": prompt, "parameters": parameters})

    def parse_event(self, event: Event) -> ParsedEvent:
        """See `Api.parse_event`."""
        if event.type == b"error":
            return failure.from_event(event.data)
        found = self._decoder.decode(event.data)
        if found.error is not None:
            return failure.from_error(found.error, found.error_type)
        if found.details is None:
            return TOKEN if found.token is not ABSENT else NOTHING
        kind = OUTPUT if found.token is not ABSENT else NONE
        return ParsedEvent(kind, found.details.finish_reason, found.details.generated_tokens)

    def parse_answer(self, body: bytes) -> ParsedEvent:
        """See `Api.parse_answer`."""
        found = msgspec.json.decode(body, type=_Answer | list[_Answer])
        if isinstance(found, list):
            found = found[0] if found else _Answer()
        if found.generated_text is None:
            return failure.from_body(body)
        details = found.details or _Details()
        return ParsedEvent(NONE, details.finish_reason, details.generated_tokens)
