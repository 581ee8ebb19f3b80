"""A request as the engine knows it, and the blocks it counts for."""

from __future__ import annotations

from sim.model.request import Request

BLOCK = 16  # tokens; the constant 0.9.4 passes to its queue and the size of a KV block (router/src/infer.rs:56)


def ceil_block(tokens: int) -> int:
    """Round `tokens` up to a whole number of KV blocks."""
    return -(-tokens // BLOCK) * BLOCK


class Entry:
    """A request as the engine knows it; lengths in tokens."""

    __slots__ = (
        "gone",
        "last_step",
        "live_tokens",
        "max_new_tokens",
        "new_blocks",
        "output_tokens",
        "prompt_blocks",
        "prompt_tokens",
        "queued",
        "request",
        "running",
    )

    def __init__(self, request: Request):
        self.request = request
        self.prompt_tokens, self.output_tokens = request.prompt_tokens, request.output_tokens
        self.max_new_tokens = request.max_new_tokens
        prompt, new = request.prompt_tokens, request.max_new_tokens
        self.prompt_blocks = -(-prompt // BLOCK) * BLOCK  # each rounded separately at admission (queue.rs:197-212)
        self.new_blocks = -(-new // BLOCK) * BLOCK
        # what a flash shard holds from prefill to end (flash_causal_lm.py:263-268)
        self.live_tokens = -(-(prompt + new - 1) // BLOCK) * BLOCK
        self.last_step = 0  # of its batch: the step at which its last token comes
        self.gone = False  # its client has left
        self.queued = True
        self.running = False
