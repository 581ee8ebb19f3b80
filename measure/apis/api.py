"""What the client needs from an API: the body of a request, and the meaning of each event of the answer."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

from measure.apis.sse import Event
from measure.apis.tokens import NONE, OUTPUT
from sim.model.status import Status

Prompt = str | list[int]


class ParsedEvent(NamedTuple):
    """One event: its `kind` (see `tokens`), the server's running counts where it sends them, and whether the answer is
    `done`. `status` is set for a failure."""

    kind: int = NONE
    finish_reason: str | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    status: Status | None = None
    error: str | None = None
    done: bool = False


TOKEN = ParsedEvent(OUTPUT)
NOTHING = ParsedEvent()
DONE = ParsedEvent(done=True)


class Api(Protocol):
    """One way to request a streamed answer."""

    path: str

    def __init__(self, model: str | None = None, extras: Collection[str] = ()):
        """`model` is sent with each request; `extras` are the optional keys that the server accepts."""

    def request_body(self, prompt: Prompt, prompt_tokens: int, max_new_tokens: int) -> bytes:
        """The JSON of a request for a greedy answer of at most `max_new_tokens`."""

    def parse_event(self, event: Event) -> ParsedEvent:
        """Decode one event; `msgspec.DecodeError` if it does not belong to this API."""

    def parse_answer(self, body: bytes) -> ParsedEvent:
        """Decode an answer that was not streamed; `msgspec.DecodeError` if it does not belong to this API."""
