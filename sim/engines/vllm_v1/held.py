"""A request as the engine knows it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from sim.engines.kv_cache import Run
from sim.model.request import Request

NEVER = 1 << 60  # a step that does not come
WAITING, PREFILLING, DECODING, STOPPED, OVER = range(5)
"""What a request does: it waits, its prompt is computed in chunks, every step gives it a token, its last token is under
way (asynchronous scheduling), it has ended."""


class Held:
    """A request as the engine knows it; lengths in tokens, steps by their numbers.

    Its tokens are those sampled before `start` and one of every step from there on.
    """

    __slots__ = (
        "allowed",
        "base",
        "blocks",
        "computed",
        "last",
        "limit",
        "line",
        "number",
        "parked",
        "pending",
        "preemptions",
        "prompt",
        "request",
        "resumed",
        "start",
        "started",
        "state",
        "text",
    )

    def __init__(self, request: Request):
        self.request, self.prompt, self.text = request, request.prompt_tokens, request.text
        self.limit = request.output_tokens  # tokens after which it ends
        self.allowed = request.max_new_tokens  # tokens after which the scheduler knows that it ends
        self.state = WAITING
        self.number = 0  # of its last admission
        self.base = 0  # tokens sampled before `start`
        self.pending = 0  # of these, how many have not been delivered
        self.computed = 0  # while it waits or prefills
        self.start, self.line, self.last = NEVER, 0, NEVER  # see `Decoders`
        self.blocks: list[Run] = []  # those with a cache entry, of a text that others may share
        self.parked: Run | None = None  # what the cache may have kept of it when it was preempted
        self.preemptions = 0
        self.started = False  # had its first token
        self.resumed = False  # preempted since its last token

    def received(self, delivered: int) -> int:
        """Its tokens after the output of step number `delivered`."""
        start = self.start
        return self.base - self.pending + (delivered - start + 1 if delivered >= start else 0)

    def names(self, first: int, end: int, size: int) -> Iterator[tuple[Hashable, int, int]]:
        """The names of its text's segments, each with the blocks from `first` to `end` that end in it."""
        for until, name in self.text:
            reach = end if until == 0 else min(until // size, end)
            if reach > first:
                yield name, first, reach
                first = reach

    def open_names(self) -> list[Hashable]:
        """The names under which what it decodes can be found."""
        return [name for until, name in self.text if until == 0 or until > self.prompt]
