"""A request in the simulator: its lengths, and its times and status so far."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from sim.model.status import Status

Text = Sequence[tuple[int, Hashable]]
"""What identifies the tokens of a request, prompt and answer: the end of each segment (0: no end), and a name that only
texts have that are the same up to there. Empty: no other text begins as this one does."""


class Request:
    """One request. Lengths in tokens; times in seconds since the run began, on the server's clock except `sent`.

    `output_tokens` is what will really come back; `max_new_tokens` is what budgets are charged. A request is the one
    mutable value of the simulator: it carries its own times, so that nothing has to be looked up when it ends.
    """

    __slots__ = (
        "arrived",
        "delays",
        "first_token",
        "gone",
        "id",
        "key",
        "last_token",
        "max_new_tokens",
        "of",
        "output_tokens",
        "priority",
        "prompt_tokens",
        "queued",
        "received",
        "replica",
        "scheduled",
        "sent",
        "session",
        "status",
        "text",
        "user",
    )

    def __init__(
        self,
        id: int,
        prompt_tokens: int,
        output_tokens: int,
        max_new_tokens: int,
        user: int = -1,
        sent: float = 0.0,
        scheduled: float | None = None,
    ):
        self.id, self.user = id, user
        self.prompt_tokens, self.output_tokens, self.max_new_tokens = prompt_tokens, output_tokens, max_new_tokens
        self.sent = sent
        self.scheduled = sent if scheduled is None else scheduled
        self.priority = 0  # the smaller, the more urgent, where an engine heeds it
        self.text: Text = ()
        self.key: str | None = None  # what a balancer knows its session or client by: a header's value, an address
        self.of = 0  # the number of its class in a mix
        self.session: Any = None  # that it is a turn of; its clients' matter
        self.arrived = self.queued = self.first_token = self.last_token = float("nan")
        self.delays: Sequence[float] = ()  # of its client, s
        self.replica = -1  # that has it, or had; -1 for one that reached none
        self.received = 0  # tokens delivered; known once the request has ended
        self.status: Status | None = None  # how it ended
        self.gone = False  # its client has left
