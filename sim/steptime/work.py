"""What one forward pass computes, and the little that a server does between two of them."""

from __future__ import annotations

import msgspec


class StepWork(msgspec.Struct, frozen=True, gc=False):
    """The work of one step; all counts. Columns of the same names make a table of steps, or a design matrix.

    A pass feeds each decoding sequence its last token, and prompts, or chunks of them. `passes` is 0 for work without
    tokens: joining two batches (`joined` to `kept`) and dropping sequences from one (`dropped`, `kept` remain), where
    `decode_longest` is the longest context of those that are there afterwards.
    """

    passes: int = 0
    prefill_tokens: int = 0
    prefill_sequences: int = 0
    prefill_attention: int = 0  # Σ chunk · (context before it + (chunk + 1) / 2); of a whole prompt n (n + 1) / 2
    prefill_longest: int = 0
    decode_sequences: int = 0
    decode_context: int = 0  # positions attended, the token being fed included: prompt + tokens received
    decode_longest: int = 0
    joined: int = 0
    dropped: int = 0
    kept: int = 0

    def after(self, steps: int, growth: StepWork) -> StepWork:
        """The work of the step that comes `steps` later, each adding `growth`."""
        parts = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(growth), strict=True)
        return StepWork(*(part + steps * more for part, more in parts))


NOTHING = StepWork()
