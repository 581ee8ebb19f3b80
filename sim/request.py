"""A request while it is on its way: what was asked, and what has happened to it so far."""

from __future__ import annotations

from sim.server import ceil_block

OK, OVERLOADED, VALIDATION, ABORTED, TIMEOUT = "ok", "overloaded", "validation", "aborted", "timeout"
BROKEN = ("generation", "incomplete", "connect", "reset")  # statuses: of the server or of the way, not of the load


class Request:
    """One request. Lengths in tokens; times in seconds since the run began, on the server's clock except `sent`.

    `output_tokens` is what will really come back; `max_new_tokens` is what budgets are charged. A request is the one
    mutable value of the simulator: it carries its own times, so that nothing has to be looked up when it ends.
    """

    __slots__ = (
        "first_token",
        "gone",
        "id",
        "last_step",
        "last_token",
        "max_new_tokens",
        "new_blocks",
        "output_tokens",
        "prompt_blocks",
        "prompt_tokens",
        "queued",
        "received",
        "running",
        "scheduled",
        "sent",
        "status",
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
        self.prompt_blocks = ceil_block(prompt_tokens)  # each rounded separately at admission (queue.rs:197-212)
        self.new_blocks = ceil_block(max_new_tokens)
        self.queued = self.first_token = self.last_token = float("nan")
        self.received = 0  # tokens delivered; known once the request has ended
        self.last_step = 0  # of its batch: the step at which its last token comes
        self.status = ""
        self.gone = False  # its client has left
        self.running = False

    @property
    def live_tokens(self) -> int:
        """The KV tokens a flash shard holds for it from prefill to end (flash_causal_lm.py:263-268)."""
        return ceil_block(self.prompt_tokens + self.max_new_tokens - 1)
