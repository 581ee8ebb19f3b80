"""Events of a stream as TGI 0.9.4 writes them (router/src/server.rs:390-461): `data:` without a space."""

from __future__ import annotations

import json
from typing import Any

from measure.standin.answer import VOCABULARY, Answer, chunk, word
from measure.standin.tgi.validation import Refused


def token_event(number: int) -> dict[str, Any]:
    """The event of word `number`."""
    token = {"id": number, "text": word(number), "logprob": -0.5, "special": False}
    return {"token": token, "generated_text": None, "details": None}


def finish_reason(answer: Answer) -> str:
    """Why an answer ended."""
    return "length" if answer.request.output_tokens == answer.request.max_new_tokens else "eos_token"


class TgiEvents:
    """See `answer.Events`; `details` of the last event are only sent on request."""

    def __init__(self, crlf: bool = False, details: bool = False, tokens: list[bytes] | None = None):
        self.end, self._details = b"\r\n" if crlf else b"\n", details
        self._tokens = tokens or [self._frame(token_event(i)) for i in range(VOCABULARY)]

    def with_details(self, details: bool) -> TgiEvents:
        """The same, with or without details."""
        return TgiEvents(self.end == b"\r\n", details, self._tokens)

    def token(self, answer: Answer, last: bool) -> bytes:
        """See `answer.Events.token`."""
        number = (answer.first_word + len(answer.sent)) % VOCABULARY
        if not last:
            return self._tokens[number]
        event = token_event(number)
        event["generated_text"] = answer.text + event["token"]["text"]
        if self._details:
            tokens = len(answer.sent) + 1
            event["details"] = {"finish_reason": finish_reason(answer), "generated_tokens": tokens, "seed": None}
        return self._frame(event)

    def failure(self) -> Refused:
        """See `answer.Events.failure`."""
        return Refused(424, "generation", "Request failed during generation: Server error: injected")

    def _frame(self, event: dict[str, Any]) -> bytes:
        return chunk(b"data:" + json.dumps(event, separators=(",", ":")).encode() + self.end * 2)
