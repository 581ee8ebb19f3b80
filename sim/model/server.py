"""The flags of text-generation-inference 0.9.4 that decide how it batches, under the launcher's own names."""

from __future__ import annotations

import msgspec

from sim.model.errors import CannotFit

VALIDATION_WORKERS = 2  # threads that count tokens, each of one prompt at a time (router/src/validation.rs:34-48)
BLOCK = 16  # tokens; the constant 0.9.4 passes to its queue and the size of a KV block (router/src/infer.rs:56)


def ceil_block(tokens: int) -> int:
    """Round `tokens` up to a whole number of KV blocks."""
    return -(-tokens // BLOCK) * BLOCK


class Bounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A value only known to lie between `low` and `high`."""

    low: int
    high: int


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the router is configured. Defaults are the launcher's (launcher/src/main.rs:64-282).

    `max_batch_total_tokens` is what the server would answer at `/info`: flash models ignore the flag and take what
    their warm-up finds free. Absent, it is the calibration's; as `Bounds`, it is drawn.
    """

    engine: str = "tgi-0.9.4"
    max_batch_prefill_tokens: int = 4096
    max_batch_total_tokens: int | Bounds | None = None
    max_input_length: int = 1024
    max_total_tokens: int = 2048
    waiting_served_ratio: float = 1.2
    max_waiting_tokens: int = 20
    max_concurrent_requests: int = 128
    requires_padding: bool = False

    @property
    def token_budget(self) -> int:
        """`max_batch_total_tokens` as one number; a CPU server without the flag takes the router's own default."""
        if isinstance(self.max_batch_total_tokens, int):
            return self.max_batch_total_tokens
        if self.max_batch_total_tokens is None and self.requires_padding:  # router/src/main.rs:209-239
            return max(16000, self.max_total_tokens, self.max_batch_prefill_tokens)
        raise ValueError("max_batch_total_tokens is not settled yet")

    def refuses(self, prompt_tokens: int, max_new_tokens: int) -> bool:
        """Whether the server answers 422 to such a request (router/src/validation.rs:63-123)."""
        return prompt_tokens + max_new_tokens > self.max_total_tokens or prompt_tokens > self.max_input_length

    def check_fits(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Raise `CannotFit` for a request that is accepted but can never be scheduled, so that all behind it starve."""
        if self.refuses(prompt_tokens, max_new_tokens):
            return
        prompt, new = prompt_tokens, max_new_tokens
        if not self.requires_padding:
            prompt, new = ceil_block(prompt), ceil_block(new)
        what = f"a request of {prompt_tokens} + {max_new_tokens} tokens"
        if prompt > self.max_batch_prefill_tokens:
            raise CannotFit(
                f"{what} counts {prompt} prompt tokens, more than server.max_batch_prefill_tokens "
                f"{self.max_batch_prefill_tokens}: TGI 0.9.4 would wait for ever"
            )
        if prompt + new > self.token_budget:
            raise CannotFit(
                f"{what} counts {prompt + new} tokens, more than server.max_batch_total_tokens "
                f"{self.token_budget}: TGI 0.9.4 would wait for ever"
            )
